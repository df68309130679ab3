"""Forward passes never wait for the device, and run each part in the precision it needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model

from tests.conftest import REPOSITORY
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.models import Segmenter
from trainer.models.deform_attn import MSDeformAttn
from trainer.precision import autocast, store_for_autocast

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten._unique2,
           aten.unique_dim, aten.equal, aten.is_nonzero, aten.bincount, aten.repeat_interleave,
           aten.lift_fresh}  # torch.tensor(...): data that comes from the host
HEADS = {"m2f": (), "linear": ("decoder_head.use_cls_token=true",),
         "eomt": ("decoder_head.num_blocks=2", "backbone.trainable=true"), "pmt": ("decoder_head.block_ffn=128",)}


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU: reading scalars, data-dependent sizes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices: Sequence[Any] = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        if any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise AssertionError(f"{func} with a mask waits for the device")
        if func.overloadpacket in WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def model_of(head: str, *overrides: str) -> Segmenter:
    torch.manual_seed(0)
    settings = [f"decoder_head.type={head}", *HEADS[head], *overrides]
    return build_model(load_run_config(REPOSITORY / "tests" / "support" / "tiny.yaml", settings), 5)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def loss_of(outputs: dict[str, Any]) -> Tensor:
    """A differentiable scalar that depends on every prediction."""
    predictions = [outputs, *outputs.get("aux_outputs", ())]
    return torch.stack([value.float().square().mean() for item in predictions for name, value in item.items()
                        if name != "aux_outputs"]).sum()


@pytest.mark.parametrize("waits", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()), lambda x: float(x[0]),
    lambda x: x.new_tensor([1.0, 2.0]), lambda x: x.masked_select(x > 0), lambda x: torch.where(x > 0),
], ids=["item", "mask", "nonzero", "bool", "float", "tensor", "masked_select", "where"])
def test_the_detector_detects(waits: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        waits(torch.ones(3))


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("head", HEADS)
def test_no_forward_or_backward_pass_waits(head: str, recompute: str) -> None:
    model = model_of(head, f"train.gradient_checkpointing={recompute}")
    model.head.set_progress(0.3, 1)  # EoMT: some queries masked, some not
    with NoWaiting():
        loss_of(model.train()(images())).backward()
        with torch.no_grad():
            model.semantic_logits(model.eval()(images()), (64, 96))
        model.head.set_progress(0.5, 1)


@pytest.mark.parametrize("head", HEADS)
def test_every_tensor_is_made_where_the_model_is(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, a tensor created on the CPU by mistake cannot be mixed in."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has none
    model = model_of(head).to("meta")
    outputs = model.train()(images().to("meta"))
    assert model.semantic_logits(outputs, (64, 96)).shape == (2, 5, 64, 96)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at it
@pytest.mark.parametrize("head", HEADS)
def test_the_head_compiles_in_one_graph(head: str) -> None:
    """Traced whole (fullgraph), forward and backward; EoMT is not retraced at each annealing step."""
    torch._dynamo.reset()
    still = ["adapter.drop_path=0", *(["decoder_head.dropout=0"] if head == "linear" else [])]
    plain, compiled = (model_of(head, *still).train() for _ in range(2))
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled.head.compile(backend=backend, fullgraph=True)
    for progress in (0.3, 0.31, 0.32):
        for model in (plain, compiled):
            torch.manual_seed(0)
            model.head.set_progress(progress, 1)
            loss_of(model(images())).backward()
    assert graphs == 1
    for parameter, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "device", "has_bf16", "expected"), [
    ("auto", "cpu", True, None), ("auto", "cuda", True, torch.bfloat16),
    ("auto", "cuda", False, None),  # torch emulates it there, slowly
    ("fp32", "cuda", True, None), ("bf16", "cpu", False, torch.bfloat16), ("fp16", "cuda", False, torch.float16)])
def test_the_precision_is_as_set_or_what_the_device_has(precision: str, device: str, has_bf16: bool, expected: Any,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        has_bf16 or including_emulation))
    monkeypatch.setattr(torch, "autocast", lambda _, dtype, enabled, **_more: made.append(dtype if enabled else None))
    autocast(load_run_config(None, [f"train.precision={precision}"]), torch.device(device))
    assert made == [expected]


class Dtypes:
    """Output dtypes of parts of a model, by name."""

    def __init__(self, model: Segmenter, **parts: nn.Module) -> None:
        self.seen: dict[str, set[torch.dtype]] = {}
        for name, part in parts.items():
            part.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [item for item in torch.utils._pytree.tree_leaves(output) if isinstance(item, Tensor)]
            self.seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
        return note


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_each_part_of_mask2former_runs_in_its_precision(low: torch.dtype) -> None:
    model = model_of("m2f").train()
    features, head = model.segmentation_model
    deformable = next(module for module in features.modules() if isinstance(module, MSDeformAttn))
    dtypes = Dtypes(model, vit=model.backbone.vit.model.layer[1].mlp.up_proj, spatial_prior=features.spm.conv2[0],
                    deformable=deformable, pixel_decoder=head.pixel_decoder, predictor=head.predictor.mask_embed)
    with torch.autocast("cpu", torch.bfloat16 if low is torch.float32 else low, enabled=low is not torch.float32):
        outputs = model(images())
    loss_of(outputs).backward()
    assert dtypes.seen == {"vit": {low}, "spatial_prior": {low}, "predictor": {low},
                           "deformable": {torch.float32}, "pixel_decoder": {torch.float32}}
    scores = model.semantic_logits(outputs, (64, 96))
    assert scores.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("head", HEADS)
def test_bf16_stays_close_to_fp32(head: str) -> None:
    model = model_of(head).eval()
    with torch.no_grad():
        exact = model.semantic_logits(model(images()), (64, 96))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images())
        rounded = model.semantic_logits(outputs, (64, 96))
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("head", ["m2f", "eomt", "pmt"])
def test_recomputing_saves_activations(head: str) -> None:
    saved = []
    for setting in ("false", "true"):
        model = model_of(head, f"train.gradient_checkpointing={setting}").train()
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images())
        saved.append(count)
    assert saved[1] < 0.8 * saved[0]  # what is left: predictions, which the loss needs, and convolutions


class Casts(TorchDispatchMode):
    """Counts conversions of these weights to another type."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.count = weights, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is aten._to_copy and args[0].untyped_storage().data_ptr() in self.weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


def weights_of(vit: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in vit.parameters()}


def predictions_and_gradients(model: Segmenter, low: torch.dtype) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # dropout, and drop_path
    with torch.autocast("cpu", low):
        outputs = model(images())
    loss_of(outputs).backward()
    leaves = [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return leaves + [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("head", "vit", "low"), [
    *((head, "plain", torch.bfloat16) for head in HEADS), ("pmt", "dinov2-weights", torch.float16),
    *(("linear", vit, torch.bfloat16) for vit in ("swiglu", "dinov2-weights", "dinov2-image", "dinov2-swiglu")),
], ids=str)
def test_a_frozen_vit_stored_for_autocast_gives_the_same_numbers(head: str, vit: str, low: torch.dtype,
                                                                 tmp_path: Path) -> None:
    settings = {"plain": [], "swiglu": ["backbone.random.use_gated_mlp=true"]}.get(vit)
    if settings is None:
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70,
                 "patch_size": 14, "mlp_ratio": 2, "use_swiglu_ffn": vit == "dinov2-swiglu"}
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "vit")
        settings = ["backbone.random.hidden_size=null", f"backbone.source={tmp_path / 'vit'}",
                    f"backbone.patch_resize={'image' if vit == 'dinov2-image' else 'weights'}"]
    model = model_of(head, *settings, "backbone.trainable=false").train()
    model.head.set_progress(0.3, 1)
    before, sha256 = predictions_and_gradients(model, low), model.backbone.weights_sha256()
    with Casts(weights_of(model.backbone.vit)) as casts:
        predictions_and_gradients(model, low)
    assert casts.count >= 4 * 6  # at least the linear layers of four blocks
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[low]
    store_for_autocast(model, load_run_config(None, [f"train.precision={precision}"]), torch.device("cpu"))
    after = predictions_and_gradients(model, low)
    assert len(after) == len(before) and all(map(torch.equal, after, before))
    with Casts(weights_of(model.backbone.vit)) as casts:
        predictions_and_gradients(model, low)
    assert casts.count == 0 and model.backbone.weights_sha256() == sha256


def test_what_is_stored_for_autocast_is_half_as_large_and_not_exported() -> None:
    model, config = model_of("linear"), load_run_config(None, ["train.precision=bf16"])
    exact = {name: parameter.clone() for name, parameter in model.backbone.vit.named_parameters()}
    store_for_autocast(model, config, torch.device("cpu"))
    for name, parameter in model.backbone.vit.named_parameters():
        rounded = parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact[name].to(parameter.dtype))
        assert rounded == (("proj" in name or "patch_embeddings" in name) and not parameter.requires_grad), name
    with pytest.raises(RuntimeError, match="for_export=True"):
        model.meta_state_dict()
    with pytest.raises(RuntimeError, match="for_export=True"):
        model.backbone.load_meta_state_dict({})
    assert model.head_state_dict()  # what a checkpoint stores


@pytest.mark.parametrize("settings", [["train.precision=fp32"], ["train.precision=auto"],
                                      ["train.precision=bf16", "backbone.trainable=true"]], ids=str)
def test_a_vit_that_runs_in_float32_or_is_trained_stays_exact(settings: list[str]) -> None:
    model = model_of("linear", *settings)
    store_for_autocast(model, load_run_config(None, settings[:1]), torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.meta_state_dict()
