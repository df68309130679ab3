"""Processes that need not import torch and transformers again: forked from one that has.

What a test starts this way behaves like `python program arguments`: own process, environment, output and exit code. It
saves five seconds of imports for each. Not for programs that are to be found by their environment or command line in
/proc, under limits of memory, or below torchrun.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent.parent
_LAST_WORDS = 10.0  # seconds


def run_forked(program: Path, *arguments: object, ranks: int = 0,
               cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([python, program, *arguments], cwd=cwd, capture_output=True, text=True)`.

    With `ranks`, so many processes with the environment that torchrun gives; the exit code is the first that is not 0.
    """
    return _run({"argv": [str(program), *map(str, arguments)], "cwd": str(cwd)}, ranks)


def call_on_ranks(function: Callable[..., None], *arguments: str, ranks: int = 2) -> None:
    """`function(rank, *arguments)`, one of a module, in so many processes. Raises AssertionError when one fails."""
    done = _run({"call": [function.__module__, function.__name__, *arguments]}, ranks)
    assert done.returncode == 0, done.stderr


class Forked:
    """A running program, in a session of its own; what a test needs of `subprocess.Popen`."""

    def __init__(self, command: list[str], log: Path, environ: dict[str, str]) -> None:
        self._end = Path(tempfile.mkdtemp(), "code")
        self.args, self.returncode = command, None
        log.touch()  # the child opens it some time after this returns; a reader must find it now
        self.pid = _ask({"argv": command, "environ": environ, "streams": [str(log), str(log)], "end": str(self._end)})

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None and self._end.exists():
            self.returncode = int(self._end.read_text())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(request: dict[str, Any], ranks: int) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder, name)) for name in ("out", "err")]
        code = _ask({"environ": dict(os.environ), "ranks": ranks, "streams": streams} | request)
        out, err = (Path(stream).read_text(encoding="utf-8", errors="replace") for stream in streams)
    return subprocess.CompletedProcess(request.get("argv", request.get("call")), code, out, err)


def _ask(request: dict[str, Any]) -> int:
    zygote = _zygote()
    assert zygote.stdin is not None and zygote.stdout is not None
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    return int(zygote.stdout.readline())


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(process.kill)
    return process


def _serve() -> None:
    """Answer each request with the exit code, or with the pid of what is to go on running."""
    import matplotlib.figure
    import pydantic
    import pytest
    from matplotlib.backends import backend_agg
    from torch.utils import tensorboard

    import trainer.exporting.directory
    import trainer.exporting.meta
    import trainer.exporting.program
    import trainer.loop
    import trainer.pretrained

    assert all((matplotlib.figure, pydantic, pytest, backend_agg, tensorboard, trainer.exporting.program))

    for line in sys.stdin:
        request = json.loads(line)
        if "end" in request:
            pid = _detached(Path(request["end"]))
            if not pid:
                _become(request, request["environ"])
                return
            print(pid, flush=True)
            continue
        children = set()
        for environment in _environments(request):
            child = os.fork()
            if not child:
                _become(request, environment)
                return
            children.add(child)
        print(_first_failure(children), flush=True)


def _detached(end: Path) -> int:
    """As `os.fork`, for a child of a process between, which waits for it and writes its exit code into a file."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with open(reader, "rb") as pipe:
            return int(pipe.read())
    os.close(reader)
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.setsid()
        return 0
    os.write(writer, str(pid).encode())
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end.with_suffix(".tmp").write_text(str(code))
    end.with_suffix(".tmp").rename(end)
    os._exit(0)


def _environments(request: dict[str, Any]) -> list[dict[str, str]]:
    """One for each process to fork."""
    environment, ranks = {**request["environ"], "OMP_NUM_THREADS": "1"}, request.get("ranks", 0)
    if not ranks:
        return [environment]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(port)}
    return [{**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _first_failure(children: set[int]) -> int:
    """0, or the exit code of the first process that failed. Then the others have some seconds to say what they notice
    of it, before they are killed."""
    found, deadline = 0, float("inf")
    while children:
        child, status = os.waitpid(-1, os.WNOHANG if found else 0)
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not found:
            found, deadline = code, time.monotonic() + _LAST_WORDS
        elif not child:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                deadline = float("inf")
                for other in children:
                    os.kill(other, signal.SIGKILL)
    return found


def _become(request: dict[str, Any], environment: dict[str, str]) -> None:
    for number, path in enumerate([os.devnull, *request["streams"]]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the zygote's had read ahead
    os.environ.clear()
    os.environ.update(environment)
    if "call" in request:
        sys.path[0] = str(REPOSITORY)
        module, name, *arguments = request["call"]
        _exit(_code_of(lambda: getattr(importlib.import_module(module), name)(int(environment["RANK"]), *arguments)))
    os.chdir(request.get("cwd", REPOSITORY))
    sys.argv[:] = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    _exit(_code_of(lambda: runpy.run_path(sys.argv[0], run_name="__main__")))


def _code_of(program: Callable[[], object]) -> object:
    """What the program exits with, as the interpreter has it."""
    try:
        program()
    except SystemExit as error:
        return error.code
    except BaseException:  # noqa: BLE001 - printed, and 1 returned, as by the interpreter
        traceback.print_exc()
        return 1
    return None


def _exit(code: object) -> NoReturn:
    """As the interpreter does, but without taking torch apart module by module, which costs seconds in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
