"""A web server with one file, which behaves as badly as it is told to."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator


class FileServer:
    """Answers every path with `data`. Attributes may be changed while it runs; each of `faults` is used once."""

    def __init__(self, data: bytes) -> None:
        self.data, self.etag, self.changed = data, '"first"', "Wed, 25 Nov 2026 00:00:00 GMT"
        self.status, self.ranges, self.pause = 0, True, 0.0  # status: answer with it; pause: seconds before each answer
        self.faults: list[str] = []  # of the next bodies of more than one byte: cut, stall, flip, replace
        self.asked: list[tuple[int, int]] = []  # ranges of more than one byte: first, last + 1
        self.paths: list[str] = []
        self.closing = threading.Event()
        self.address = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def do_GET(self) -> None:
        state = self.state
        state.paths.append(self.path)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if state.ranges else None
        first, end = (int(found[1]), min(int(found[2]) + 1, len(state.data))) if found else (0, len(state.data))
        fault = ""
        if end - first > 1 and not state.status:
            state.asked.append((first, end))
            fault = state.faults.pop(0) if state.faults else ""
        body = b"" if state.status else state.data[first:end]
        if fault == "flip":
            body = bytes([body[0] ^ 4]) + body[1:]
        time.sleep(state.pause)
        self.send_response(state.status or (206 if found else 200))
        self.send_header("Content-Length", str(len(body)))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(state.data)}")
        for name, value in (("ETag", state.etag), ("Last-Modified", state.changed)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if fault == "replace":  # the file, while its body is sent, which ends
            state.data, state.etag = bytes(reversed(state.data)), '"second"'
        if fault in ("cut", "stall", "replace"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "stall":
                state.closing.wait(30)
        elif self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are normal here."""


@contextlib.contextmanager
def file_server(data: bytes) -> Iterator[FileServer]:
    """A running server; its `address` is http://127.0.0.1:PORT."""
    state = FileServer(data)
    handler = type("Handler", (_Handler,), {"state": state})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        yield state
        state.closing.set()
        server.shutdown()
