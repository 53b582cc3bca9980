"""Call a function in a fresh interpreter, whose memory shows nothing of earlier work and may be limited.

``python -m selfsup_kernels.lab.fresh`` is the other end.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


class Failed(RuntimeError):
    """The function raised, or the process ended without a result; the message has the end of what it printed."""


class OutOfMemory(Failed):
    """The process could not get the memory that it asked for, or was killed."""


def call(target, *arguments, memory_limit=None, timeout=None, environment=None):
    """Return what ``target(*arguments)`` returns in a fresh process of the same package, with as many threads.

    Args:
        target: ``"package.module:function"``.
        arguments: what JSON can hold. So is the result.
        memory_limit: bytes of private memory that the process may map (``RLIMIT_DATA``); None for no limit. Linux only.
        timeout: seconds; :class:`subprocess.TimeoutExpired` after them.
        environment: variables to set in addition to this process's own.

    Raises:
        OutOfMemory: memory was refused, or the process was killed as the system does when there is none left.
        Failed: anything else went wrong.
    """
    import torch

    from selfsup_kernels.lab import host_memory

    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = json.dumps([target, arguments, memory_limit, str(result)])
        command = [sys.executable, "-m", "selfsup_kernels.lab.fresh", request]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=timeout)
        if done.returncode == 0 and result.exists():
            return json.loads(result.read_text())
    said = done.stderr.strip()[-2000:]
    last = "\n".join(said.splitlines()[-5:])  # an exception's name, or why a process has aborted
    killed = done.returncode == -getattr(signal, "SIGKILL", 9)
    if killed or any(words in last for words in host_memory.REFUSALS):
        raise OutOfMemory(f"{target}{arguments}: out of memory\n{said}")
    raise Failed(f"{target}{arguments} failed with status {done.returncode}:\n{said}")


def main(target, arguments, memory_limit, result):
    if memory_limit is not None and sys.platform.startswith("linux"):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(*arguments)
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
