"""Memory is estimated as it is measured, on the CPU: by torch's profiler, which sees what its allocator hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, Dinov2Model

from shards.errors import ConfigError
from tests.conftest import make_shards
from tests.support.training_run import TINY
from tests.support.zygote import call_on_ranks
from trainer import train
from trainer.config import RunConfig, load_run_config
from trainer.distributed import DistContext, distributed
from trainer.loop import train_step
from trainer.memory.estimate import HEADROOM, MemoryModel, described
from trainer.memory.simulation import Samples
from trainer.memory.tracking import AllocationTracker
from trainer.models import fsdp
from trainer.models.backbones.dinov3_keys import RELEASED_VITS, VitArchitecture
from trainer.models.backbones.sizes import known_sizes
from trainer.models.fsdp import own_part
from trainer.precision import store_for_autocast
from trainer.run.run import Run, build_run, run_places

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
TOLERANCE = 0.15
LINEAR, PMT = ("decoder_head.type=linear",), ("decoder_head.type=pmt", "decoder_head.block_ffn=128")
EOMT = ("decoder_head.type=eomt", "decoder_head.num_blocks=2", "backbone.trainable=true")
CASES = {
    "m2f, bf16": ("train.precision=bf16",), "linear": LINEAR,
    "linear, trained, bf16": (*LINEAR, "backbone.trainable=true", "train.precision=bf16"),
    "pmt, recomputed": (*PMT, "train.gradient_checkpointing=true", "train.ema_decay=0.9"), "eomt": EOMT,
    "eomt, dense, four images": (*EOMT, "data.targets=dense", "train.micro_batch_size=4", "train.global_batch_size=4"),
}


@pytest.fixture(scope="module")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("large") / "set", scenes, "crops.size=128", "crops.per_image=1")


def configured(root: Path, folder: Path, *settings: str) -> RunConfig:
    return load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", "device=cpu",
                                  "train.global_batch_size=2", *settings])


def measured(run: Run) -> int:
    """Bytes that a step allocates at most at a time, beside what is there before it."""
    batches = [run.crops[0]]
    train_step(run, batches)  # the optimiser's moments are made
    run.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(run, batches)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    used = peak = 0
    for _, change in memory:
        used += change
        peak = max(peak, used)
    return peak


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_a_step_needs(shards: Path, tmp_path: Path, case: str) -> None:
    config = configured(shards, tmp_path, *CASES[case])
    run = build_run(config, ALONE, run_places(config))
    store_for_autocast(run.model, config, ALONE.device)
    counts, size = run.crops[0].counts, run.crops[0].images.shape[2:]
    model = MemoryModel(config, Samples(height=size[0], width=size[1], classes=run.manifest.num_classes,
                                        ignore_index=run.manifest.ignore_index, targets=max(counts)))
    parts = dict(model.estimate(len(counts)).parts)
    peak = measured(run)  # without the batch, which is there before
    moments = [value for state in run.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert parts.pop("optimiser state") == sum(value.nbytes for value in moments)
    assert parts.pop("frozen ViT") + parts.pop("trained weights") == sum(
        tensor.nbytes for tensor in [*run.model.parameters(), *run.model.buffers()])
    averages = 0 if run.averaged is None else sum(tensor.nbytes for tensor in run.averaged._averages)
    assert parts.pop("averaged weights", 0) == averages
    batch = run.crops[0]
    assert parts.pop("batch") == pytest.approx(sum(
        tensor.nbytes for tensor in (batch.images, batch.segment_maps, *(batch.masks or ()), batch.photometric)
        if tensor is not None), rel=0.1)
    assert set(parts) == {"activations", "loss", "gradients"}
    assert sum(parts.values()) == pytest.approx(peak, rel=TOLERANCE)


SHARDED = (*EOMT, "train.fsdp=true", "train.ema_decay=0.9", "train.global_batch_size=4", "train.precision=bf16",
           "decoder_head.num_upscale_blocks=1", "train.gradient_checkpointing=true",
           "backbone.random.hidden_size=128", "backbone.random.intermediate_size=1024")  # weights, above all


def _measure_on_rank(rank: int, root: str, folder: str) -> None:
    fsdp.SMALLEST_LAYER = 100_000  # a block has more
    with distributed("cpu") as context:
        config = configured(Path(root), Path(folder), *SHARDED)
        run = build_run(config, context, run_places(config))
        batch = run.crops[rank]
        model = MemoryModel(config, Samples(
            height=128, width=128, classes=run.manifest.num_classes, ignore_index=run.manifest.ignore_index,
            targets=max(batch.counts)), context.world_size)
        parts = dict(model.estimate(2).parts)
        peak = measured(run)
    moments = [own_part(value) for state in run.optimizer.state.values() for name, value in state.items()
               if name != "step"]
    assert parts.pop("optimiser state") == pytest.approx(sum(part.nbytes for part in moments), rel=0.02)
    kept = sum(own_part(tensor).nbytes for tensor in [*run.model.parameters(), *run.model.buffers()])
    assert parts.pop("frozen ViT") + parts.pop("trained weights") == pytest.approx(kept, rel=0.02)
    assert run.averaged is not None
    averages = sum(tensor.nbytes for tensor in run.averaged._averages)
    assert parts.pop("averaged weights") == pytest.approx(averages, rel=0.02)
    del parts["batch"]
    assert set(parts) == {"activations", "loss", "gradients", "gathered weights"}
    assert sum(parts.values()) == pytest.approx(peak, rel=TOLERANCE)


def test_the_estimate_is_what_each_of_two_ranks_needs(shards: Path, tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(shards), str(tmp_path))


def samples(**changed: Any) -> Samples:
    return Samples(**{"height": 64, "width": 64, "classes": 5, "ignore_index": 255, "targets": 3, **changed})


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    model = MemoryModel(load_run_config(TINY, list(LINEAR)), samples())
    for batch_size in (1, 11):
        needed = [model.estimate(size).total / (1 - HEADROOM) for size in (batch_size, batch_size + 1)]
        assert model.largest_batch(sum(needed) / 2) == batch_size
    assert model.largest_batch(1000.0) == 0


def test_the_largest_batch_divides_by_ranks() -> None:
    config = load_run_config(TINY, [*LINEAR, "train.global_batch_size=24"])
    for ranks, fitting in ((1, 24), (2, 12), (3, 8), (8, 3)):
        lines = described(config, samples(), 8e9, ranks)
        assert f"train.micro_batch_size={fitting} divides train.global_batch_size (24" in lines[-1]


def test_sharing_frees_casts_that_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast would keep a bf16 copy of all weights on every rank until the end of the forward pass."""
    monkeypatch.setattr(fsdp, "SMALLEST_LAYER", 100_000)
    settings = (*LINEAR, "backbone.trainable=true", "train.fsdp=true", "train.gradient_checkpointing=true",
                "backbone.random.hidden_size=256", "backbone.random.num_hidden_layers=12")
    bf16, fp32 = (MemoryModel(load_run_config(TINY, [*settings, f"train.precision={precision}"]), samples(), 8)
                  .estimate(1).total for precision in ("bf16", "fp32"))
    assert bf16 < 1.05 * fp32


@pytest.mark.parametrize("arguments", [["--dry-run", "--gpus", "0"], ["--dry-run", "--memory-gb", "nan"],
                                       ["--dry-run", "--memory-gb", "-5"], ["--gpus", "8"]])
def test_sizes_of_machines_that_do_not_exist(arguments: list[str], capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert "invalid positive" in (said := capsys.readouterr().err) or "need --dry-run" in said


def test_the_7b_vit_is_estimated_without_its_weights() -> None:
    """In bf16; alone they have 13 GB. On a GPU, a batch comes with the next, and gradients are kept."""
    config = load_run_config(None, ["backbone.source=facebook/dinov3-vit7b16-pretrain-lvd1689m", *LINEAR,
                                    "backbone.layers=LAST", "train.ema_decay=0.9"])
    parts = MemoryModel(config, samples(height=512, width=512, classes=150)).estimate(2).parts
    trained = 4 * (4096 * 150 + 150 + 2 * 4096)
    assert parts["frozen ViT"] == pytest.approx(2 * 6.716e9, rel=1e-3)
    assert parts["gradients"] == pytest.approx(trained, rel=1e-3)
    assert parts["trained weights"] == pytest.approx(trained, rel=0.05)  # and batch norm's statistics
    assert parts["averaged weights"] == pytest.approx(trained, rel=0.05)
    assert parts["batch"] == pytest.approx(2 * 2 * 4 * 512 * 512, rel=1e-3)


def test_a_7b_vit_can_be_trained_by_eight_gpus_that_share_it() -> None:
    config = load_run_config(None, ["backbone.source=facebook/dinov3-vit7b16-pretrain-lvd1689m", *EOMT,
                                    "train.fsdp=true", "train.global_batch_size=64"])
    one, eight = (MemoryModel(config, samples(height=512, width=512), ranks).estimate(1).parts for ranks in (1, 8))
    for part in ("trained weights", "optimiser state", "gradients"):
        assert eight[part] == pytest.approx(one[part] / 8, rel=1e-3)
    assert one["trained weights"] == pytest.approx(4 * 6.9e9, rel=0.02)
    assert eight["gathered weights"] < one["trained weights"] / 10
    assert "gathered weights" not in one


def test_sizes_are_told_without_reading_weights(tmp_path: Path) -> None:
    for source, expected in (
            ("facebook/dinov3-vits16plus-pretrain-lvd1689m", RELEASED_VITS["vits16plus"]),
            ("/nowhere/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", RELEASED_VITS["vitl16"]),
            ("facebook/dinov2-with-registers-giant", VitArchitecture(1536, 40, 24, 4096, gated=True, registers=0)),
            ("facebook/dinov2-small", VitArchitecture(384, 12, 6, 1536, registers=0))):
        assert known_sizes(load_run_config(None, [f"backbone.source={source}"]).backbone) == expected, source
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=3,
                             use_swiglu_ffn=True)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/model.safetensors").unlink()
    config = load_run_config(None, [f"backbone.source={tmp_path / 'vit'}"])
    assert known_sizes(config.backbone) == VitArchitecture(32, 3, 2, 64, gated=True, registers=0)
    with pytest.raises(ConfigError, match="its name tells no size"):
        known_sizes(load_run_config(None, ["backbone.source=some/model"]).backbone)


def test_a_dry_run_tells_the_memory(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_run_config(TINY, [f"data.root={shards}", f"output_dir={tmp_path}", *LINEAR])
    train._dry_run(config, memory_gb=0.1)
    said = capsys.readouterr().out
    assert "memory per GPU, estimated for micro-batches of 2 in bf16" in said
    assert " masks in each of 128x128 pixels: 0.0" in said and "CUDA itself comes on top" in said
    assert "within 0.1 GB, of which a tenth is left free: " in said
    assert "train.micro_batch_size=4 divides train.global_batch_size (4)" in said
    config = load_run_config(TINY, [f"data.root={shards}", f"output_dir={tmp_path}", "backbone.source=some/model",
                                    "backbone.random.hidden_size=null"])
    train._dry_run(config)
    assert "memory is not estimated: backbone.source some/model is not on this machine" in capsys.readouterr().out


def test_the_tracker_sees_what_is_alive_and_for_what() -> None:
    weight = torch.zeros(100)
    with AllocationTracker([weight]) as tracker:
        with tracker.phase("one"):
            kept = weight.view(10, 10) + 1  # 400 bytes; a view of what was there before is nothing new
        with tracker.phase("two"):
            large = torch.zeros(1000)
            view = large[:10]
            del large
            small = view + 1
            del view
            _ = torch.zeros(50)
        tracker.attribute([small], "three")
    del kept
    assert tracker.peaks() == {"one": {"one": 400, "two": 0, "three": 0}, "two": {"one": 400, "two": 4000, "three": 40}}
