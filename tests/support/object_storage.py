"""A real S3 server on the loopback interface, and a proxy that behaves like a bad network."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

KEY, SECRET = "AKTEST", "SKTEST"
_START_SECONDS, _STOP_SECONDS = 120, 10


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class S3Server:
    """SeaweedFS. May be stopped and restarted: it keeps its ports and data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, free_ports(8)
        self.port = self.ports[0]
        self._process: subprocess.Popen[bytes] | None = None
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def web(self) -> str:
        """Its plain HTTP interface: objects under /buckets/<bucket>/<key>."""
        return f"http://127.0.0.1:{self.ports[5]}"

    def start(self) -> None:
        s3, *others = self.ports
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
                 "s3.port.grpc")
        command = [str(Path(sys.executable).with_name("weed")), "-logtostderr", "server", f"-dir={self.folder}",
                   "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.port={s3}",
                   f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=64",
                   "-master.volumeSizeLimitMB=128", "-volume.preStopSeconds=0", "-master.telemetry=false",
                   *(f"-{name}={port}" for name, port in zip(names, others, strict=True))]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=2) as answer:
                if answer.status == 200:
                    return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.2)

    def stop(self, how: int = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{self.port}*.sock"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)  # what it holds is thrown away
        shutil.rmtree(folder, ignore_errors=True)


Fault = Callable[[bytes, socket.socket], bytes | None]
"""(what the server sent, the client's connection) -> what to send instead; None closes the connection."""


class FaultyProxy:
    """Forwards TCP to a server. Each fault in `faults` is used once, by a response with a body of its size.

    `fault(part, client)` sees each part of such a response. The number of connections is up to the client.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self.target, self.delay, self.faults = target, delay, list[Fault]()
        self.requests, self.bytes = 0, 0
        self.writes: list[str] = []  # what was asked for with PUT and POST: paths and queries
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, allow_reuse_address, block_on_close = True, True, False
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """Closed connections are normal for this proxy."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one connection, one by one; a request ends with its header (GET) or its body."""
        try:
            with socket.create_connection(("127.0.0.1", self.target), timeout=60) as server:
                while request := _message(client):
                    with self._lock:
                        self.requests += 1
                        method, path = request.split(b" ", 2)[:2]
                        self.writes += [path.decode()] if method in (b"PUT", b"POST") else []
                        fault = self.faults.pop(0) if self.faults and request.startswith(b"GET ") and \
                            b"list-type" not in request.split(b"\r\n")[0] else None
                    time.sleep(self.delay)
                    server.sendall(request)
                    answer = _message(server, request.startswith(b"HEAD "))
                    with self._lock:
                        self.bytes += len(answer)
                    if not answer:
                        return
                    changed = answer if fault is None else fault(answer, client)
                    if changed is None:
                        return
                    client.sendall(changed)
        finally:
            client.close()


def _message(connection: socket.socket, is_head: bool = False) -> bytes:
    """One HTTP message, header and body; empty when the peer has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return b""
        data += part
    header, body = data.split(b"\r\n\r\n", 1)
    fields = dict(line.lower().split(b": ", 1) for line in header.split(b"\r\n")[1:] if b": " in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        while not body.endswith(b"0\r\n\r\n"):
            body += connection.recv(1 << 16)
    else:
        length = 0 if is_head else int(fields.get(b"content-length", 0))
        while len(body) < length:
            part = connection.recv(1 << 20)
            if not part:
                break
            body += part
    return header + b"\r\n\r\n" + body


def cut(answer: bytes, client: socket.socket) -> None:
    """The connection ends mid-body."""
    client.sendall(answer[: _body(answer) + (len(answer) - _body(answer)) // 2])


def stall(answer: bytes, client: socket.socket) -> None:
    """Send half the body, then nothing until the client gives up."""
    cut(answer, client)
    client.settimeout(30)
    with contextlib.suppress(OSError):
        client.recv(1)


def trickle(answer: bytes, client: socket.socket) -> None:
    """Trickle: send a byte now and then, never silent for long and never done."""
    client.sendall(answer[: _body(answer)])
    with contextlib.suppress(OSError):
        for number in range(_body(answer), len(answer)):
            client.sendall(answer[number : number + 1])
            time.sleep(0.05)


def flip(answer: bytes, client: socket.socket) -> bytes:
    """Flip one bit of the body."""
    place = (_body(answer) + len(answer)) // 2
    return answer[:place] + bytes([answer[place] ^ 4]) + answer[place + 1 :]


def short(answer: bytes, client: socket.socket) -> bytes:
    """A truncated body that claims to be complete."""
    header, body = answer.split(b"\r\n\r\n", 1)
    kept = body[: len(body) // 2]
    lines = [b"Content-Length: %d" % len(kept) if line.lower().startswith(b"content-length") else line
             for line in header.split(b"\r\n")]
    return b"\r\n".join(lines) + b"\r\n\r\n" + kept


def unavailable(answer: bytes, client: socket.socket) -> bytes:
    """503 Slow Down."""
    return b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def internal_error(answer: bytes, client: socket.socket) -> bytes:
    """500 Internal Server Error."""
    return b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


def _body(answer: bytes) -> int:
    return answer.index(b"\r\n\r\n") + 4


# Other clouds


class CloudStub(http.server.BaseHTTPRequestHandler):
    """Serves a folder's files like Azure Blob Storage (/account/container/key) and Google Cloud Storage (/bucket/key).

    Enough to see which keys a client requests; permissions are not checked.
    """

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]  # paths without the query

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        self.asked.append(path)
        file, asked = self.folder / Path(path).name, self.headers.get("Range") or self.headers.get("x-ms-range")
        if "prefix" in query:
            self._answer(200, self._listing(query["prefix"][0], azure="comp" in query))
        elif not file.is_file():
            self._answer(404, b"")
        elif asked is None:
            self._answer(200, file.read_bytes())
        else:
            data = file.read_bytes()
            start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = data[start : end + 1]
            self._answer(206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _listing(self, prefix: str, azure: bool) -> bytes:
        sizes = {prefix + path.name: path.stat().st_size for path in self.folder.iterdir()}
        if azure:
            blobs = "".join(f"<Blob><Name>{name}</Name><Properties><Last-Modified>Wed, 25 Nov 2026 00:00:00 GMT"
                            f"</Last-Modified><Content-Length>{size}</Content-Length><Content-Type>x</Content-Type>"
                            "<Etag>e</Etag></Properties></Blob>" for name, size in sizes.items())
            return f"<EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>".encode()
        contents = "".join(f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>e</ETag><LastModified>"
                           "2026-11-25T00:00:00.000Z</LastModified></Contents>" for name, size in sizes.items())
        return f"<ListBucketResult>{contents}</ListBucketResult>".encode()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": "e",
                            "Last-Modified": "Wed, 25 Nov 2026 00:00:00 GMT", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def cloud_stub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(its address, the paths requested from it)"""
    handler = type("Handler", (CloudStub,), {"folder": folder, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()
