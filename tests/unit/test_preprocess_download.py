"""Downloading: resumed at the byte reached, never mixed, never published damaged, one clear line for each failure."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocess import download, fetch
from preprocess.published import PUBLISHED, PublishedFile, published_file
from shards.errors import ConfigError, StorageError
from shards.files import web
from shards.files.locks import only_writer
from shards.files.storage import RetryPolicy
from shards.reader import iter_samples
from tests.conftest import REPOSITORY, heed_ctrl_c, make_shards
from tests.support.file_server import FileServer, file_server
from tests.unit.test_preprocess_pipeline import tiny_ade

PIECE = 10_000
DATA = random.Random(0).randbytes(4 * PIECE + 1234)
OTHER = random.Random(1).randbytes(len(DATA))
PATIENT, HASTY = RetryPolicy(tries=3, longest_pause=0.1), RetryPolicy(tries=1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PIECE", PIECE)
    monkeypatch.setattr(web, "_warned", set())


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server(DATA) as running:
        yield running


def published(server: FileServer | None = None, data: bytes = DATA) -> PublishedFile:
    return PublishedFile(title="Tiny", name="tiny.zip", url=f"{server.address if server else 'http://h'}/set/tiny.zip",
                         size=len(data), checksum=f"sha256:{hashlib.sha256(data).hexdigest()}", licence="free to use",
                         home="https://example.org/terms", layout="ade20k")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def broken_off(server: FileServer, folder: Path) -> Path:
    """The part that is left when the third piece is cut."""
    server.faults = ["", "", "cut"]
    with pytest.raises(StorageError, match=r"failed after 1 tries after 5000 of 10000 bytes"):
        fetch.fetch(published(server), folder, policy=HASTY)
    server.faults, server.asked = [], []
    (part,) = parts(folder)
    assert part.read_bytes() == DATA[: 2 * PIECE] and names(folder) == [part.name]
    return part


# The table


def test_the_facts_of_ade20k() -> None:
    """Written out again, so that a slip in either place is noticed."""
    file = published_file("ade20k")
    assert (file.size, file.name) == (967382037, "ADEChallengeData2016.zip")
    assert file.checksum == "sha256:7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29"


@pytest.mark.parametrize("name", PUBLISHED)
def test_entries_are_complete(name: str) -> None:
    file = PUBLISHED[name]
    algorithm, _, digest = file.checksum.partition(":")
    assert re.fullmatch(r"[0-9a-f]+", digest) and len(digest) == 2 * hashlib.new(algorithm).digest_size
    assert file.url.startswith("https://") and file.home.startswith("https://") and "/" not in file.name
    assert file.layout in ("ade20k", "camvid", "folder") and file.licence and file.title


@pytest.mark.parametrize(("name", "hint"), [("ade20", "did you mean 'ade20k'? legal: ade20k"),
                                            ("ADE20K", "did you mean 'ade20k'? legal"), ("coco", "'coco'; legal")])
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(hint)):
        published_file(name)


# Downloading and resuming


def test_a_file_is_fetched_in_pieces_and_nothing_else_stays(server: FileServer, tmp_path: Path) -> None:
    assert fetch.fetch(published(server), tmp_path / "new" / "folder") is True
    assert (tmp_path / "new" / "folder" / "tiny.zip").read_bytes() == DATA
    assert names(tmp_path / "new" / "folder") == ["tiny.zip"]
    ends = [*range(0, len(DATA), PIECE), len(DATA)]
    assert server.asked == list(itertools.pairwise(ends))


def test_a_complete_file_is_checked_and_not_fetched_again(server: FileServer, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.zip").write_bytes(DATA)
    monkeypatch.setattr(fetch, "only_writer", None)  # no lock: the folder may be read-only
    assert fetch.fetch(published(server), tmp_path) is False
    assert server.paths == [] and names(tmp_path) == ["tiny.zip"]


@pytest.mark.parametrize(("found", "problem"), [(DATA[:-1], "it has 41233 bytes, published are 41234"),
                                                (OTHER, "its sha256 is")])
def test_another_file_of_that_name_is_kept_and_named(server: FileServer, tmp_path: Path, found: bytes,
                                                     problem: str) -> None:
    (tmp_path / "tiny.zip").write_bytes(found)
    with pytest.raises(StorageError, match=f"exists but is not the published file: {problem}.*move or remove it"):
        fetch.fetch(published(server), tmp_path)
    assert (tmp_path / "tiny.zip").read_bytes() == found and server.paths == []


def test_a_download_that_broke_off_continues_at_its_byte(server: FileServer, tmp_path: Path) -> None:
    broken_off(server, tmp_path)
    assert fetch.fetch(published(server), tmp_path) is True
    assert server.asked[0][0] == 2 * PIECE and server.asked[-1][1] == len(DATA)
    assert (tmp_path / "tiny.zip").read_bytes() == DATA and names(tmp_path) == ["tiny.zip"]


def test_a_part_that_was_complete_is_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    broken_off(server, tmp_path).write_bytes(DATA)  # as if killed before it was renamed
    assert fetch.fetch(published(server), tmp_path) is True
    assert server.asked == [] and names(tmp_path) == ["tiny.zip"]


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_body_that_ends_or_stalls_midway_is_continued(server: FileServer, tmp_path: Path, fault: str) -> None:
    server.faults = ["", fault]
    policy = RetryPolicy(tries=3, timeout=1 if fault == "stall" else 30, longest_pause=0.1)
    assert fetch.fetch(published(server), tmp_path, policy=policy) is True
    assert (tmp_path / "tiny.zip").read_bytes() == DATA
    assert server.asked[1:3] == [(PIECE, 2 * PIECE), (PIECE + PIECE // 2, 2 * PIECE)]


def test_a_server_that_stalls_for_good_is_one_error(server: FileServer, tmp_path: Path) -> None:
    server.faults = ["", "stall", "stall"]
    with pytest.raises(StorageError, match=r"tiny\.zip \(offset 10000\): failed after 2 tries after 7500 of 10000"):
        fetch.fetch(published(server), tmp_path, policy=RetryPolicy(tries=2, timeout=0.5, longest_pause=0.1))
    assert parts(tmp_path)[0].read_bytes() == DATA[:PIECE]


def test_a_killed_download_continues(server: FileServer, tmp_path: Path) -> None:
    server.pause = 0.15
    process = subprocess.Popen([sys.executable, "-c", program(server, tmp_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in parts(tmp_path)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (part,) = parts(tmp_path)
    reached = part.stat().st_size
    assert 0 < reached < len(DATA) and reached % PIECE == 0 and not (tmp_path / "tiny.zip").exists()
    server.pause, server.asked = 0, []
    assert subprocess.run([sys.executable, "-c", program(server, tmp_path)], cwd=REPOSITORY).returncode == 0
    assert server.asked[0][0] == reached
    assert (tmp_path / "tiny.zip").read_bytes() == DATA and names(tmp_path) == ["tiny.zip"]


def test_ctrl_c_ends_it_with_130_and_leaves_a_part(server: FileServer, tmp_path: Path) -> None:
    server.pause = 1.5  # the rest takes long, however busy the machine is
    process = subprocess.Popen([sys.executable, "-c", program(server, tmp_path)], cwd=REPOSITORY,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in parts(tmp_path)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert parts(tmp_path)[0].stat().st_size < len(DATA)
    server.pause = 0
    assert fetch.fetch(published(server), tmp_path) is True


def program(server: FileServer, folder: Path) -> str:
    """A program that downloads with small pieces, as its own process."""
    return (f"import pathlib\nfrom preprocess import fetch\nfrom preprocess.published import PublishedFile\n"
            f"from shards.cli.command_line import run_entry_point\nfetch._PIECE = {PIECE}\n"
            f"file = {published(server)!r}\n"
            f"run_entry_point(lambda: not fetch.fetch(file, pathlib.Path({str(folder)!r})))")


# Versions on the server


@pytest.mark.parametrize("known_by", ["ETag", "time"])
def test_a_file_replaced_between_two_runs_starts_over(server: FileServer, tmp_path: Path, known_by: str,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    server.data = OTHER
    if known_by == "time":
        server.etag = ""
    server.faults = ["", "", "cut"]
    with pytest.raises(StorageError):
        fetch.fetch(published(server), tmp_path, policy=HASTY)
    server.data, server.faults, server.asked = DATA, [], []
    if known_by == "time":
        server.changed = "Thu, 26 Nov 2026 00:00:00 GMT"
    else:
        server.etag = '"second"'
    assert fetch.fetch(published(server), tmp_path) is True
    assert server.asked[0][0] == 0 and (tmp_path / "tiny.zip").read_bytes() == DATA
    assert names(tmp_path) == ["tiny.zip"]
    assert any("is of another version" in record.message for record in caplog.records)


def test_a_file_replaced_during_a_run_is_noticed_at_once(server: FileServer, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    read = fetch._read

    def replace_after_two(storage: object, name: str, offset: int, *rest: object) -> bytes:
        if offset == 2 * PIECE:
            server.data, server.etag = OTHER, '"second"'
        return read(storage, name, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, "_read", replace_after_two)
    with pytest.raises(StorageError, match=r"tiny\.zip was replaced on the server while it was read"):
        fetch.fetch(published(server), tmp_path)
    assert parts(tmp_path)[0].read_bytes() == DATA[: 2 * PIECE]


def test_without_etag_and_time_the_checksum_decides(server: FileServer, tmp_path: Path) -> None:
    server.etag = server.changed = ""
    broken_off(server, tmp_path)
    assert fetch.fetch(published(server), tmp_path) is True
    assert server.asked[0][0] == 2 * PIECE and (tmp_path / "tiny.zip").read_bytes() == DATA


def test_files_of_others_are_left_alone(server: FileServer, tmp_path: Path) -> None:
    others = ["tiny.zip.part", "tiny.zip.0123456g.part", "tinyxzip.01234567.part", "tiny.zip.01234567.part.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "tiny.zip.01234567.part").write_bytes(b"x")  # of a version that the server no longer has
    fetch.fetch(published(server), tmp_path)
    assert names(tmp_path) == sorted([*others, "tiny.zip"])


def test_a_file_removed_during_a_run_can_be_continued(server: FileServer, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    read = fetch._read

    def remove_after_two(storage: object, name: str, offset: int, *rest: object) -> bytes:
        server.status = 404 if offset == 2 * PIECE else 0
        return read(storage, name, offset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, "_read", remove_after_two)
    with pytest.raises(StorageError, match=r"offset 20000.*404.*run the command again to continue"):
        fetch.fetch(published(server), tmp_path)
    assert parts(tmp_path)[0].read_bytes() == DATA[: 2 * PIECE]


def test_the_file_is_synced_before_and_its_folder_after_it_is_renamed(server: FileServer, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, bool]] = []
    path = tmp_path / "tiny.zip"
    monkeypatch.setattr(fetch.os, "fsync", lambda descriptor: events.append(("file", path.exists())))
    monkeypatch.setattr(fetch, "sync_folder", lambda folder: events.append((folder.name, path.exists())))
    fetch.fetch(published(server), tmp_path)
    assert events == [("file", False), (tmp_path.name, True)]


# What is not the published file


def test_a_flipped_bit_is_found_and_not_resumed(server: FileServer, tmp_path: Path) -> None:
    server.faults = ["", "flip"]
    with pytest.raises(StorageError, match=r"arrived different from the published file: its sha256 is .*was removed"):
        fetch.fetch(published(server), tmp_path)
    assert names(tmp_path) == []
    server.asked = []
    assert fetch.fetch(published(server), tmp_path) is True
    assert server.asked[0][0] == 0 and names(tmp_path) == ["tiny.zip"]


def test_a_damaged_part_is_found_and_not_resumed(server: FileServer, tmp_path: Path) -> None:
    broken_off(server, tmp_path).write_bytes(OTHER[: 2 * PIECE])
    with pytest.raises(StorageError, match="arrived different"):
        fetch.fetch(published(server), tmp_path)
    assert fetch.fetch(published(server), tmp_path) is True


def test_a_part_that_is_too_long_is_not_published(server: FileServer, tmp_path: Path) -> None:
    broken_off(server, tmp_path).write_bytes(DATA + b"x")
    with pytest.raises(StorageError, match="it has 41235 bytes, published are 41234"):
        fetch.fetch(published(server), tmp_path)
    assert fetch.fetch(published(server), tmp_path) is True


def test_a_server_file_of_another_size_is_refused_before_it_is_fetched(server: FileServer, tmp_path: Path) -> None:
    server.data = DATA + b"x"
    with pytest.raises(StorageError, match="has 41235 bytes, published are 41234: it is another file"):
        fetch.fetch(published(server), tmp_path)
    assert server.asked == [] and parts(tmp_path) == []


def test_a_server_without_ranges_is_a_clear_error(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    with pytest.raises(StorageError, match=r"ignores HTTP ranges.*put it at .*/tiny\.zip, and run this again"):
        fetch.fetch(published(server), tmp_path)
    assert parts(tmp_path) == []


# Failures are one line


def run(monkeypatch: pytest.MonkeyPatch, file: PublishedFile, *arguments: str) -> int:
    """The exit code of the command."""
    monkeypatch.setitem(PUBLISHED, "tiny", file)
    monkeypatch.setattr(sys, "argv", ["download.py", "tiny", *arguments])
    with pytest.raises(SystemExit) as left:
        download.run_entry_point(download.main)
    assert isinstance(left.value.code, int)
    return left.value.code


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


@pytest.fixture
def short_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's requests are tried once."""
    monkeypatch.setattr("shards.files.storage.RetryPolicy", lambda: HASTY)


def test_the_command_says_the_licence_first_and_the_next_step_last(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a folder"
    assert run(monkeypatch, published(server), "--output", str(output)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Tiny" and said[3:5] == ["licence   free to use", "terms     https://example.org/terms"]
    assert said[5] == f"{output}/tiny.zip: downloaded; size and sha256 are as published"
    assert said[6] == (f"next:  python preprocess/make_shards.py --dataset ade20k --root '{output}/tiny.zip' --output "
                       "shards-tiny")
    assert run(monkeypatch, published(server), "--output", str(output)) == 0
    assert "tiny.zip: already there; size and sha256 are as published" in capsys.readouterr().out


def test_the_licence_is_said_even_if_the_download_fails(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 404
    assert run(monkeypatch, published(server), "--output", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert "licence   free to use" in captured.out and "downloaded" not in captured.out
    assert names(tmp_path) == []


def test_404(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
             capsys: pytest.CaptureFixture[str]) -> None:
    server.status = 404
    assert run(monkeypatch, published(server), "--output", str(tmp_path)) == 2
    said = error_of(capsys)
    assert f"{server.address}/set/tiny.zip" in said and "404" in said and "name another server with --url" in said


@pytest.mark.usefixtures("short_policy")
def test_a_refused_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    with file_server(DATA) as gone:
        file = published(gone)
    assert run(monkeypatch, file, "--output", str(tmp_path)) == 2
    said = error_of(capsys)
    assert gone.address in said and "Connection refused" in said


@pytest.mark.usefixtures("short_policy")
def test_a_tls_failure(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       capsys: pytest.CaptureFixture[str]) -> None:
    file = published(server)
    url = file.url.replace("http:", "https:")  # the server speaks no TLS
    assert run(monkeypatch, file, "--output", str(tmp_path), "--url", url) == 2
    said = error_of(capsys)
    assert url in said and "SSL" in said


@pytest.mark.parametrize("folder", ["/proc", "/proc/new"])
def test_a_folder_that_cannot_be_written(server: FileServer, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str], folder: str) -> None:
    """Root, too, cannot write to /proc."""
    assert run(monkeypatch, published(server), "--output", folder) == 2
    assert re.fullmatch(rf"error: {folder}(/\.tiny\.zip\.lock)?: [A-Z][a-z ]+", error_of(capsys))
    assert server.paths == []


def test_an_output_that_is_a_file(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert run(monkeypatch, published(server), "--output", str(tmp_path / "file")) == 2
    assert error_of(capsys).startswith(f"error: {tmp_path}/file")


def test_too_little_space_is_said_before_anything_is_fetched(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_off(server, tmp_path)
    needed = len(DATA) - 2 * PIECE  # only what is missing
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: fetch.shutil._ntuple_diskusage(0, 0, needed - 1))
    assert run(monkeypatch, published(server), "--output", str(tmp_path)) == 2
    assert f"{tmp_path} has {needed - 1} bytes free, tiny.zip needs {needed} more" in capsys.readouterr().err
    assert server.asked == []
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: fetch.shutil._ntuple_diskusage(0, 0, needed))
    assert run(monkeypatch, published(server), "--output", str(tmp_path)) == 0


def test_a_disk_that_is_full_after_all(server: FileServer, tmp_path: Path) -> None:
    """A limit on the size of files acts like a full disk; what was written can be resumed."""
    limited = f"import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
              f"resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * PIECE}, {2 * PIECE}))\n"
    done = subprocess.run([sys.executable, "-c", limited + program(server, tmp_path)], cwd=REPOSITORY,
                          capture_output=True, text=True)
    (part,) = parts(tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {part}: File too large"
    assert part.read_bytes() == DATA[: 2 * PIECE]
    assert fetch.fetch(published(server), tmp_path) is True
    assert (tmp_path / "tiny.zip").read_bytes() == DATA


def test_a_second_process_is_refused(server: FileServer, tmp_path: Path) -> None:
    with only_writer(tmp_path / ".tiny.zip.lock", tmp_path):
        done = subprocess.run([sys.executable, "-c", program(server, tmp_path)], cwd=REPOSITORY, capture_output=True,
                              text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: another run is writing to {tmp_path}; wait for it, or choose another --output\n"
    assert server.paths == []


@pytest.mark.parametrize("output", ["s3://bucket/sets", "https://me:secret@host/x", "ftp://host/x", ""])
def test_an_output_that_is_no_local_folder(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, published(), "--output", output) == 2
    said = error_of(capsys)
    assert said == f"error: --output is {output.replace('me:secret', '***')!r}, legal: a local folder"
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["", "tiny.zip", "/data/tiny.zip", "https://host/folder/", "https://tiny.zip", "https://",
                                 "ftp://host/tiny.zip", "https://host/tiny.zip?***", "https://host/a tiny.zip"])
def test_a_url_that_names_no_file_on_a_server(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"legal|pass the full URL"):
        fetch.fetch(published(), tmp_path, url)
    assert names(tmp_path) == []


def test_an_empty_url_is_not_taken_for_none(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, published(server), "--output", str(tmp_path), "--url", "") == 2
    assert "--url '' does not name a file on a server, legal: a URL such as" in error_of(capsys)
    assert server.paths == [] and names(tmp_path) == []


# Mirrors


def test_a_mirror_is_held_to_the_same_checksum(server: FileServer, tmp_path: Path) -> None:
    with file_server(OTHER) as mirror, pytest.raises(StorageError, match="arrived different"):
        fetch.fetch(published(server), tmp_path, f"{mirror.address}/tiny.zip")
    assert server.paths == []
    assert fetch.fetch(published(), tmp_path, f"{server.address}/mirror/a%20b.zip?token=s%2Fecret") is True
    assert set(server.paths) == {"/mirror/a%20b.zip?token=s%2Fecret"}
    assert names(tmp_path) == ["tiny.zip"]


@pytest.mark.parametrize("fails", ["404", "replaced", "flip", "ranges", "size", "cut"])
def test_credentials_are_never_shown(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    monkeypatch.setattr("shards.files.storage.RetryPolicy", lambda: PATIENT)
    caplog.set_level(logging.DEBUG)
    url = f"{server.address.replace('//', '//user:pass1234@')}/tiny.zip?sig=abcdef"
    file = published(server)
    if fails == "replaced":
        broken_off(server, tmp_path)
        server.etag = '"second"'
    server.status, server.ranges = (404 if fails == "404" else 0), fails != "ranges"
    server.faults = {"flip": ["flip"], "cut": ["cut"] * 3}.get(fails, [])
    server.data = DATA + b"x" if fails == "size" else DATA
    assert run(monkeypatch, file, "--output", str(tmp_path), "--url", url) == (0 if fails == "replaced" else 2)
    captured = capsys.readouterr()
    said = captured.out + captured.err + caplog.text
    assert "tiny.zip?***" in said and "abcdef" not in said and "pass1234" not in said


def test_a_secret_with_a_space_is_masked_to_its_end(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in (f"{server.address}/tiny.zip?sig=ab cdef", "ftp://host/tiny.zip?sig=ab cdef"):
        assert run(monkeypatch, published(server), "--output", str(tmp_path), "--url", url) == 2
        captured = capsys.readouterr()
        assert "tiny.zip?***\n" in captured.out and "cdef" not in captured.out
        assert "tiny.zip?***' does not name a file" in captured.err and "cdef" not in captured.err


# To shards


def test_shards_are_made_from_the_zip_as_it_arrives(server: FileServer, tmp_path: Path) -> None:
    root = tiny_ade(tmp_path / "ADEChallengeData2016")
    with zipfile.ZipFile(tmp_path / "original.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    server.data = (tmp_path / "original.zip").read_bytes()
    file = published(server, server.data)
    server.faults = ["", "cut"]
    with pytest.raises(StorageError):
        fetch.fetch(file, tmp_path / "data", policy=HASTY)
    assert fetch.fetch(file, tmp_path / "data") is True
    options = ("dataset.kind=ade20k", "crops.size=64")
    fetched = make_shards(tmp_path / "a", tmp_path / "data" / "tiny.zip", *options)
    local = make_shards(tmp_path / "b", root, *options)
    assert [sample.key for sample in iter_samples(fetched, "train")] == [
        sample.key for sample in iter_samples(local, "train")]
    (sample,) = iter_samples(fetched, "val")
    assert sample.image_bytes == (root / "images" / "validation" / "ADE_val_00000001.jpg").read_bytes()
