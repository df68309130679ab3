"""Fully sharded data parallelism (torch's FSDP2; arXiv:2304.11277): each rank keeps a part of every trained weight, of
its gradient and of its moments, and has a layer's whole weights only while it runs that layer.

From outside, the model is as ever: `state_dict` returns whole tensors and `load_state_dict` takes them, so checkpoints
and hashes are those of any other run. Whatever needs whole tensors is collective: call it on all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.models.segmenter import Segmenter

SMALLEST_LAYER = 1_000_000  # parameters; smaller layers are not worth a gather of their own


class ShardedModel:
    """Shards a model's parameters over the ranks, in place."""

    def __init__(self, model: Segmenter) -> None:
        """`model`: on its device, with the same weights on all ranks of the process group.

        What is gathered at a time is one of the `sharded_layers`; all else is whole from the forward pass to the end of
        the backward pass. Gradients are averaged over the ranks, as by DDP. Parameters become other objects: build the
        optimiser afterwards.
        """
        self.keeps_states = True
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in [*sharded_layers(model), model]:
            fully_shard(layer, mesh=mesh)
        self._layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._model = model
        # Nothing here changes outputs in place, which is what torch warns of.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

        def gather(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            for name in (*module._parameters, *module._buffers):
                if prefix + name in state:
                    state[prefix + name] = self.gathered(state[prefix + name])

        for module in model.modules():
            module.register_state_dict_post_hook(gather)
            module.register_load_state_dict_pre_hook(_take_parts)

    @contextmanager
    def states_on(self, is_kept: bool) -> Iterator[None]:
        """Inside, states have contents only on ranks where `is_kept`; elsewhere they are meta tensors."""
        self.keeps_states = is_kept
        try:
            yield
        finally:
            self.keeps_states = True

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every rank has all weights and runs the model without the others, as evaluation must: ranks have
        different images. Do not change the weights inside."""
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.reshard()
                layer.set_reshard_after_forward(layer is not self._model, recurse=False)

    def gathered(self, state: Any) -> Any:
        """A copy of a state, such as an optimiser's, with whole tensors on the host."""
        if isinstance(state, Tensor):
            tensor = whole(state.detach())
            return tensor.to("cpu", copy=True) if self.keeps_states else tensor.to("meta")
        if isinstance(state, Mapping):
            return {key: self.gathered(item) for key, item in state.items()}
        return [self.gathered(item) for item in state] if isinstance(state, list) else state


def _take_parts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and prefix + name in state:
            state[prefix + name] = part_like(parameter, state[prefix + name])


def sharded_layers(model: Segmenter) -> list[nn.Module]:
    """Elements of module lists with SMALLEST_LAYER parameters or more: blocks of the ViT, and a large head's layers.
    Those within others come first."""
    # Not the list of features and head: EoMT's head also runs the features' norm.
    lists = [module for part in model.segmentation_model for module in part.modules()
             if isinstance(module, nn.ModuleList)]
    return [layer for layers in reversed(lists) for layer in layers
            if sum(parameter.numel() for parameter in layer.parameters()) >= SMALLEST_LAYER]


def is_sharded(model: nn.Module) -> bool:
    """Whether it is a `ShardedModel`'s."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on its device; collective. Others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.detach()


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory. Others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part.detach()


def part_like(sharded: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, sharded like another one. As it is, if that is not sharded."""
    if not isinstance(sharded, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
