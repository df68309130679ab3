"""What does a training step ask of a GPU? Operators that compute something, a stand-in for kernels launched, and waits
of the host.

Counted on the CPU, with what CUDA would use: bf16 autocast, torch's own operators in the loss, AdamW fused or, as torch
does by default, as loops over lists of tensors. Such a list counts as one operator and is a few kernels. Each recipe's
head on 12 blocks, all of them narrow: widths change no count. One micro-batch of two crops; steps that are neither
logged nor saved, once all is warm. A wait is a read by the host of something not yet computed, or a copy of a host's
list to the device, which CUDA may wait for as well.

example: python -m benchmarks.launches
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.results import REPOSITORY, Result, benchmark_parser
from trainer import loop, optimizer
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loss import cpu_kernels
from trainer.models.deform_attn import deformable_sampling

aten = torch.ops.aten
READS = {Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}
COPIES = {aten.lift_fresh, aten.nonzero, aten.masked_select}
NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
           "_local_scalar_dense"}
NARROW = ["backbone.source=null", "backbone.random.hidden_size=64", "backbone.random.num_hidden_layers=12",
          "backbone.random.num_attention_heads=4", "backbone.random.intermediate_size=64", "loss.num_points=64",
          "data.workers=0", "data.crop_size=64", "data.online.scaled_side=null", "train.precision=bf16", "device=cpu",
          "train.global_batch_size=2", "train.micro_batch_size=2", "train.total_steps=8", "train.log_every=100",
          "train.checkpoint_every=100", "eval.max_images=1", "eval.panels=0"]
HEADS = {"m2f": ["decoder_head.hidden_dim=64", "decoder_head.enc_ffn=64", "decoder_head.dec_ffn=64"],
         "linear": [], "eomt": [], "pmt": ["decoder_head.block_ffn=64"]}
COUNTED = 5  # the step; those before it warm up


class Counted(Exception):
    """The run need not go on."""


class Operators(TorchDispatchMode):
    """Counts operators and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.within: list[str] = []
        self.is_loading = False  # in a run with workers, they do that

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_loading:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in NOTHING:
            self.counts["operators"] += 1
            self.counts.update(self.within)
        if func.overloadpacket in COPIES and not self.within:  # AdamW in lists counts its steps on the host
            self.counts["copies"] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts the host's reads of tensors."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators, self.is_late = operators, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and not self.operators.within:
            self.operators.counts["late reads" if self.is_late else "reads"] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # of another commit
    arguments = parser.parse_args()
    result = Result("launches" if arguments.variant is None else f"launches-{arguments.variant}", arguments.results)
    table = result.table(f"A step{'' if arguments.variant is None else f', {arguments.variant}'}", "head", "operators",
                         "of these, clipping and AdamW", "waits for matching", "waits for losses",
                         "waits for copies of lists", "losses read a step late")
    with tempfile.TemporaryDirectory() as folder:
        shards = made_shards(Path(folder))
        for head in HEADS:
            counts = counted(head, shards, Path(folder) / head)
            matching = min(counts["reads"], int(head != "linear"))
            table.row(head, counts["operators"], counts["update"], matching, counts["reads"] - matching,
                      counts["copies"] - matching, "yes" if counts["late reads"] else "no")  # matches are copied back
    if arguments.variant is None:
        bytes_of_sampling(result)
    result.save()


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write, if nothing stays in a cache."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NOTHING:
            leaves = tree_leaves((args, kwargs, found))
            self.count += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return found


def bytes_of_sampling(result: Result) -> None:
    """The pixel decoder's deformable attention at 512 pixels, one image: three levels, 16 heads of 16, 4 points."""
    shapes, heads, width, points = [(16, 16), (32, 32), (64, 64)], 16, 16, 4
    tokens = sum(rows * columns for rows, columns in shapes)
    value = torch.randn(1, tokens, heads, width, requires_grad=True)
    locations = torch.rand(1, tokens, heads, len(shapes), points, 2, requires_grad=True)
    weights = torch.rand(1, tokens, heads, len(shapes), points, requires_grad=True)
    with Bytes() as forward:
        found = deformable_sampling(value, shapes, locations, weights)
    with Bytes() as backward:
        found.backward(torch.ones_like(found))
    inputs, out = value.nbytes + locations.nbytes + weights.nbytes, found.nbytes
    gathered = 4 * len(shapes) * points * value.nbytes  # four corners of each point, of as many queries as tokens
    launches = len(shapes)
    kernel = {"forward": (inputs + 2 * launches * out, gathered),  # each launch adds one level to the output
              "backward": (inputs + launches * out + inputs, 3 * gathered)}  # reads, and adds to, every corner
    table = result.table(f"Deformable attention of {tokens} queries: MB read and written", "pass", "torch's operators",
                         "Triton kernels, each tensor once", "of corners, if none stays in a cache")
    for name, counter in (("forward", forward), ("backward", backward)):
        once, corners = kernel[name]
        table.row(name, counter.count / 1e6, once / 1e6, corners / 1e6)


def made_shards(folder: Path) -> Path:
    """Scenes of a few classes."""
    from preprocess.config import PreprocessConfig
    from preprocess.make_scenes import write_scenes
    from preprocess.pairs import open_dataset
    from preprocess.pipeline import write_shards
    from shards.cli.config_file import load_config

    write_scenes(folder / "scenes", {"train": 6, "val": 2}, seed=0)
    config = load_config(PreprocessConfig, None, [
        "dataset.kind=folder", f"dataset.root={folder / 'scenes'}", f"output={folder / 'set'}", "crops.size=64",
        "crops.per_image=2", "workers=0"])
    write_shards(config, open_dataset(config.dataset, config.on_error))
    return folder / "set"


def counted(head: str, shards: Path, folder: Path) -> Counter[str]:
    """What one step of this head does."""
    recipe = REPOSITORY / "configs" / f"config-ade20k-{head}-training.yaml"
    config = load_run_config(recipe, [f"data.root={shards}", f"output_dir={folder}", *NARROW, *HEADS[head]])
    operators = Operators()
    reads, at_start = Reads(operators), list[Counter[str]]()
    real_step = loop.train_step

    def step(run: Any, batches: Sequence[Any]) -> Any:
        at_start.append(operators.counts.copy())
        if len(at_start) > COUNTED:
            raise Counted
        return real_step(run, batches)

    real_loader = loop.train_loader

    def loader(*given: Any) -> Iterator[Any]:
        batches = real_loader(*given)
        while True:
            operators.is_loading = True
            batch = next(batches)
            operators.is_loading = False
            yield batch

    with as_on_cuda(operators, reads), patch.object(loop, "train_step", step), \
            patch.object(loop, "train_loader", loader), suppress(Counted), operators, reads:
        loop.train(config, DistContext(rank=0, world_size=1, device=torch.device("cpu")))
    return at_start[COUNTED] - at_start[COUNTED - 1]


@contextmanager
def as_on_cuda(operators: Operators, reads: Reads) -> Iterator[None]:
    """The operators of CUDA: fused or, before, in lists; and reads of numbers that arrived a step ago apart."""

    def within(name: str, function: Any, *given: Any, **more: Any) -> Any:
        operators.within.append(name)
        try:
            return function(*given, **more)
        finally:
            operators.within.pop()

    has_fused = hasattr(optimizer, "FUSED_ON")
    build, clip = optimizer.build_optimizer, torch.nn.utils.clip_grad_norm_

    def build_in_lists(*given: Any) -> Any:
        built = build(*given)
        for group in built.param_groups:
            group["foreach"] = None if has_fused else True
        return built

    with patch.object(cpu_kernels, "serve", lambda values: False), \
            patch.object(torch.nn.utils, "clip_grad_norm_", partial(within, "update", partial(clip, foreach=True))), \
            patch.object(torch.optim.AdamW, "step", (lambda real: lambda self, *given: within(
                "update", real, self, *given))(torch.optim.AdamW.step)), \
            patch("trainer.run.run.build_optimizer", build_in_lists), \
            patch.object(optimizer, "FUSED_ON", ("cpu",), create=True), late_reads(reads):
        yield


@contextmanager
def late_reads(reads: Reads) -> Iterator[None]:
    """Count what `HostNumbers` reads as read late: none of these steps is read at once."""
    try:
        from trainer.run.step_result import HostNumbers
    except ImportError:  # an earlier commit
        yield
        return
    real = HostNumbers.read

    def read(self: HostNumbers) -> list[float]:
        reads.is_late = True
        found = real(self)
        reads.is_late = False
        return found

    with patch.object(HostNumbers, "read", read):
        yield


if __name__ == "__main__":
    main()
