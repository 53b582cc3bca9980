"""Compare launches of machine code that was compiled ahead of time with Triton's. Prints as JSON what
`test_ahead.py` checks. TRITON_DISABLE_LINE_INFO is set, as for the archive: instructions are compared."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import stub_driver
import torch
import triton
from cases import Case, differences

from selfsup_kernels import _C
from selfsup_kernels.core import validate
from selfsup_kernels.tiles import archive, rows

torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
stub = stub_driver.install(folder)
if not stub.in_place():
    print(json.dumps({"skip": "another libcuda.so.1 is loaded"}))
    sys.exit()


path = folder / "kernels.zip"
shapes = ["--arch", "90", "--dtype", "bfloat16", "--dim", "64", "512", "--out", str(path)]
command = [sys.executable, "-m", "selfsup_kernels.lab.ahead", *shapes]
printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
os.environ["SELFSUP_KERNELS_ARCHIVE"] = str(path)


def compared(case):
    """Return how many launches Triton made although the archive has them, and what is wrong with the others: in the
    first call, and in one that replays it."""
    with mock.patch.object(archive, "opened", return_value=None):
        expected, made = case.by_python()
    _C.tape.clear()
    found = [case.run(), case.run()]
    wrong = [text for launches in found for text in differences(case, expected, made, launches)]
    return sum(not x.replayed for launches in found for x in launches), wrong


cases = {
    "small": {},
    "other samples": {"batch": 129},
    "many rows": {"batch": 16384},
    "long rows": {"dim": 512},
    "many long rows": {"dim": 512, "batch": 8192},
    "temperature": {"temperature": torch.tensor(0.2)},
    "temperature that requires grad": {"temperature": torch.tensor(0.2, requires_grad=True)},
    "queue": {"queue": 70, "objective": "cross_view"},
    "labels": {"labels": torch.arange(100) % 7},
}
found = {"printed": printed, "same": {name: compared(Case(**options)) for name, options in cases.items()}}

# What the archive does not have, Triton compiles: those of the kernels, and no others.
apart = torch.randn(100 * 64 + 1, dtype=torch.bfloat16)[1:].view(100, 64)
others = {
    "width": Case(dim=100),
    "dtype": Case(dtype=torch.float16),
    "alignment": Case(given=[apart, apart]),
    "normalize": Case(normalize=False),
    "loss of each anchor": Case(reduction="none"),
}
found["others"] = {name: compared(case) for name, case in others.items()}


def by_triton(case):
    _C.tape.clear()
    return sorted({x.replayed for x in case.run()}) == [False]


def watch(*arguments):
    pass


hooks = triton.knobs.runtime
hooks.launch_enter_hook.add(watch) if hasattr(hooks.launch_enter_hook, "add") else setattr(
    hooks, "launch_enter_hook", watch
)
found["hooked"] = by_triton(Case())
hooks.launch_enter_hook.remove(watch) if hasattr(hooks.launch_enter_hook, "remove") else setattr(
    hooks, "launch_enter_hook", None
)


def opens(environment, digest=None):
    archive.opened.cache_clear()
    with (
        mock.patch.dict(os.environ, {"SELFSUP_KERNELS_ARCHIVE": environment}),
        mock.patch.object(archive, "source_digest", return_value=digest) if digest else contextlib.nullcontext(),
    ):
        opened = archive.opened() is not None
    archive.opened.cache_clear()
    return opened


broken = folder / "broken.zip"
broken.write_bytes(path.read_bytes()[:5000])
found["opens"] = {
    "it": opens(str(path)),
    "off": opens("0"),
    "other kernels": opens(str(path), "0"),
    "broken": opens(str(broken)),
    "missing": opens(str(folder / "none.zip")),
}
opened = archive.opened()
sum_options = {"BLOCK": rows.SUM_BLOCK, "num_warps": 16}


def has(capability):
    values = torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64), 4
    return opened.find("sum_kernel", capability, torch.device("cpu"), values, sum_options) is not None


found["architectures"] = {"90": has(90), "80": has(80), "103": has(103)}
found["refused"] = list(stub.refused)


# A file that is cut off after it was opened, and a driver that takes no code: what Triton has compiled is launched.
def warned(case):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        validate._warned.discard("archive")
        launched = by_triton(case)
    return [launched, *(str(w.message) for w in seen)]


case = Case(dtype=torch.bfloat16)
with mock.patch.object(archive, "opened", return_value=None):
    case.by_python()
cut = folder / "cut.zip"
cut.write_bytes(path.read_bytes())
with mock.patch.object(archive, "opened", return_value=archive.Archive(cut)):
    cut.write_bytes(path.read_bytes()[:5000])
    found["cut"] = warned(case)
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
refusing = kind(lambda image: -1)
slot = ctypes.c_void_p.in_dll(stub.library, "stub_load")
loading, slot.value = slot.value, ctypes.cast(refusing, ctypes.c_void_p).value
with mock.patch.object(archive, "opened", return_value=archive.Archive(path)):
    found["unloadable"] = warned(case)
slot.value = loading

# A process without Triton.
script = Path(__file__).with_name("without_triton.py")
done = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True)
found["without Triton"] = json.loads(done.stdout) if done.returncode == 0 else done.stderr[-2000:]
print(json.dumps(found))
