"""Sets on web servers: plain http:// is warned about once, and redirects to another host are refused."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shards.errors import StorageError
from shards.files import web
from shards.files.object_storage import ObjectStorage, ObjectVersion
from shards.files.storage import RetryPolicy, open_storage
from shards.manifest import MANIFEST_NAME, load_manifest
from shards.reader import iter_samples
from tests.support.file_server import file_server
from tests.support.object_storage import cloud_stub


@contextmanager
def redirecting(target: Callable[[str], str]) -> Iterator[tuple[str, list[str]]]:
    """(address of a server that redirects every request, the paths requested from it)"""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", target(self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_warned", set())
    monkeypatch.delenv(web.SETTING, raising=False)


def test_a_redirect_to_another_host_is_refused_and_never_asked(scene_shards: Path) -> None:
    with cloud_stub(scene_shards) as (other, asked), redirecting(lambda path: f"{other}{path}") as (address, _):
        for read in (lambda: load_manifest(f"{address}/set?sig=abcdef"),
                     lambda: open_storage(f"{address}/set").read("train-000000.tar", 0, 10),
                     lambda: ObjectStorage(f"{address}/set?sig=abcdef", RetryPolicy()).version("train-000000.tar")):
            with pytest.raises(StorageError) as error:
                read()
            assert f"redirects to {other}/set/" in str(error.value) and "MASKSTREAM_REDIRECTS=any" in str(error.value)
            assert "abcdef" not in str(error.value)
        assert asked == []


def test_the_setting_allows_it(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(web.SETTING, "any")
    with cloud_stub(scene_shards) as (other, _), redirecting(lambda path: f"{other}{path}") as (address, _):
        assert load_manifest(f"{address}/set") == load_manifest(scene_shards)


def test_a_redirect_on_the_same_host_is_followed(scene_shards: Path) -> None:
    class Moved(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/old/"):
                self.send_response(301)
                self.send_header("Location", f"/new/{self.path.removeprefix('/old/')}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = (scene_shards / Path(urlsplit(self.path).path).name).read_bytes()
            asked = self.headers.get("Range")
            part = data
            if asked:
                start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                part = data[start : end + 1]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            for name, value in (("Content-Length", str(len(part))), ("ETag", "e"),
                                ("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moved) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = list(iter_samples(f"http://127.0.0.1:{server.server_port}/old", "val"))
        server.shutdown()
    assert [sample.key for sample in found] == [sample.key for sample in iter_samples(scene_shards, "val")]


def test_a_circle_of_redirects_ends() -> None:
    with redirecting(lambda path: path) as (address, asked), pytest.raises(StorageError, match="more than 5 times"):
        open_storage(f"{address}/set").read(MANIFEST_NAME)
    assert len(asked) == 5


@pytest.mark.parametrize(("place", "target", "stays"), [
    ("https://h/a", "https://h/b", True), ("https://h/a", "http://h/a", False), ("https://h/a", "https://i/a", False),
    ("http://h/a", "https://h/a", True), ("http://h:80/a", "https://h:443/a", True),
    ("http://h/a", "https://i/a", False), ("https://h/a", "https://h:8443/a", False),
    ("http://h/a", "http://h@i/a", False), ("https://h/a", "ftp://h/a", False),
])
def test_which_redirects_stay(place: str, target: str, stays: bool) -> None:
    assert web._stays(urlsplit(place), urlsplit(target)) == stays


def test_http_is_said_once_and_without_credentials(scene_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cloud_stub(scene_shards) as (address, _):
        for _ in range(3):
            load_manifest(f"{address}/set?sig=abcdef")
    said = [record.message for record in caplog.records if "is plain http://" in record.message]
    assert len(said) == 1 and "including credentials" in said[0] and "abcdef" not in said[0]


def test_a_cloud_endpoint_that_is_http_is_said_too(s3_shards: str, caplog: pytest.LogCaptureFixture) -> None:
    web._warned.clear()  # the set was made by this process
    load_manifest(s3_shards)
    load_manifest(s3_shards)
    said = [record.message for record in caplog.records if "is plain http://" in record.message]
    assert len(said) == 1 and "AWS_ENDPOINT=http://127.0.0.1" in said[0]


def test_https_is_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is configured accordingly."""
    options: list[dict[str, object]] = []
    monkeypatch.setattr("shards.files.object_storage.from_url",
                        lambda url, client_options, **_: options.append(client_options))
    for url in ("https://host/set", "http://host/set", "s3://bucket/set"):
        open_storage(url, RetryPolicy())._client()  # type: ignore[attr-defined]
    assert [option["allow_http"] for option in options] == [False, True, True]


@pytest.mark.parametrize(("etag", "changed", "tag"), [
    ('"first"', "Wed, 25 Nov 2026 00:00:00 GMT", '"first"'), ('"first"', "", '"first"'), ("", "", ""),
    ("", "Wed, 25 Nov 2026 00:00:00 GMT", "2026-11-25T00:00:00+00:00"),
])
def test_a_version_is_size_and_etag_or_else_time(etag: str, changed: str, tag: str) -> None:
    with file_server(b"x" * 100) as server:
        server.etag, server.changed = etag, changed
        storage = ObjectStorage(f"{server.address}/set", RetryPolicy(tries=1))
        version = storage.version("file")
        assert version == ObjectVersion(100, tag) and server.asked == []
        assert storage.read("file", 10, 20, version) == b"x" * 20


def test_two_versions_of_a_file_are_never_mixed() -> None:
    """Neither between two reads, nor when a read that broke off is continued."""
    with file_server(bytes(range(100))) as server:
        storage = ObjectStorage(f"{server.address}/set", RetryPolicy(tries=3, longest_pause=0.1))
        server.faults = ["replace"]
        with pytest.raises(StorageError, match="file was replaced on the server while it was read"):
            storage.read("file", 0, 50, storage.version("file"))
        assert server.asked == [(0, 50), (25, 50)] and storage.retries == 1
        version = storage.version("file")
        server.data += b"x"
        with pytest.raises(StorageError, match="was replaced"):
            storage.read("file", 0, 50, version)


def test_names_with_spaces_are_quoted() -> None:
    with file_server(b"x" * 100) as server:
        assert open_storage(f"{server.address}/set").read("a b?.tar", 0, 2) == b"xx"
    assert set(server.paths) == {"/set/a%20b%3F.tar"}
