"""show and info: which samples are chosen and at what cost, what the pictures show, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import ConfigError, CorruptShardError
from shards.looking.histogram import MOST_CLASSES, bar_length, class_histogram, scale_of
from shards.looking.image_scores import ImageScore, encode_scores
from shards.looking.selection import Filter, choose, choose_worst, class_of, read_in_order
from shards.looking.sheet import LINE, fitted, font, legend_of, legend_sheet, percent, sample_row, shortened
from shards.manifest import ClassInfo, Manifest, load_manifest
from shards.reader import ShardReader
from tests.support.hand_made import Labelled, png, write_labelled
from tests.support.shards_command import Done, shards_command

NAMES = ["sky", "windowpane, window", "traffic light", "Wall", "wall clock", "7"]
COLORS = [(10, 200, 30), (250, 0, 250), (0, 0, 240), (255, 255, 0), (90, 200, 250), (1, 99, 3)]
CLASSES = [ClassInfo(name=name, color=color) for name, color in zip(NAMES, COLORS, strict=True)]
Command = Callable[..., Done]


def labelled(key: str, *labels: int, size: tuple[int, int] = (12, 20)) -> Labelled:
    """An image of rows of these labels; the first fills what is left."""
    label_map = np.full(size, labels[0], np.uint8)
    for row, label in enumerate(labels[1:]):
        label_map[row] = label
    return key, png(np.full((*size, 3), 128, np.uint8)), label_map


@pytest.fixture
def root(tmp_path: Path) -> Path:
    val = [labelled("a/one", 0, 1), labelled("a/two", 0), labelled("b[1]", 0, 1, 2), labelled("c.d", 2, 255),
           labelled("ünï", 1), labelled("last", 0, 1, 2)]
    train = [labelled("t", 4, 3), labelled("u", 4)]
    return write_labelled(tmp_path / "set", {"val": val, "train": train}, CLASSES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return shards_command(monkeypatch, capsys)


# -- which samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "keys", "first", "count", "numbers", "looked_at"), [
    ([], [], 0, 3, [0, 1, 2], 0), ([], [], 4, 9, [4, 5], 0),
    ([1], [], 0, 2, [0, 2], 3), ([1], [], 1, 1, [2], 2),
    ([1], [], 0, 9, [0, 2, 4, 5], 6), ([1, 2], [], 0, 9, [2, 5], 6),
    ([2, 0], [], 0, 1, [2], 3), ([3], [], 0, 9, [], 0),  # the manifest says that no sample has it
    ([], ["a/*"], 0, 9, [0, 1], 6), ([], ["*o*", "c.d"], 0, 9, [0, 1, 3], 6), ([], ["A/*"], 0, 9, [], 6),
    ([], ["c.d"], 0, 9, [3], 4),  # a key occurs once, so nothing is read after it
    ([], ["b[1]"], 0, 9, [2], 6), ([], ["?n?"], 0, 1, [4], 5), ([1], ["last", "a/two"], 0, 9, [5], 6),
])
def test_samples_are_chosen_in_storage_order_reading_no_more_than_needed(
        root: Path, classes: list[int], keys: list[str], first: int, count: int, numbers: list[int],
        looked_at: int) -> None:
    reader, seen = ShardReader(root, "val"), []
    chosen = choose(reader, Filter(classes=classes, keys=keys), first, count, lambda: seen.append(1))
    assert (chosen.numbers, chosen.looked_at) == (numbers, looked_at) and len(seen) == looked_at


def test_choosing_decodes_no_pixel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("pixels or runs were decoded")

    for name in ("decode_image", "decode_segment_map", "decode_masks"):
        monkeypatch.setattr(f"shards.sample.{name}", decoded)
    assert choose(ShardReader(root, "val"), Filter(classes=[2], keys=["*"]), 0, 9).numbers == [2, 3, 5]


def test_samples_are_fetched_several_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(root, "val")
    asked: list[list[int]] = []
    fetch = reader.fetch
    monkeypatch.setattr(reader, "fetch", lambda numbers: asked.append(list(numbers)) or fetch(numbers))
    assert [number for number, _ in read_in_order(reader, [5, 0, 1])] == [5, 0, 1] and asked == [[5, 0, 1]]
    monkeypatch.setattr("shards.looking.selection._BYTES_AT_ONCE", reader.bytes_of([0, 1]))
    asked.clear()
    assert [sample.key for _, sample in read_in_order(reader, range(3))] == ["a/one", "a/two", "b[1]"]
    assert asked == [[0, 1], [2]]


@pytest.mark.parametrize(("text", "number"), [
    ("sky", 0), ("SKY", 0), ("windowpane, window", 1), ("windowpane", 1), ("Window Pane", None), ("traffic light", 2),
    ("  traffic   LIGHT ", 2), ("wall", 3), ("wall clock", 4), ("2", 2), ("7", 5), ("6", None), ("-1", None),
    ("windowpane, door", None), ("", None), ("9" * 50, None)])
def test_classes_are_named_by_name_or_id(root: Path, text: str, number: int | None) -> None:
    manifest = load_manifest(root)
    if number is None:
        with pytest.raises(ConfigError, match=r"--class .* is no class of the set.*legal: a name, or an id from 0 to"):
            class_of(text, manifest)
    else:
        assert class_of(text, manifest) == number


@pytest.mark.parametrize(("text", "nearest"), [("skyy", "sky"), ("windw", "windowpane, window"),
                                               ("trafic-light", "traffic light"), ("zzz", None)])
def test_an_unknown_class_is_an_error_that_names_the_nearest(root: Path, text: str, nearest: str | None, run: Command
                                                             ) -> None:
    done = run("show", root, "--class", text)
    assert done.code == 2 and done.err.count("\n") == 1
    assert (f"did you mean '{nearest}'?" in done.err) if nearest else ("did you mean" not in done.err)


def test_a_name_of_several_classes_is_refused(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", {"val": [labelled("a", 0)]}, ["screen, door", "screen, silver"])
    with pytest.raises(ConfigError, match=r"means several classes: 0 screen, door; 1 screen, silver; give the id"):
        class_of("screen", load_manifest(root))


# -- the worst of an evaluation ----------------------------------------------------------------------------------------


def scores(*rows: tuple[int, str, float, float]) -> bytes:
    return encode_scores(ImageScore("val", *row) for row in rows)


EVALUATION = scores((0, "a/one", 0.5, 0.9), (1, "a/two", 0.25, 0.5), (2, "b[1]", math.nan, math.nan),
                    (3, "c.d", 0.25, 0.4), (4, "ünï", 1.0, 1.0), (5, "last", 0.25, 0.5))


def test_the_worst_come_first_and_ties_are_ordered(root: Path, tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_bytes(EVALUATION)
    reader = ShardReader(root, "val")
    assert choose_worst(reader, Filter(), tmp_path, 9).numbers == [3, 1, 5, 0, 4]  # without a label: no score
    assert choose_worst(reader, Filter(), tmp_path, 2).looked_at == 2
    assert choose_worst(reader, Filter(classes=[1]), tmp_path, 2).numbers == [5, 0]
    assert choose_worst(reader, Filter(keys=["a/*"]), tmp_path, 9).scores[1].miou == 0.25


def test_show_worst_takes_the_evaluations_split(root: Path, tmp_path: Path, run: Command) -> None:
    (tmp_path / "images.jsonl").write_bytes(EVALUATION)
    done = run("show", root, "--worst", tmp_path, 2, "--output", tmp_path / "worst.png")
    assert done.code == 0 and "2 samples of split 'val'" in done.out, done.err
    for words, expected in (
            (("--split", "train"), "has no score of an image of split 'train'; its splits are: val"),
            (("--first", 1), "--first 1 with --worst")):
        done = run("show", root, "--worst", tmp_path, *words)
        assert done.code == 2 and expected in done.err and done.err.count("\n") == 1
    for words in ((tmp_path, "x"), (tmp_path, 0), (tmp_path, 1, 2)):
        assert "--worst is" in run("show", root, "--worst", *words).err


@pytest.mark.parametrize("row", [(0, "other", 0.5, 0.5), (99, "a/one", 0.5, 0.5)])
def test_an_evaluation_of_another_set_is_refused(root: Path, tmp_path: Path, row: tuple[int, str, float, float]
                                                 ) -> None:
    (tmp_path / "images.jsonl").write_bytes(scores(row))
    with pytest.raises(ConfigError, match="the evaluation is of another shard set"):
        choose_worst(ShardReader(root, "val"), Filter(), tmp_path, 1)


# -- the sheet ---------------------------------------------------------------------------------------------------------


def test_a_legend_has_every_class_that_occurs_by_share_and_what_is_ignored(root: Path) -> None:
    sample = ShardReader(root, "val").read(3)  # class 2 but for one ignored row of twelve
    two, ignored = legend_of(sample.label_map(), CLASSES, {2})
    assert (two.color, two.number, two.name, two.is_marked) == (COLORS[2], "2", "traffic light", True)
    assert two.share == pytest.approx(11 / 12) and ignored.share == pytest.approx(1 / 12)
    assert (ignored.color, ignored.name, ignored.is_marked) == (None, "ignored", False)
    lines = legend_of(ShardReader(root, "val").read(2).label_map(), CLASSES)
    assert [line.number for line in lines] == ["0", "1", "2"] and sum(line.share for line in lines) == 1
    assert [line.number for line in legend_of(ShardReader(root, "train").read(0).label_map(), CLASSES)] == ["4", "3"]


def test_a_sheet_shows_image_overlay_and_swatches(root: Path, tmp_path: Path, run: Command) -> None:
    done = run("show", root, "--split", "val", "--class", "traffic light", "--output", tmp_path / "new/s.png")
    assert done.code == 0 and "3 samples of split 'val', after reading 6 of 6" in done.out
    sheet = np.asarray(Image.open(tmp_path / "new/s.png"))
    assert sheet.shape[1] > 2 * 320 and (sheet[20:200, 10:300] == 128).all(2).sum() > 10_000
    legend = sheet[:, 2 * 320 + 30 :]
    for number in range(3):  # the classes of the samples, and of no others
        assert (legend == COLORS[number]).all(2).sum() > 100
    for number in range(3, 6):
        assert not (legend == COLORS[number]).all(2).any()
    assert (legend == (255, 236, 150)).all(2).sum() > 3 * 500  # the class that was asked for is marked, thrice
    run("show", root, "--split", "val", "--output", tmp_path / "plain.png")
    assert not (np.asarray(Image.open(tmp_path / "plain.png")) == (255, 236, 150)).all(2).any()


def test_a_legend_of_many_classes_is_complete_in_columns(tmp_path: Path) -> None:
    label_map = np.repeat(np.arange(100, dtype=np.uint8), 6).reshape(20, 30)
    colors = [(number, 255 - number, 77) for number in range(100)]
    classes = [ClassInfo(name=f"class {number}", color=color) for number, color in enumerate(colors)]
    image = png(np.zeros((20, 30, 3), np.uint8))
    root = write_labelled(tmp_path / "set", {"val": [("key", image, label_map)]}, classes)
    row = sample_row(ShardReader(root, "val").read(0), classes, "caption")
    sheet = np.asarray(legend_sheet([row, row]))
    assert all((sheet[:, 670:] == color).all(2).sum() >= 2 * 150 for color in colors)
    assert sheet.shape[0] < 2 * (320 + 4 * LINE)


def test_borders_survive_scaling_down_and_labels_are_not_mixed() -> None:
    label_map = np.zeros((3000, 2000), np.uint8)
    label_map[1500:] = 9
    image, small = fitted(np.zeros((3000, 2000, 3), np.uint8), label_map, 300)
    assert image.shape == (300, 200, 3) and small.shape == (300, 200)
    assert set(np.unique(small)) == {0, 9} and (small[150:] == 9).all() and not small[:150].any()
    assert fitted(np.zeros((1, 9000, 3), np.uint8), np.zeros((1, 9000), np.uint8), 320)[0].shape == (1, 320, 3)


def test_text_is_cut_visibly_and_keeps_both_ends_of_a_key() -> None:
    using = font(13)
    assert shortened("short", using, 300) == "short"
    name = shortened("x" * 500, using, 100)
    assert name.endswith("…") and 80 < using.getlength(name) <= 100
    key = shortened("folder/" + "x" * 500 + "_0042", using, 200, tail=0.6)
    assert key.startswith("folder/") and key.endswith("_0042") and using.getlength(key) <= 200
    assert shortened("a\x1b[2J\nb", using, 300) == "a\\x1b[2J\\nb"


@pytest.mark.parametrize(("share", "text"), [(1, "100.0 %"), (0.1234, "12.3 %"), (0.01, "1.0 %"), (0.0012, "0.12 %"),
                                             (0.0004, "0.040 %"), (1e-6, "< 0.001 %"), (0, "0 %")])
def test_shares_have_useful_digits(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_label_that_is_no_class_is_one_error(root: Path) -> None:
    with pytest.raises(CorruptShardError, match=r"sample 'last': label 2, legal: 0\.\.1"):
        sample_row(ShardReader(root, "val").read(5), CLASSES[:2], "")


@pytest.mark.parametrize(("words", "expected"), [
    (("--output", "s.gif"), "--output is s.gif, legal: a .png or .jpg file"),
    (("--first", 6, "--split", "val"), "--first is 6, legal: 0 to 5 in split 'val'"),
    (("--count", 101), "--count is 101, legal: 1 to 100"),
    (("--split", "test"), "no split 'test', it has: train, val"),
    (("--number", 0), "'0', legal: a whole number from 1 to"), (("--first", -1), "from 0 to"),
])
def test_bad_arguments_are_one_error(root: Path, words: tuple[object, ...], expected: str, run: Command) -> None:
    done = run("show", root, *words)
    assert done.code == 2 and expected in done.err


def test_finding_nothing_says_where_to_look(root: Path, tmp_path: Path, run: Command) -> None:
    done = run("show", root, "--class", "Wall", "--split", "val", "--output", tmp_path / "s.png")
    assert done.code == 1 and not (tmp_path / "s.png").exists()
    assert "no sample of split 'val' passes the filters, after reading 0 of 6" in done.out
    assert "--split train" in done.out


# -- info --------------------------------------------------------------------------------------------------------------


def test_the_histogram_draws_every_class_in_its_colour(root: Path, tmp_path: Path, run: Command,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("info", root, "--histogram", tmp_path / "h.png")
    assert done.code == 0 and f"wrote {tmp_path / 'h.png'}" in done.out
    picture = np.asarray(Image.open(tmp_path / "h.png").convert("RGB"))
    rows = {number: np.flatnonzero((picture == color).all(2).any(1)) for number, color in enumerate(COLORS)}
    assert all(len(found) for found in rows.values())
    middles = {number: float(np.median(found)) for number, found in rows.items()}
    assert sorted(middles, key=lambda number: middles[number]) == [0, 4, 1, 2, 3, 5]  # by pixels
    widths = {number: (picture == color).all(2).sum() for number, color in enumerate(COLORS)}
    assert widths[0] > widths[2] > widths[5]  # which has no pixel, so a swatch and no bar
    assert run("info", root, "--histogram", "h.svg").code == 2
    monkeypatch.chdir(tmp_path)  # where no folder called s3: may appear
    before = sorted(tmp_path.iterdir())
    for words in (("info", root, "--histogram"), ("show", root, "--output")):
        done = run(*words, "s3://bucket/h.png")
        assert done.code == 2 and f"{words[-1]} is 's3://bucket/h.png', legal: a local file" in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_info_lists_all_classes_on_request(root: Path, run: Command) -> None:
    assert "    5 7 " not in run("info", root).out
    assert run("info", root, "--classes").out.count("    5 7 ") == 2


def test_bars_are_logarithmic() -> None:
    assert scale_of([0.5, 0.2, 0.0]) == 1 and scale_of([0.09]) == 2 and scale_of([1e-12]) == 7 and scale_of([]) == 1
    lengths = [bar_length(share, 3) for share in (1.0, 0.1, 0.01)]
    assert lengths[0] - lengths[1] == pytest.approx(lengths[1] - lengths[2], abs=1) and min(lengths) > 0


@pytest.mark.parametrize("count", [1, 3, 150, 2000])
def test_the_histogram_is_readable_for_any_number_of_classes(tmp_path: Path, count: int) -> None:
    label_map = np.arange(2000, dtype=np.uint16).reshape(40, 50) % count
    root = write_labelled(tmp_path / "set", {"val": [("key", png(np.zeros((40, 50, 3), np.uint8)), label_map)]},
                          [f"class {number}" for number in range(count)])
    picture = class_histogram(load_manifest(root))
    lines = min(count, MOST_CLASSES + 1)
    assert lines * LINE < picture.height < (lines + 10) * LINE and picture.width < 1200


def test_splits_share_a_scale(root: Path) -> None:
    manifest: Manifest = load_manifest(root)
    picture = np.asarray(class_histogram(manifest))
    assert picture.shape[1] > 4 * 300  # two columns for each of two splits
