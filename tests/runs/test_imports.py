"""Importing changes nothing in the process, and little is imported where little is needed."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.unit.test_architecture import PACKAGES, imports, module_of, sources

STATE = """
import atexit, faulthandler, gc, json, logging, multiprocessing, os, signal, sys, threading, warnings

def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path),
        "group": os.getpgrp(), "session": os.getsid(0),
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "wakeup": signal.set_wakeup_fd(-1),
        "warnings": [str(item) for item in warnings.filters], "show": str(warnings.showwarning),
        "at exit": atexit._ncallbacks(), "faults": faulthandler.is_enabled(), "collector": gc.get_threshold(),
        "hooks": [str(hook) for hook in (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)],
        "threads": [thread.name for thread in threading.enumerate()], "recursion": sys.getrecursionlimit(),
        "logging": [str(logging.root.handlers), logging.root.level, logging.root.manager.disable],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "torch": [sys.modules["torch"].get_num_threads(), str(sys.modules["torch"].get_default_dtype()),
                  sys.modules["torch"].backends.cudnn.benchmark] if "torch" in sys.modules else None,
        "fork": list(forks),
    }

forks = []
"""


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_every_module_changes_nothing_in_the_process() -> None:
    """What libraries do when they are imported is theirs: all that our modules import at their top comes first."""
    ours = [module_of(REPOSITORY, path).removesuffix(".__init__") for path in sources(REPOSITORY)
            if path.name != "__main__.py"]
    theirs = sorted({name for path in sources(REPOSITORY) for name in imports(path)
                     if name.split(".")[0] not in (*PACKAGES, "__future__", "wandb")})
    program = f"""{STATE}
import contextlib, importlib
for name in {theirs!r}:
    with contextlib.suppress(ModuleNotFoundError):  # a name imported from a package
        importlib.import_module(name)
before = state()
os.register_at_fork = lambda **hooks: forks.append(str(hooks))
for name in {ours!r}:
    importlib.import_module(name)
after = state()
print(json.dumps({{name: [before[name], after[name]] for name in before if before[name] != after[name]}}))
"""
    assert json.loads(python(program)) == {}


def test_reading_a_folder_needs_no_client_of_object_storage_and_no_torch() -> None:
    program = "import sys, shards; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(python(program).split())
    assert {"numpy", "PIL", "msgpack", "simplejpeg"} <= loaded
    assert not loaded & {"torch", "obstore", "tenacity", "pydantic", "yaml", "tqdm", "transformers", "urllib3"}
