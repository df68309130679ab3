"""trainer/predict.py: everything it takes, everything it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from shards.errors import ConfigError, CorruptShardError, RunError, StorageError
from shards.files.storage import open_storage
from tests.conftest import REPOSITORY
from tests.support.file_server import file_server
from tests.support.zygote import Forked, run_forked
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.predict import main
from trainer.predicting import inputs, rasters
from trainer.predicting.inputs import Source, decode_input, decoded_ahead, sources_of
from trainer.predicting.outputs import Outputs
from trainer.pretrained import Pretrained, load_pretrained

TINY = REPOSITORY / "tests" / "support" / "tiny.yaml"
RECORD = "predicted-with.json"
Pixels = npt.NDArray[Any]
Predict = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    overrides = [f"data.root={scene_shards}", f"output_dir={run}", "decoder_head.type=linear", "train.total_steps=20",
                 "train.checkpoint_every=20", "optimizer.lr=1e-2"]
    train(load_run_config(TINY, overrides), DistContext(rank=0, world_size=1, device=torch.device("cpu")))
    return run / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Pretrained:
    return load_pretrained(checkpoint)


@pytest.fixture
def predict(checkpoint: Path, tmp_path: Path) -> Predict:
    """`predict(*arguments)`: in this process, into `tmp_path / "out"`."""

    def call(*arguments: object, output: Path = tmp_path / "out") -> int:
        words = ["predict.py", "--checkpoint", checkpoint, "--output", output, *arguments]
        with patch.object(sys, "argv", list(map(str, words))):
            return main()

    return call


@pytest.fixture(scope="module")
def pictures(scenes: Path) -> list[Pixels]:
    """Photographs-to-be of different sizes, with several classes."""
    images = [np.asarray(Image.open(path)) for path in sorted((scenes / "images/val").iterdir())]
    small = np.ascontiguousarray(images[2][::2, ::2][:64, :64])
    return [images[0], images[1][:90, :150], small, np.tile(images[3], (2, 3, 1))[:200, :333]]


def save(path: Path, pixels: Pixels, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def ids_in(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def of(*stems: str) -> set[str]:
    return {RECORD} | {f"{stem}{end}" for stem in stems for end in (".png", "-overlay.png")}


def test_the_model_tells_classes_apart(model: Pretrained, pictures: list[Pixels]) -> None:
    """Otherwise all comparisons below would mean nothing."""
    assert all(len(np.unique(model.predict(pixels).label_map)) >= 2 for pixels in pictures)


# -- what it is given --------------------------------------------------------------------------------------------------


def test_folders_keep_their_sub_folders(predict: Predict, model: Pretrained, pictures: list[Pixels],
                                        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"one.png": 0, "sub/one.PNG": 1, "sub/deep/two.x.png": 2}
    for name, number in files.items():
        save(tmp_path / "in" / name, pictures[number])
    for name in ("notes.txt", ".hidden.png", ".cache/three.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no picture")
    assert predict(tmp_path / "in") == 0
    assert "3 predictions written to" in capsys.readouterr().out
    assert names_in(tmp_path / "out") == of("one", "sub/one", "sub/deep/two.x")
    for name, number in files.items():
        found = ids_in((tmp_path / "out" / name).with_suffix(".png"))
        assert np.array_equal(found, model.predict(pictures[number]).label_map)


def test_a_glob_and_a_list_and_twice_the_same(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/x.png", "b/x.png", "b/y.png", "b/c/z.jpg"):
        save(tmp_path / "in" / name, pictures[2])
    monkeypatch.chdir(tmp_path)
    assert predict(tmp_path / "in/**/[xz].*", output=tmp_path / "one") == 0
    assert names_in(tmp_path / "one") == of("a/x", "b/x", "b/c/z")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfin/b/y.png\r\n\r\nin/b/c\r\n")
    assert predict("--list", "list.txt", "in/b/y.png", tmp_path / "in/b/y.png", output=Path("two")) == 0
    assert names_in(tmp_path / "two") == of("y", "z")
    assert "2 predictions written to two" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "message"), [
    ([], "nothing to predict"), ([""], "name is empty"), (["in"], "contains no image or video, legal suffixes: .jpg"),
    (["in/*.png"], r"in/\*\.png contains no image"), (["in/a**/b.png"], "not a legal glob"),
    (["eval.mode=whole"], "use --set eval.mode=whole"), (["--list", "no.txt"], "no.txt cannot be read"),
    (["--list", "empty.txt"], "empty.txt is empty"), (["https://127.0.0.1:9/x/"], "cannot be listed"),
    (["in/*/../../up.png"], "would lead out of the output folder"), (["ftp://host/a.png"], "not a supported location"),
])
def test_what_is_no_image_is_refused_at_once(given: list[str], message: str, predict: Predict, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("empty.txt", "in/notes.txt", "up.png"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        predict(*given)
    assert not (tmp_path / "out").exists()


def test_a_name_with_an_equals_sign_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                predict: Predict, pictures: list[Pixels]) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "date=2024/a.png", pictures[2])
    assert predict("date=2024/*.png") == 0


def test_predictions_in_a_sub_folder_are_not_predicted_again(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in/a.jpg", pictures[2])
    for _ in range(2):
        assert predict(tmp_path / "in", output=tmp_path / "in/sub/out") == 0
    assert names_in(tmp_path / "in/sub/out") == of("a")
    assert "0 predictions written to" in capsys.readouterr().out


def test_object_storage_folder_object_and_raster(predict: Predict, model: Pretrained, pictures: list[Pixels],
                                                 s3_root: str, tmp_path: Path) -> None:
    storage = open_storage(s3_root)
    for name, number in (("a.png", 0), ("deep/er/b.png", 1), ("deep/.c.png", 2)):
        storage.write(name, save(tmp_path / "file.png", pictures[number]).read_bytes())
    storage.write("geo/g.tif", geotiff(tmp_path / "file.tif", pictures[2]).read_bytes())
    assert predict(f"{s3_root}/deep", f"{s3_root}/a.png", f"{s3_root}/geo/", f"{s3_root}/a.png") == 0
    assert names_in(tmp_path / "out") == of("a", "er/b", "g") - {"g.png"} | {"g.tif"}
    assert np.array_equal(ids_in(tmp_path / "out/er/b.png"), model.predict(pictures[1]).label_map)
    assert np.array_equal(ids_in(tmp_path / "out/g.tif"), model.predict(pictures[2]).label_map)
    with pytest.raises(ConfigError, match="contains no image"):
        predict(f"{s3_root}/nothing")


def test_a_web_address_with_a_query_and_escapes(tmp_path: Path, pictures: list[Pixels], predict: Predict) -> None:
    with file_server(save(tmp_path / "a.png", pictures[2]).read_bytes()) as server:
        assert predict(f"{server.address}/dir/my%20photo.png?signature=secret") == 0
        assert any(path.startswith("/dir/my%20photo.png?signature=secret") for path in server.paths)
    assert names_in(tmp_path / "out") == of("my photo")


@pytest.mark.parametrize("name", ["x.webp", "x.bmp", "x.tif", "x.jpg", "grey.tif", "grey.png", "palette.bmp"])
def test_formats(name: str, model: Pretrained, pictures: list[Pixels], predict: Predict, tmp_path: Path) -> None:
    picture = Image.fromarray(pictures[1])
    if name.startswith("grey"):
        picture = picture.convert("L")
    if name.startswith("palette"):
        picture = picture.quantize(16)
    picture.save(tmp_path / name, lossless=True)
    assert predict(tmp_path / name) == 0
    with Image.open(tmp_path / name) as image:
        expected = model.predict(np.asarray(image.convert("RGB"))).label_map
    assert np.array_equal(ids_in(tmp_path / "out" / f"{Path(name).stem}.png"), expected)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation_is_honoured(suffix: str, predict: Predict, model: Pretrained, pictures: list[Pixels],
                                      tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / f"x{suffix}", pictures[1], exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    assert predict(tmp_path / f"x{suffix}") == 0
    with Image.open(tmp_path / f"x{suffix}") as image:
        stored = np.asarray(image) if suffix != ".tif" else pictures[1]  # Pillow turns TIFFs itself
    expected = model.predict(np.ascontiguousarray(np.rot90(stored, -1))).label_map
    assert np.array_equal(ids_in(tmp_path / "out/x.png"), expected)


@pytest.mark.parametrize("kind", ["grey.png", "rgb.tif", "grey.tif"])
def test_sixteen_bits_are_refused(kind: str, predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    import tifffile

    wide = pictures[2].astype(np.uint16) * 257
    if kind.endswith("tif"):
        tifffile.imwrite(tmp_path / kind, wide if kind == "rgb.tif" else wide[..., 0])
    else:
        Image.fromarray(wide[..., 0]).save(tmp_path / kind)
    with pytest.raises(CorruptShardError, match=r"convert it"):
        predict(tmp_path / kind)
    with pytest.raises(CorruptShardError, match=r"16 bits|convert it to 8"):
        decode_input((tmp_path / kind).read_bytes(), kind)


# -- what it writes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["--set", "eval.tta_flip=true", "--set", "eval.resize_short_side=80"]])
def test_a_batch_of_mixed_sizes_equals_each_alone(overrides: list[str], predict: Predict, pictures: list[Pixels],
                                                  tmp_path: Path) -> None:
    files = [save(tmp_path / "in" / f"{number}.png", pixels) for number, pixels in enumerate(pictures)]
    options = ("--save", "ids", "confidence", *overrides)
    assert predict(*files, *options, "--set", "eval.window_batch=3", output=tmp_path / "together") == 0
    for path in files:
        assert predict(path, *options, "--set", "eval.window_batch=1", output=tmp_path / "alone") == 0
        assert np.array_equal(ids_in(tmp_path / "together" / path.name), ids_in(tmp_path / "alone" / path.name))
        ours, theirs = (ids_in(tmp_path / name / f"{path.stem}-confidence.png").astype(int)
                        for name in ("together", "alone"))
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_every_kind_holds_the_prediction(predict: Predict, model: Pretrained, pictures: list[Pixels],
                                         tmp_path: Path) -> None:
    pixels = pictures[3]
    path = save(tmp_path / "in/a.png", pixels)
    assert predict(path, "--save", "ids", "overlay", "confidence", "probabilities", "rle") == 0
    assert names_in(tmp_path / "out") == of("a") | {"a-confidence.png", "a-probabilities.npz", "a-rle.json"}
    expected = model.predict(pixels, "confidence")
    with Image.open(tmp_path / "out/a.png") as ids:
        assert ids.mode == "P" and ids.size == (333, 200)
        palette = np.reshape(ids.getpalette(), (-1, 3))
        assert np.array_equal(np.asarray(ids), expected.label_map)
    assert palette[: len(model.classes)].tolist() == [list(info.color) for info in model.classes]
    with Image.open(tmp_path / "out/a-overlay.png") as overlay:
        shown = np.asarray(overlay)
        assert 333 < overlay.width < 2 * 333 + 100
    flat = np.asarray(expected.overlay())
    assert any(np.array_equal(shown[top : top + 200, left : left + 333], flat)
               for top in range(40) for left in range(40)), "the overlay is not in the sheet at its own size"
    assert expected.confidence is not None
    assert np.array_equal(ids_in(tmp_path / "out/a-confidence.png"), np.round(255 * expected.confidence))
    with np.load(tmp_path / "out/a-probabilities.npz") as file:
        probabilities = file["probabilities"]
    assert probabilities.dtype == np.float16 and probabilities.shape == (len(model.classes), 200, 333)
    np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=3e-3)
    chosen = np.take_along_axis(probabilities, expected.label_map[None].astype(int), 0)[0]
    assert (chosen == probabilities.max(0)).all()
    found = json.loads((tmp_path / "out/a-rle.json").read_text())
    assert sorted(entry["category_id"] for entry in found) == np.unique(expected.label_map).tolist()
    for entry in found:
        mask = coco.decode(entry["segmentation"]).astype(bool)
        assert np.array_equal(mask, expected.mask(entry["category_id"])) and entry["area"] == mask.sum()
        assert entry["category"] == model.classes[entry["category_id"]].name
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["classes"] == {str(number): info.name for number, info in enumerate(model.classes)}


def test_only_what_is_asked_for_is_written(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    path = save(tmp_path / "in/a.png", pictures[2])
    assert predict(path, "--save", "rle") == 0
    assert names_in(tmp_path / "out") == {RECORD, "a-rle.json"}
    assert predict(path, "--save", "confidence", "rle") == 0  # the confidence is not there yet
    assert names_in(tmp_path / "out") == {RECORD, "a-rle.json", "a-confidence.png"}


def test_labels_may_begin_at_one(predict: Predict, model: Pretrained, pictures: list[Pixels], tmp_path: Path) -> None:
    files = [save(tmp_path / "in/a.png", pictures[1]), geotiff(tmp_path / "in/b.tif", pictures[2])]
    assert predict(*files, "--label-offset", "1") == 0
    for name, number in (("a.png", 1), ("b.tif", 2)):
        expected = model.predict(pictures[number]).label_map
        with Image.open(tmp_path / "out" / name) as image:
            assert np.array_equal(np.asarray(image), expected + 1)
            if name == "b.tif":
                colors = np.reshape(image.getpalette(), (-1, 3))
                assert colors[1 : 1 + len(model.classes)].tolist() == [list(info.color) for info in model.classes]
    with pytest.raises(ConfigError, match="label_offset differ"):
        predict(*files)


def test_what_is_done_is_skipped(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, pictures[2])
    geotiff(tmp_path / "in/c.tif", pictures[2])
    assert predict(tmp_path / "in") == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != RECORD}
    (tmp_path / "out/b-overlay.png").unlink()
    capsys.readouterr()
    assert predict(tmp_path / "in") == 0
    assert "1 predictions written to" in (out := capsys.readouterr().out) and "2 were there already" in out
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"b.png", "b-overlay.png"}
    assert predict(tmp_path / "in", "--overwrite") == 0
    assert "3 predictions written to" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns != time for path, time in times.items())
    assert not [name for name in names_in(tmp_path / "out") if name.endswith(".tmp")]


def test_progress_counts_every_image_once(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, pictures[2])
    assert predict(tmp_path / "in/a.png") == 0
    save(tmp_path / "in/bad.png", pictures[2]).write_bytes(b"bad")
    with patch("trainer.predict.tqdm") as bar, pytest.raises(RunError, match="1 of 3 images"):
        predict(tmp_path / "in")
    assert bar.call_args.kwargs["total"] == 3 and bar.call_args.kwargs["initial"] == 1
    assert bar.return_value.__enter__.return_value.update.call_count == 2


def test_a_folder_of_other_predictions_is_refused(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    path = save(tmp_path / "in/a.png", pictures[2])
    assert predict(path) == 0
    with pytest.raises(ConfigError, match=r"holds predictions of another model or other settings \(eval differ\)"):
        predict(path, "--set", "eval.tta_flip=true")
    assert predict(path, "--set", "eval.window_batch=1", "--set", "eval.memory_gb=2") == 0  # the same predictions
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    record["identity"]["head"] = "0" * 64
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"\(head differ\); choose another --output, or add --overwrite"):
        predict(path)
    assert predict(path, "--overwrite") == 0 and predict(path) == 0


def test_what_is_left_of_another_model_is_not_done(predict: Predict, model: Pretrained, pictures: list[Pixels],
                                                   tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite for some of the images, or killed before its end, leaves predictions of both models."""
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, pictures[2])
    assert predict(tmp_path / "in", "--label-offset", "1") == 0
    old = ids_in(tmp_path / "out/b.png")
    assert predict(tmp_path / "in/a.png", "--overwrite") == 0
    capsys.readouterr()
    assert predict(tmp_path / "in") == 0
    assert "1 predictions written to" in (out := capsys.readouterr().out) and "1 were there already" in out
    for name in ("a.png", "b.png"):
        assert np.array_equal(ids_in(tmp_path / "out" / name), model.predict(pictures[2]).label_map)
    assert not np.array_equal(old, ids_in(tmp_path / "out/b.png"))
    assert predict(tmp_path / "in") == 0
    assert "0 predictions written to" in capsys.readouterr().out


def test_a_damaged_record_is_an_error_until_it_is_overwritten(predict: Predict, pictures: list[Pixels],
                                                              tmp_path: Path) -> None:
    path = save(tmp_path / "in/a.png", pictures[2])
    assert predict(path) == 0
    for text, message in (("[1]", "must hold a JSON object"), ("{}", "another model"), ("{\"identity\": 1}", "differ")):
        (tmp_path / "out" / RECORD).write_text(text)
        with pytest.raises(ConfigError, match=message):
            predict(path)
        assert predict(path, "--overwrite") == 0 and predict(path) == 0


def test_files_that_are_no_predictions_are_not_overwritten(predict: Predict, pictures: list[Pixels],
                                                           tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", pictures[2])
    save(tmp_path / "a.png", pictures[2])
    with pytest.raises(ConfigError, match=r"a\.png exists, and is no prediction"):
        predict(tmp_path / "a.jpg", output=tmp_path)
    assert names_in(tmp_path) == {"a.jpg", "a.png"}


def source(path: Path) -> Source:
    (found,) = sources_of([str(path)], [], Path("out"))
    return found


def test_predictions_never_overwrite_images_or_each_other(tmp_path: Path) -> None:
    def check(*names: str, output: str = "out") -> None:
        given = sources_of([str(tmp_path / name) for name in names], [], tmp_path / output)
        Outputs(folder=tmp_path / output, kinds=("ids", "overlay")).check(given, True)

    check("a.jpg", "b.jpg")
    check("a.tiff", output=".")
    for names, message in ((("a.jpg", "a.png"), r"both be written to .*a\.png"),
                           (("a.jpg", "a-overlay.jpg"), r"both be written to .*a-overlay\.png"),
                           (("a.tif", "a.jpg"), "both be written to"), (("x/a.jpg", "y/a.jpg"), "both be written to"),
                           (("a.tif", "a.tiff"), "both be written to"), (("a.mp4", "a.mov"), r"a-overlay\.mp4")):
        with pytest.raises(ConfigError, match=message):
            check(*names)
    for name in ("a.png", "a.tif"):
        with pytest.raises(ConfigError, match="would overwrite the image"):
            check(name, output=".")
    ids_only = Outputs(folder=tmp_path, kinds=("ids",))
    (tmp_path / "a.tif").touch()
    assert ids_only.is_done(source(tmp_path / "a.tif")) and not ids_only.is_done(source(tmp_path / "a.jpg"))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_images_among_good_ones(checkpoint: Path, pictures: list[Pixels], tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        save(tmp_path / "in" / name, pictures[2])
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:200])
    (tmp_path / "in/d\x1b[31m.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "in/e.tif").write_bytes(b"II*\0 no picture")
    (tmp_path / "in/f.mp4").write_bytes(b"no video")
    result = run_forked(REPOSITORY / "trainer/predict.py", "--checkpoint", checkpoint, "--output", tmp_path / "out",
                        tmp_path / "in", tmp_path / "missing.jpg")
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 6, result.stderr
    for line, name in zip(lines, ("b.png", "d\\x1b[31m.jpg", "e.tif", "f.mp4", "missing.jpg"), strict=False):
        assert line.startswith("error: ") and line.count(f"/{name}") == 1, result.stderr
    assert "5 of 7 images could not be predicted" in lines[-1] and "2 predictions written" in result.stdout
    assert names_in(tmp_path / "out") == of("a", "c")
    single = run_forked(REPOSITORY / "trainer/predict.py", "--checkpoint", checkpoint, "--output", tmp_path / "out",
                        tmp_path / "in/b.png")
    assert single.returncode == 2 and len(single.stderr.splitlines()) == 1 and "b.png" in single.stderr


def test_the_image_that_does_not_fit_is_the_one_that_fails(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """In a group of four, of which one needs more memory than there is."""
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", pictures[2])
    save(tmp_path / "in/big.png", np.zeros((1200, 3000, 3), np.uint8))
    with pytest.raises(RunError, match="1 of 4 images"):
        predict(tmp_path / "in", "--set", "eval.memory_gb=0.01", "--set", "eval.window_batch=4")
    assert re.search(r"error: \S*big\.png: image of 3000x1200 pixels", capsys.readouterr().err)
    assert names_in(tmp_path / "out") == of("0", "1", "2")


def test_links_to_nothing_in_a_folder_are_reported(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in/a.png", pictures[2])
    (tmp_path / "in/b.png").symlink_to(tmp_path / "unmounted/b.png")
    with pytest.raises(RunError, match="1 of 2 images"):
        predict(tmp_path / "in")
    assert re.search(r"error: \S*in/b\.png: No such file", capsys.readouterr().err)
    assert names_in(tmp_path / "out") == of("a")


def test_an_output_that_cannot_be_a_folder_is_refused_first(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below/it"):
        with pytest.raises(ConfigError, match=r"--output is \S+, but \S+/file is a file, legal: a folder"):
            predict("no.png", output=output)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (300, 1)])
def test_images_of_a_single_pixel_row_or_column(size: tuple[int, int], predict: Predict, pictures: list[Pixels],
                                                tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.ascontiguousarray(np.tile(pictures[3], (2, 1, 1))[: size[0], : size[1]]))
    assert predict(path, "--save", "ids", "overlay", "confidence", "probabilities", "rle", "--set",
                   "eval.tta_ratios=[0.5,1.5]") == 0
    assert ids_in(tmp_path / "out/a.png").shape == size


def counting_source(name: str, begun: list[str], data: bytes = b"") -> Source:
    def read() -> bytes:
        begun.append(name)
        if not data:
            raise CorruptShardError(f"{name} is broken")
        return data

    return Source(name=PurePosixPath(name), shown=name, read=read)


def test_images_are_decoded_ahead_in_order_and_not_too_far(pictures: list[Pixels], tmp_path: Path) -> None:
    good, begun = save(tmp_path / "a.png", pictures[2]).read_bytes(), list[str]()
    sources = [counting_source(f"{number}.{'mp4' if number == 4 else 'png'}", begun, good if number % 3 else b"")
               for number in range(9)]
    taken = []
    for source, decoded in decoded_ahead(sources):
        taken.append(source)
        assert (decoded is None) == source.is_video
        if decoded is None:
            continue
        if int(source.name.stem) % 3:
            assert np.array_equal(decoded.result(), pictures[2])
        else:
            with pytest.raises(CorruptShardError, match=f"{source.name} is broken"):
                decoded.result()
        assert len(begun) < len(taken) + 3
    assert taken == sources and set(begun) == {source.shown for source in sources if not source.is_video}


def test_the_next_image_is_decoded_while_the_network_runs(model: Pretrained, pictures: list[Pixels],
                                                          tmp_path: Path) -> None:
    """The first is handed over only when the second has been begun, by another thread."""
    good, begun = save(tmp_path / "a.png", pictures[2]).read_bytes(), list[str]()
    ahead = decoded_ahead([counting_source(f"{number}.png", begun, good) for number in range(9)])
    _, first = next(ahead)
    assert first is not None and first.result().shape == (64, 64, 3)
    deadline = time.monotonic() + 20
    while len(begun) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ahead.close()  # as an error does
    assert len(begun) == 3


def test_a_full_disk_ends_the_run(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", pictures[2])
    with patch("trainer.predicting.outputs.write_atomically", side_effect=OSError(28, "No space left", "x")), \
            pytest.raises(OSError, match="No space left"):
        predict(tmp_path / "in")


def test_help_is_fast_and_complete() -> None:
    script = "import sys, trainer.predict; print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "[]\n"
    shown = subprocess.run([sys.executable, REPOSITORY / "trainer/predict.py", "--help"], capture_output=True,
                           text=True, check=True).stdout
    for option in ("--save", "--list", "--label-offset", "--overwrite", "--device", "--precision", "eval.memory_gb"):
        assert option in shown


# -- rasters -----------------------------------------------------------------------------------------------------------

PLACE = (0.5, 0.0, 4e5, 0.0, -0.5, 5e6)


def geotiff(path: Path, pixels: Pixels, **options: Any) -> Path:
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    profile = {"driver": "GTiff", "height": bands.shape[1], "width": bands.shape[2], "count": len(bands),
               "dtype": bands.dtype, "crs": "EPSG:32632", "transform": rasterio.Affine(*PLACE)} | options
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)
    return path


@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 48, "compress": "lzw"}])
@pytest.mark.parametrize("flip", ["false", "true"])
def test_a_geotiff_keeps_its_place(options: dict[str, Any], flip: str, checkpoint: Path, predict: Predict,
                                   pictures: list[Pixels], tmp_path: Path) -> None:
    import rasterio

    geotiff(tmp_path / "in/sub/a.tif", pictures[3], **options)
    assert predict(tmp_path / "in", "--set", f"eval.tta_flip={flip}", "--set", "eval.stride=40") == 0
    assert names_in(tmp_path / "out") == {RECORD, "sub/a.tif", "sub/a-overlay.png"}
    model = load_pretrained(checkpoint, overrides=[f"eval.tta_flip={flip}", "eval.stride=40"])
    with rasterio.open(tmp_path / "out/sub/a.tif") as file:
        assert np.array_equal(file.read(1), model.predict(pictures[3]).label_map)
        assert file.crs.to_epsg() == 32632 and tuple(file.transform)[:6] == PLACE
        colors = file.colormap(1)
        assert file.compression.name == "deflate" and file.count == 1
    assert [colors[number][:3] for number in range(len(model.classes))] == [info.color for info in model.classes]
    with Image.open(tmp_path / "out/sub/a-overlay.png") as overlay:
        assert overlay.width > 333 and overlay.height >= 200  # with its legend


@pytest.mark.parametrize("kind", ["grey", "palette", "bands", "alpha"])
def test_bands_of_a_geotiff_become_rgb(kind: str, model: Pretrained, pictures: list[Pixels], predict: Predict,
                                       tmp_path: Path) -> None:
    import rasterio

    rgb, grey = pictures[1], pictures[1][..., 0]
    if kind == "palette":
        geotiff(tmp_path / "a.tif", grey // 16, photometric="palette")
        table = {number: (number * 16, 255 - number * 16, 40, 255) for number in range(16)}
        with rasterio.open(tmp_path / "a.tif", "r+") as file:
            file.write_colormap(1, table)
        rgb = np.array([table[number][:3] for number in range(16)], np.uint8)[grey // 16]
    elif kind == "bands":
        geotiff(tmp_path / "a.tif", np.concatenate([rgb, rgb], 2))
    else:
        geotiff(tmp_path / "a.tif", np.stack([grey, grey], 2) if kind == "alpha" else grey)
        rgb = np.stack([grey] * 3, 2)
    assert predict(tmp_path / "a.tif") == 0
    assert np.array_equal(ids_in(tmp_path / "out/a.tif"), model.predict(rgb).label_map)


def test_a_geotiff_gives_only_ids_and_overlay(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    path = geotiff(tmp_path / "a.tif", pictures[2])
    with pytest.raises(ConfigError, match="legal with --save: ids, overlay; found rle"):
        predict(path, "--save", "ids", "rle")
    assert predict(path, "--save", "overlay") == 0
    assert names_in(tmp_path / "out") == {RECORD, "a-overlay.png"}
    with pytest.raises(CorruptShardError, match="bands of uint16"):
        predict(geotiff(tmp_path / "wide.tif", pictures[2].astype(np.uint16)))
    with pytest.raises(ConfigError, match=r"set eval\.mode=slide"):
        predict(path, "--set", "eval.mode=whole", "--overwrite")


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("missing", [(), ("rasterio",)], ids=["rasterio", "tifffile"])
@pytest.mark.parametrize("kind", ["rgb", "grey", "rgba"])
def test_a_large_plain_tiff_is_read_in_parts(missing: tuple[str, ...], kind: str, model: Pretrained, predict: Predict,
                                             pictures: list[Pixels], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    import tifffile

    rgb = pictures[3]
    stored = {"rgb": rgb, "grey": rgb[..., 0], "rgba": np.concatenate([rgb, rgb[..., :1]], 2)}[kind]
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack" if kind == "grey" else "rgb")
    without(monkeypatch, *missing)
    for module in (rasters, inputs):
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    assert predict(tmp_path / "a.tif", "--label-offset", "1") == 0
    assert names_in(tmp_path / "out") == {RECORD, "a.tif", "a-overlay.png"}
    pixels = np.stack([rgb[..., 0]] * 3, 2) if kind == "grey" else rgb
    with Image.open(tmp_path / "out/a.tif") as image:
        assert np.array_equal(np.asarray(image), model.predict(pixels).label_map + 1)
        assert image.mode == "P" and tuple(image.getpalette()[3:6]) == model.classes[0].color


def test_a_tiff_with_a_long_side_is_read_in_parts(predict: Predict, model: Pretrained, pictures: list[Pixels],
                                                  tmp_path: Path) -> None:
    strip = np.tile(pictures[2][:32], (1, 260, 1))  # 16640 pixels wide
    save(tmp_path / "a.tif", strip)
    assert predict(tmp_path / "a.tif") == 0
    assert ids_in(tmp_path / "out/a.tif").shape == strip.shape[:2]
    with Image.open(tmp_path / "out/a-overlay.png") as overlay:
        assert 2048 < max(overlay.size) < 2500


@pytest.mark.parametrize("layout", ["planar", "compressed", "inverted", "wide", "turned"])
def test_what_tifffile_cannot_map_is_refused(layout: str, predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    import tifffile

    pixels = pictures[1]
    options: dict[str, Any] = {"photometric": "rgb"}
    if layout == "planar":
        pixels, options = pixels.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}
    elif layout == "compressed":
        options |= {"compression": "zlib"}
    elif layout == "inverted":
        pixels, options = pixels[..., 0], {"photometric": "miniswhite"}
    elif layout == "wide":
        pixels = pixels.astype(np.uint16)
    else:
        options |= {"extratags": [(274, "H", 1, 6, True)]}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    without(monkeypatch, "rasterio")
    monkeypatch.setattr(rasters, "MAX_PIXELS", 1000)
    message = "is to be turned" if layout == "turned" else r"pip install 'maskstream\[geo\]'"
    with pytest.raises(CorruptShardError, match=message):
        predict(tmp_path / "a.tif")


def test_a_large_tiff_without_the_extra_names_it(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.tif", pictures[1])
    without(monkeypatch, "rasterio", "tifffile")
    for module in (rasters, inputs):
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(CorruptShardError, match=r"pip install 'maskstream\[geo\]'"):
        predict(path)
    monkeypatch.setattr(rasters, "LARGEST_PICTURE", 1000)
    with pytest.raises(ConfigError, match=r"pip install 'maskstream\[geo\]'"):
        predict(path)


def test_a_raster_needs_no_memory_for_its_pixels_or_scores(predict: Predict, pictures: list[Pixels],
                                                           tmp_path: Path) -> None:
    """3.7 megapixels are 11 MB, and their scores 118 MB; the budget is 10 MB."""
    big = np.tile(pictures[2], (30, 30, 1))
    budget = ("--set", "eval.memory_gb=0.01", "--set", "eval.window_batch=2")
    assert predict(geotiff(tmp_path / "a.tif", big), *budget) == 0
    assert ids_in(tmp_path / "out/a.tif").shape == big.shape[:2]
    with pytest.raises(RunError, match=r"memory_gb is 0\.01"):  # all pixels at once do not fit
        predict(save(tmp_path / "b.png", big), *budget)


def test_a_damaged_raster_leaves_nothing(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    path = geotiff(tmp_path / "a.tif", pictures[3], tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff" * (len(data) // 3))
    with pytest.raises((CorruptShardError, OSError)):
        predict(path)
    assert names_in(tmp_path / "out") == {RECORD}


# -- videos ------------------------------------------------------------------------------------------------------------


def film(path: Path, frames: list[Pixels], rate: int = 7, rotation: int = 0) -> Path:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    if rotation:  # in the header of the track: a matrix of 16.16 fixed-point numbers
        data = path.read_bytes()
        start = data.index(b"tkhd") + 4 + 40
        a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[rotation]
        numbers = [a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30]
        matrix = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
        path.write_bytes(data[:start] + matrix + data[start + 36 :])
    return path


def frames_of(path: Path) -> tuple[list[Pixels], float]:
    import av

    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)], float(stream.average_rate)


@pytest.mark.parametrize(("size", "rotation"), [((64, 96), 0), ((66, 98), 0), ((64, 96), 90), ((64, 96), 180),
                                                ((64, 96), 270)])
def test_a_video_becomes_an_overlay_video(size: tuple[int, int], rotation: int, model: Pretrained, predict: Predict,
                                          pictures: list[Pixels], tmp_path: Path) -> None:
    clip = [np.ascontiguousarray(pictures[3][2 * number :, 3 * number :][: size[0], : size[1]]) for number in range(9)]
    (tmp_path / "in").mkdir()
    path = film(tmp_path / "in/a.mp4", clip, rotation=rotation)
    assert predict(tmp_path / "in") == 0
    assert names_in(tmp_path / "out") == {RECORD, "a-overlay.mp4"}
    found, rate = frames_of(tmp_path / "out/a-overlay.mp4")
    assert len(found) == 9 and rate == 7
    decoded, _ = frames_of(path)
    turned = [np.ascontiguousarray(np.rot90(pixels, -rotation // 90)) for pixels in decoded]
    for ours, pixels in zip(found, turned, strict=True):
        assert ours.shape == pixels.shape
        expected = np.asarray(model.predict(pixels).overlay())
        distance = np.abs(ours.astype(int) - expected).mean()
        assert distance < 12  # the codec
        assert distance < min(np.abs(ours.astype(int) - other).mean() for other in (pixels, expected[::-1, ::-1])) / 2
    assert predict(tmp_path / "in") == 0


def test_odd_sizes_lose_their_last_row_and_column(predict: Predict, tmp_path: Path, pictures: list[Pixels]) -> None:
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 63, 95, "yuv444p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[3][:63, :95].copy(), format="rgb24")))
        file.mux(stream.encode(None))
    assert predict(tmp_path / "a.mkv") == 0
    (frame,), _ = frames_of(tmp_path / "out/a-overlay.mp4")
    assert frame.shape == (62, 94, 3)


def test_a_broken_video_leaves_nothing(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    good = film(tmp_path / "a.avi", [pictures[3][:64, :96].copy()] * 4).read_bytes()
    for name, data in (("text.mp4", b"no video"), ("empty.mp4", b""), ("cut.mp4", good[:60]),
                       ("picture.mp4", save(tmp_path / "x.png", pictures[2]).read_bytes()[:50])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptShardError, match=f"{name} (is not a readable video|has no)"):
            predict(tmp_path / name)
    assert names_in(tmp_path / "out") == {RECORD}


def test_a_playlist_is_no_video(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    """It may name any file of this machine, and addresses of others."""
    film(tmp_path / "secret.mp4", [pictures[3][:64, :96].copy()])
    for name, text in (("hls.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
                       ("list.mkv", "ffconcat version 1.0\nfile secret.mp4\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(CorruptShardError, match=f"{name} is not a readable video"):
            predict(tmp_path / name)
    assert names_in(tmp_path / "out") == {RECORD}


@pytest.mark.parametrize("name", ["a.mp4", "a.tif", "a.png"])
def test_a_named_pipe_does_not_hang(name: str, predict: Predict, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(StorageError, match=f"{name} is a named pipe, legal: a regular file"):
        predict(tmp_path / name)


def test_an_image_that_cannot_be_decoded_for_want_of_memory_is_reported(
    predict: Predict, pictures: list[Pixels], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [save(tmp_path / name, pictures[2]) for name in ("a.png", "b.png")]
    with patch("trainer.predicting.inputs.decode_input", side_effect=MemoryError), \
            pytest.raises(RunError, match="2 of 2 images"):
        predict(*files)
    assert "b.png: there is not enough memory to decode it" in capsys.readouterr().err


def test_a_video_of_single_rows_is_refused(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 1, 64, "yuv444p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[3][:1, :64].copy(), format="rgb24")))
        file.mux(stream.encode(None))
    with pytest.raises(CorruptShardError, match="frames of a single row or column"):
        predict(tmp_path / "a.mkv")
    assert names_in(tmp_path / "out") == {RECORD}


def test_a_full_disk_is_not_called_a_broken_video(predict: Predict, pictures: list[Pixels], tmp_path: Path) -> None:
    import av

    path = film(tmp_path / "a.mp4", [pictures[3][:64, :96].copy()])
    with patch("trainer.predicting.video._even", side_effect=av.error.FFmpegError(28, "No space left on device")), \
            pytest.raises(OSError, match=r"No space left on device: '\S+a-overlay\.mp4'"):
        predict(path)


def test_a_video_without_the_extra_names_it(predict: Predict, pictures: list[Pixels], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", [pictures[3][:64, :96].copy()])
    without(monkeypatch, "av")
    with pytest.raises(ConfigError, match=r"videos need: pip install 'maskstream\[video\]'"):
        predict(path)


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "raster", "video"])
def test_a_killed_run_leaves_no_partial_file(kind: str, checkpoint: Path, pictures: list[Pixels],
                                             tmp_path: Path) -> None:
    if kind == "images":
        for number in range(60):
            save(tmp_path / "in" / f"{number:02d}.png", pictures[3])
    elif kind == "raster":
        geotiff(tmp_path / "in/a.tif", np.tile(pictures[2], (40, 40, 1)))
    else:
        (tmp_path / "in").mkdir()
        film(tmp_path / "in/a.mp4", [pictures[3][:192, :320].copy()] * 300)
    out = tmp_path / "out"
    arguments = [str(REPOSITORY / "trainer/predict.py"), "--checkpoint", str(checkpoint), "--output", str(out),
                 str(tmp_path / "in")]
    process = Forked(arguments, tmp_path / "log", dict(os.environ) | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    wanted = "*-overlay.png" if kind == "images" else ".*.tmp"
    while not list(out.glob(wanted)):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    final = [path for path in out.iterdir() if not path.name.startswith(".") and path.name != RECORD]
    assert len(final) < 120 and (kind == "images") == bool(final)
    for path in final:
        with Image.open(path) as image:
            image.load()
    if kind == "images":
        done = run_forked(*map(Path, arguments[:1]), *arguments[1:])
        assert done.returncode == 0 and "were there already" in done.stdout
        assert len([path for path in out.iterdir() if path.suffix == ".png"]) == 120
