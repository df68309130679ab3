"""ONNX files compute the model's scores in onnxruntime: every head, both families of ViTs, images of any size."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import ConfigError
from shards.manifest import ClassInfo, class_table
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import ALONE, EOMT, PMT, TINY, run_program, tiny
from tests.unit.test_trainer_models_backbones_dinov2 import vit
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.evaluation.predictor import Predictor
from trainer.exporting import onnx_model
from trainer.exporting.files import ExportError
from trainer.exporting.onnx_model import AnySizeGraph, check_installed, write_onnx
from trainer.exporting.program import InferenceGraph
from trainer.loop import train
from trainer.pretrained import Pretrained, load_pretrained

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra: onnx)")
onnx_ir = pytest.importorskip("onnx_ir", reason="onnxscript is not installed (extra: onnx)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")

CLASSES = [ClassInfo(name=name, color=(number, 0, 255)) for number, name in enumerate(("road", "été", 'a "b"', "sky"))]
HEADS = {"m2f": (), "linear": ("decoder_head.type=linear",), "eomt": EOMT, "pmt": PMT}
PLACES = (str(REPOSITORY), sys.prefix, "/tmp", "pkg.torch")


class Written(NamedTuple):
    """A model and its ONNX file."""

    pretrained: Pretrained
    folder: Path
    said: str

    def session(self) -> Any:
        return onnxruntime.InferenceSession(self.folder / "model.onnx", providers=["CPUExecutionProvider"])


def random_model(folder: Path, *settings: str, registers: int | None = None) -> Pretrained:
    """A DINOv3, or a DINOv2 with so many registers, and a head; every weight far from its default."""
    if registers is not None:
        vit(registers).save_pretrained(folder / "vit")
        settings = (*settings, f"backbone.source={folder / 'vit'}", "backbone.random.hidden_size=null")
    config = load_run_config(TINY, settings)
    torch.manual_seed(0)
    model = build_model(config, len(CLASSES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Pretrained(model=model.eval(), config=config, classes=CLASSES)


CASES = {
    "dinov3-m2f": (HEADS["m2f"], None), "dinov3-linear": (HEADS["linear"], None), "dinov3-eomt": (HEADS["eomt"], None),
    "dinov3-pmt": (HEADS["pmt"], None), "dinov2-m2f": (HEADS["m2f"], 0),
    "dinov2-linear": ((*HEADS["linear"], "backbone.patch_resize=image"), 4), "dinov2-eomt": (HEADS["eomt"], 4),
    "dinov2-pmt": ((*HEADS["pmt"], "backbone.patch_resize=image"), 0),
}
# One or two minutes each; `make stress` exports them too.
MINUTES = ("dinov3-m2f", "dinov3-eomt", "dinov3-pmt", "dinov2-m2f", "dinov2-eomt", "dinov2-pmt")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Writes each of CASES once."""

    @functools.cache
    def write(name: str) -> Written:
        folder = tmp_path_factory.mktemp(name)
        settings, registers = CASES[name]
        pretrained = random_model(folder, *settings, registers=registers)
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_model.tqdm, "write", lines.append)
            assert write_onnx(pretrained, folder / "out") == [folder / "out/model.onnx"]
        return Written(pretrained, folder / "out", "\n".join(lines))

    return write


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.stress) if name in MINUTES else name
                                        for name in CASES])
def exported(request: pytest.FixtureRequest, case: Callable[[str], Written]) -> Written:
    return case(request.param)


@pytest.fixture
def linear(case: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    """A model whose graph is built already."""
    written = case("dinov3-linear")
    monkeypatch.setattr(onnx_model, "onnx_model", lambda _: onnx_ir.load(written.folder / "model.onnx"))
    return written.pretrained


def pixels(*size: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def assert_same_scores(session: Any, pretrained: Pretrained, *size: int,
                       graph: Callable[[Pretrained], torch.nn.Module] = AnySizeGraph) -> None:
    """For one of three images: in masked attention, rounding can decide whether a position is masked."""
    differences = []
    for seed in range(3):
        images = pixels(*size, seed=seed)
        with torch.no_grad():
            expected = graph(pretrained)(images)
        (found,) = session.run(None, {"images": images.numpy()})
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert float(expected.std()) > 1e-3, "the comparison says something"
        differences.append(float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
        if differences[-1] < 2e-5:
            return
    pytest.fail(f"relative differences {differences} at {size}")


@pytest.mark.slow
def test_onnxruntime_computes_the_models_scores_at_any_size(exported: Written) -> None:
    """Sizes and batches that neither the trace nor the writer's own check used."""
    session = exported.session()
    for size in ((3, 3, 128, 96), (1, 3, 192, 64), (1, 3, 47, 33), (2, 3, 129, 65), (1, 3, 1, 1), (4, 3, 16, 96)):
        assert_same_scores(session, exported.pretrained, *size)
    assert_same_scores(session, exported.pretrained, 2, 3, 64, 160, graph=InferenceGraph)
    said = re.fullmatch(r".*model\.onnx: scores .* at most (.*) \(largest score .*; sizes 1x3x64x96, 2x3x101x70, "
                        r"1x3x20x205\)", exported.said)
    assert said is not None and float(said[1]) < 1e-4


@pytest.mark.slow
def test_an_odd_image_is_padded_as_evaluation_pads_it(exported: Written) -> None:
    whole = load_run_config(TINY, ["eval.mode=whole"]).eval
    config = exported.pretrained.config.__class__(**{**vars(exported.pretrained.config), "eval": whole})
    image = pixels(1, 3, 45, 71)
    (scores,) = exported.session().run(None, {"images": image.numpy()})
    expected = Predictor(exported.pretrained.model, config, len(CLASSES), torch.device("cpu"))(image[0])
    assert np.array_equal(scores[0].argmax(0), expected.numpy())


@pytest.mark.slow
def test_the_file_describes_itself_and_holds_standard_operators_only(exported: Written) -> None:
    path = exported.folder / "model.onnx"
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"GridSample", "SplitToSequence", "Loop", "If", "CastLike"}
    assert ("Gather" in operators) or exported.pretrained.config.decoder_head.type != "m2f"
    (images,), (scores,) = exported.session().get_inputs(), exported.session().get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, "height", "width"])
    assert (scores.name, scores.type, scores.shape) == ("scores", "tensor(float)", ["batch", 4, "height", "width"])
    found = exported.session().get_modelmeta().custom_metadata_map
    head = exported.pretrained.config.decoder_head
    assert json.loads(found["classes"]) == class_table(CLASSES) and json.loads(found["ignore_index"]) == 255
    assert json.loads(found["image_mean"]) == [0.485, 0.456, 0.406] and len(json.loads(found["image_std"])) == 3
    assert json.loads(found["size_divisor"]) == head.size_divisor and json.loads(found["head"]) == head.type
    assert found["maskstream"] == "0.1.0" and "inside the graph" in found["input"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("model.onnx.sha256").read_text() == f"{digest}  model.onnx\n"
    assert sorted(item.name for item in exported.folder.iterdir()) == ["model.onnx", "model.onnx.sha256"]
    for place in PLACES:
        assert place.encode() not in path.read_bytes(), f"names {place}"


@pytest.mark.slow
def test_large_weights_are_in_a_file_of_their_own(linear: Pretrained, tmp_path: Path) -> None:
    """As those of more than 2 GB have to be."""
    paths = write_onnx(linear, tmp_path / "out", largest_file=1000)
    assert [path.name for path in paths] == ["model.onnx.data", "model.onnx"], "the graph last: it needs the weights"
    assert paths[0].stat().st_size > 100_000 > paths[1].stat().st_size
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.onnx", "model.onnx.data", "model.onnx.data.sha256", "model.onnx.sha256"]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert_same_scores(Written(linear, moved, "").session(), linear, 1, 3, 50, 70)


@pytest.mark.slow
def test_a_wrong_graph_is_not_written(linear: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = random_model(tmp_path, *HEADS["linear"], "backbone.random.seed=1")
    with torch.no_grad():
        next(other.model.head.parameters()).mul_(1.01)
    with pytest.raises(ExportError, match=r"scores of model\.onnx in onnxruntime differ from the model's by .* for "
                                          r"images \(1, 3, 64, 96\), legal: at most .*; nothing was written"):
        write_onnx(other, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(onnx_model, "_UNWANTED", {"Conv", "Loop"})
    with pytest.raises(ExportError, match="holds the operators Conv, legal: those of the standard domain except Conv"):
        write_onnx(linear, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "is_written"), [(2, True), (3, False)])
def test_rounding_may_decide_a_mask_in_one_image_but_not_in_all(
    wrong: int, is_written: bool, linear: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first `wrong` comparisons fail, of three images."""
    forward, calls = AnySizeGraph.forward, itertools.count()
    monkeypatch.setattr(AnySizeGraph, "forward",
                        lambda graph, images: forward(graph, images) + (next(calls) < wrong))
    if is_written:
        assert write_onnx(linear, tmp_path / "out") == [tmp_path / "out/model.onnx"]
    else:
        with pytest.raises(ExportError, match="differ from the model's"):
            write_onnx(linear, tmp_path / "out")


def test_without_the_extra_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_LIBRARIES", ("onnx", "no_such_library"))
    with pytest.raises(ConfigError, match=r"^--formats onnx needs no_such_library: run pip install 'masks"):
        check_installed()


@pytest.mark.slow
def test_the_documented_program_needs_no_torch(scene_shards: Path, scenes: Path, tmp_path: Path) -> None:
    """`--format onnx` of a trained run, then the example of docs/export.md as it stands there."""
    train(tiny(scene_shards, tmp_path / "run", *HEADS["linear"], "train.total_steps=2", "eval.mode=whole"), ALONE)
    checkpoint = tmp_path / "run/checkpoints/best.pt"
    result = run_program("trainer/export.py", "--checkpoint", checkpoint, "--output", tmp_path / "exported",
                         "--format", "onnx")
    assert result.returncode == 0, result.stderr
    assert re.search(r"model\.onnx: scores in onnxruntime differ from the model's by at most \S+e-\d+ ", result.stdout)
    assert re.search(r"model\.onnx: 0\.\d MB", result.stdout)
    image = next((scenes / "images/val").iterdir())
    (text,) = re.findall(r"```python\n(import json\n.*?)```", (REPOSITORY / "docs/export.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 12
    text, count = re.subn(r'"scenes/images/val/.*?"', repr(str(image)), text)
    assert count == 1
    text += "import sys\nassert not {'torch', 'trainer', 'shards'} & set(sys.modules)\nnp.save('found', label_map)\n"
    subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path)
    expected = load_pretrained(checkpoint).predict(image).label_map
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)
    with Image.open(image) as picture:
        assert expected.shape == (picture.height, picture.width)
