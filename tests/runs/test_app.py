"""The page to try a model on: in a browser, and what it refuses."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY, heed_ctrl_c
from tests.runs.test_end_to_end import ALONE, run_program, tiny
from trainer.app import end_as_after_ctrl_c
from trainer.loop import train
from trainer.pretrained import load_pretrained

gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")
from trainer.serving import page  # noqa: E402 - needs gradio
from trainer.serving.page import Actions, Limits  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(scene_shards, run), ALONE)
    return run / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, folder for temporary files) of a running page that takes at most 1 MB and 0.1 megapixels."""
    folder = tmp_path_factory.mktemp("temporary")
    environ = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, REPOSITORY / "trainer/app.py", "--checkpoint", checkpoint, "--port",
                                "0", "--max-megabytes", "1", "--max-megapixels", "0.1"], stdout=subprocess.PIPE,
                               text=True, env=environ, cwd=folder, preexec_fn=heed_ctrl_c)
    assert process.stdout is not None
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert address is not None
        yield address[0], folder
    finally:
        process.send_signal(signal.SIGTERM)  # it ends as after Ctrl-C
        code = process.wait(30)
        process.stdout.close()
    assert code == 0
    assert not list(folder.glob("maskstream-app-*")), "uploads are removed at the end"


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "../../etc/passwd", "trainer/app.py"])
def test_no_other_file_is_served(served: tuple[str, Path], path: str) -> None:
    for place in (path, str(REPOSITORY / path)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{served[0]}gradio_api/file={place}", timeout=20)
        assert refused.value.code in (403, 404)
        refused.value.close()


def test_only_this_computer_is_served_and_nothing_is_listed(served: tuple[str, Path]) -> None:
    port = int(served[0].rstrip("/").rpartition(":")[2])
    listening = [line.split()[1] for name in ("tcp", "tcp6") for line in
                 Path(f"/proc/net/{name}").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    with urllib.request.urlopen(f"{served[0]}gradio_api/info", timeout=20) as info:
        assert b"upload" not in info.read()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--port", "70000"], "--port is 70000, legal: 0 to 65535"),
    (["--max-megapixels", "0"], "--max-megapixels is 0.0, legal: 0.01 to 500"),
])
def test_settings_out_of_range(checkpoint: Path, arguments: list[str], message: str) -> None:
    result = run_program("trainer/app.py", "--checkpoint", checkpoint, *arguments)
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the path")
def test_drop_overlay_toggle_download_in_a_browser(served: tuple[str, Path], scenes: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    address, folder = served
    photo = sorted((scenes / "images/val").iterdir())[0]
    huge, broken = tmp_path / "huge.png", tmp_path / "broken <b>x.jpg"
    Image.fromarray(np.zeros((400, 500, 3), np.uint8)).save(huge)
    broken.write_bytes(b"\xff\xd8\xff no picture")
    heavy = tmp_path / "heavy.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)).save(heavy)
    requested: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900}, accept_downloads=True)
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        upload = page.locator("#upload input[type=file]")
        for bad, message in ((broken, "is not a readable JPEG"), (huge, "0.2 megapixels, legal: at most 0.1"),
                             (heavy, "exceed the maximum allowed size")):
            upload.set_input_files(bad)
            toast = page.locator("[data-testid=toast-body]", has_text=message)
            toast.wait_for(timeout=30_000)
            assert toast.locator("b").count() == 0, "the file's name is text"
            page.reload()
        upload.wait_for(state="attached")
        drop(page, photo)
        shown = page.locator("#picture img")
        shown.wait_for(timeout=60_000)
        before = shown.get_attribute("src")
        first = download(page, before)
        boxes = page.locator("#classes input[type=checkbox]")
        assert boxes.count() >= 1 and all(boxes.nth(place).is_checked() for place in range(boxes.count()))
        boxes.first.click()
        page.wait_for_function("old => document.querySelector('#picture img').src != old",
                               arg=before, timeout=30_000)
        second = download(page, shown.get_attribute("src"))
        assert first.shape == second.shape and (first != second).any()
        shown.click(position={"x": 20, "y": 20})
        point = page.locator("#point textarea, #point input")
        page.wait_for_function("() => document.querySelector('#point textarea, #point input').value != ''")
        assert re.fullmatch(r"x \d+, y \d+: \d+ .+, confidence 0\.\d{3}|.*confidence 1\.000", point.input_value())
        with page.expect_download(timeout=30_000) as downloading:
            page.locator("#download").click()
        downloading.value.save_as(tmp_path / "ids.png")
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    with Image.open(tmp_path / "ids.png") as ids, Image.open(photo) as source:
        assert ids.mode == "P" and ids.size == source.size and np.asarray(ids).max() < 8
    outside = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
    assert not outside, "no fonts, no analytics: everything comes from this computer"
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert kept and all(path.relative_to(folder).parts[0].startswith("maskstream-app-") for path in kept)


def drop(page: object, photo: Path) -> None:
    """Drop a file on the upload, as a mouse does."""
    page.evaluate(  # type: ignore[attr-defined]
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: 'image/jpeg'}));
            const target = document.querySelector('#upload input[type=file]').closest('button') ||
                           document.querySelector('#upload');
            for (const kind of ['dragenter', 'dragover', 'drop'])
                target.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""", [base64.b64encode(photo.read_bytes()).decode(), photo.name])


def download(page: object, url: str | None) -> np.ndarray:
    """The pixels of a picture on the page."""
    body = page.request.get(url).body()  # type: ignore[attr-defined]
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(body)
        file.flush()
        with Image.open(file.name) as picture:
            return np.asarray(picture.convert("RGB"))


# -- what its controls do, without a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def actions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Actions:
    limits = Limits(megabytes=1, megapixels=0.1)
    return Actions(load_pretrained(checkpoint), tmp_path_factory.mktemp("uploads"), limits)


def uploaded(actions: Actions, scenes: Path) -> Path:
    (actions.folder / "0123").mkdir(exist_ok=True)
    return Path(shutil.copy(sorted((scenes / "images/val").iterdir())[0], actions.folder / "0123/a.jpg"))


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As below nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_as_after_ctrl_c()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_click_outside_tells_the_nearest_pixel(actions: Actions, scenes: Path) -> None:
    found = actions.upload(str(uploaded(actions, scenes)))[0]
    tall = found._replace(label_map=found.label_map[::8, ::8])  # as of an image much larger than the screen
    height, width = found.prediction.label_map.shape
    for index, place in (((-9, -9), "x 0, y 0: "), ((10**6, 10**6), f"x {width - 1}, y {height - 1}: ")):
        assert actions.point(tall, SimpleNamespace(index=index)).startswith(place)  # type: ignore[arg-type]


def test_a_prediction_that_is_no_longer_kept_is_said(actions: Actions) -> None:
    """Of a page that was not used for an hour; the picture would vanish otherwise."""
    for act in (lambda: actions.redraw(None, [], 0.5),
                lambda: actions.point(None, SimpleNamespace(index=(1, 1)))):  # type: ignore[arg-type]
        with pytest.raises(gradio.Error, match=r"there is no prediction here: drop an image"):
            act()


def test_an_upload_is_drawn_as_the_slider_says(actions: Actions, scenes: Path) -> None:
    path = str(uploaded(actions, scenes))
    found, picture, *_ = actions.upload(path, 0.0)
    everything = actions.redraw(found, actions.names, 0.0)
    assert np.array_equal(np.asarray(picture), np.asarray(everything))
    assert (np.asarray(actions.upload(path, 1.0)[1]) != np.asarray(picture)).mean() > 0.5


def test_a_full_disk_is_said_without_a_path(actions: Actions, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(page, "write_atomically", full)
    with pytest.raises(gradio.Error) as refused:
        actions.upload(str(uploaded(actions, scenes)))
    assert "cannot be kept for download: No space left on device" in str(refused.value)
    assert str(actions.folder) not in str(refused.value)


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.gif", b"GIF89a" + bytes(40), "is not a readable JPEG or PNG"), ("a.tif", b"II*\0" + bytes(40), "TIFF"),
    ("a.png", b"", "is not a readable"), ("a.jpg", b"\xff\xd8\xff" * 400_000, "legal: at most 1000000"),
])
def test_what_is_no_small_picture_is_refused(actions: Actions, name: str, data: bytes, message: str) -> None:
    path = actions.folder / name
    path.write_bytes(data)
    with pytest.raises(gradio.Error) as refused:
        actions.upload(str(path))
    assert message in str(refused.value) and str(actions.folder) not in str(refused.value)
    with pytest.raises(gradio.Error):
        actions.upload("/etc/hostname")
