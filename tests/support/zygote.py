"""Entry points as processes that need not import torch and transformers again: forked from one that has.

What a test starts this way behaves like `python program arguments`: own process, environment, output and exit code. It
saves seconds of imports for each. Not for programs that are to be found by their environment in /proc, or under limits.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def run_forked(program: Path, *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Same as `subprocess.run([python, program, *arguments], cwd=cwd, capture_output=True, text=True)`."""
    command = [str(program), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder, name)) for name in ("out", "err")]
        zygote = _zygote()
        assert zygote.stdin is not None and zygote.stdout is not None
        request = {"argv": command, "environ": {**os.environ, "OMP_NUM_THREADS": "1"}, "streams": streams,
                   "cwd": str(cwd)}
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        out, err = (Path(stream).read_text(encoding="utf-8", errors="replace") for stream in streams)
    return subprocess.CompletedProcess(command, code, out, err)


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(process.kill)
    return process


def _serve() -> None:
    """Fork for each request; reply with the exit code."""
    import trainer.export_formats
    import trainer.loop
    import trainer.pretrained  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _become(request: dict[str, Any]) -> None:
    for number, path in enumerate([os.devnull, *request["streams"]]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the zygote's had read ahead
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code: object = None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - what Python does with it: print it, and exit with 1
        traceback.print_exc()
        code = 1
    _exit(code)


def _exit(code: object) -> None:
    """Exit like the interpreter, but without tearing down torch module by module, which takes seconds in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
