"""A function in a fresh interpreter: for what must not meet the memory of earlier work, or may run out of it.

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
    """What ``target(*arguments)`` returns in a fresh process of the same package, with as many threads.

    Args:
        target: ``"package.module:function"``.
        arguments: what JSON can hold. So is the result.
        memory_limit: bytes of private memory that the process may map (``RLIMIT_DATA``: its heap and anonymous
            mappings, thread stacks among them, touched or not); None for no limit. Other systems than Linux have none.
        timeout: seconds; :class:`subprocess.TimeoutExpired` after them.
        environment: variables to set, besides this process's own.

    Raises:
        OutOfMemory: memory was refused, or the process was killed as the system does when there is none left.
        Failed: anything else went wrong.
    """
    import torch

    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(torch.get_num_threads())
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = {"target": target, "arguments": arguments, "memory_limit": memory_limit, "result": str(result)}
        command = [sys.executable, "-m", "selfsup_kernels.lab.fresh", json.dumps(request)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
        answer = json.loads(result.read_text()) if result.exists() else {}
    if done.returncode == 0 and "value" in answer:
        return answer["value"]
    said = done.stderr.strip()[-2000:]
    if answer.get("refused") or killed(done.returncode) or _refused(said):
        raise OutOfMemory(f"{target}{arguments}: out of memory\n{said}")
    raise Failed(f"{target}{arguments} failed with status {done.returncode}:\n{said}")


def killed(status) -> bool:
    return hasattr(signal, "SIGKILL") and status == -signal.SIGKILL


def _refused(text) -> bool:
    """A process that aborts says why on its way out; the last lines decide."""
    from selfsup_kernels.lab import host_memory

    last = "\n".join(text.splitlines()[-5:])
    return any(words in last for words in (*host_memory.REFUSALS, "Thread creation failed"))


def main(request) -> int:
    if request["memory_limit"] is not None and sys.platform.startswith("linux"):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (request["memory_limit"],) * 2)
    module, function = request["target"].split(":")
    try:
        answer = {"value": getattr(importlib.import_module(module), function)(*request["arguments"])}
    except Exception as error:
        from selfsup_kernels.lab import host_memory

        Path(request["result"]).write_text(json.dumps({"refused": host_memory.refused(error)}))
        raise
    Path(request["result"]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
