"""Compare the launches of replayed tapes with those of the Python launchers, and print as JSON what `test_tape.py`
checks. Launches are compared byte for byte; addresses must lie at the same places of the same tensors."""

import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
from pathlib import Path

import stub_driver
import torch
import triton
from cases import Case, Watched, differences

import selfsup_kernels as sk
from selfsup_kernels import _C
from selfsup_kernels.tiles import configs, launcher, tape

torch.set_num_threads(1)
torch.manual_seed(0)
os.environ["SELFSUP_KERNELS_ARCHIVE"] = "0"
stub = stub_driver.install(Path(tempfile.mkdtemp()))
if not stub.in_place():
    print(json.dumps({"skip": "another libcuda.so.1 is loaded"}))
    sys.exit()


def replayed(case):
    """Record a call and replay it. Return how many launches still came from Python, and what is wrong with them."""
    expected, made = case.by_python()
    launches = case.run()
    return sum(not x.replayed for x in launches), list(differences(case, expected, made, launches))


def after(first, then, between=contextlib.nullcontext):
    """Return what is wrong with the launches of ``then`` if ``first`` has left its tapes."""
    with between():
        expected, made = then.by_python()
    first.by_python()
    first.run()
    with between():
        return list(differences(then, expected, made, then.run()))


@contextlib.contextmanager
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def other_tiles():
    entry = configs.lookup("masked_sums", 90, torch.bfloat16, 64)
    with configs.override({"masked_sums": entry._replace(num_warps=8 if entry.num_warps == 4 else 4)}):
        yield


@contextlib.contextmanager
def watching():
    launch, seen = launcher.launch, []
    launcher.launch = lambda *a, **o: (seen.append(a), launch(*a, **o))
    try:
        yield seen
    finally:
        launcher.launch = launch


cases = {
    "list of views": {},
    "three views": {"views": 3, "objective": "pairwise"},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "queue": {"queue": 70},
    "core view": {"views": 3, "core_view": 1},
    "temperature as a tensor": {"temperature": torch.tensor(0.2)},
    "temperature that requires grad": {"temperature": torch.tensor(0.2, requires_grad=True)},
    "rows as given": {"normalize": False},
    "sum": {"reduction": "sum"},
    "cross_view": {"objective": "cross_view"},
    "one feature": {"dim": 1},
    "long rows": {"dim": 600},
    "many rows": {"batch": 4096, "dim": 256},
    "labels": {"labels": torch.arange(100) % 7},
    "labels and a queue": {"labels": torch.arange(100, dtype=torch.uint8) % 7, "queue": 70},
    "labels across views": {"labels": torch.arange(100) % 7, "objective": "cross_view"},
    "duplicates": {"duplicates": torch.arange(200, dtype=torch.int16)[::2] % 7},
    "logq": {"logq": torch.linspace(-1, 1, 100)},
    "loss of each anchor": {"reduction": "none"},
    "loss of each anchor with labels": {"reduction": "none", "labels": torch.arange(100) % 7},
}
found = {"same": {name: replayed(Case(**options)) for name, options in cases.items()}}

# Tapes with a fault. A kernel for addresses that are not aligned has the same name, grid and parameters.
before = len(stub.launches)
Case().by_python()
Case(given=[torch.randn(100 * 64 + 1, dtype=torch.bfloat16)[1:].view(100, 64) for _ in range(2)]).by_python()
unaligned = Watched.all[0].launches[0].function
variants = {launch.variant for launch in stub.launches[before:] if launch.kernel == "load_rows_kernel"}
faults = {
    "a launch less": lambda t: t._replace(launches=t.launches[:-1]),
    "two launches exchanged": lambda t: t._replace(launches=[t.launches[1], t.launches[0], *t.launches[2:]]),
    "another variant": lambda t: t._replace(launches=[*map(for_unaligned_rows, t.launches)]),
    "another grid": lambda t: changed(t, grid=(7, 1, 1)),
    "less shared memory": lambda t: changed(t, shared_bytes=t.launches[1].shared_bytes - 16),
    "two pointers exchanged": lambda t: changed(t, parameters=exchanged(t.launches[1].parameters)),
    "another number": lambda t: changed(t, parameters=[*map(incremented, t.launches[1].parameters)]),
    "another box": lambda t: changed(t, parameters=[*map(halved, t.launches[1].parameters)]),
    "no workspace of its own": lambda t: t._replace(launches=[*map(in_the_workspace, t.launches)]),
}
if len(variants) == 1 and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):  # the same code for both
    del faults["another variant"]


def changed(t, **fields):
    return t._replace(launches=[t.launches[0], t.launches[1]._replace(**fields), *t.launches[2:]])


def for_unaligned_rows(launch):
    return launch._replace(function=unaligned) if launch.name == "load_rows_kernel" else launch


def exchanged(parameters):
    one, other, *_ = [i for i, p in enumerate(parameters) if p.kind == "pointer"]
    parameters = list(parameters)
    parameters[one], parameters[other] = parameters[other], parameters[one]
    return parameters


def incremented(p):
    return p._replace(value=bytes([p.value[0] ^ 1, *p.value[1:]])) if len(p.value or ()) == 4 else p


def halved(p):
    return p._replace(value=p.value._replace(box=[n // 2 for n in p.value.box])) if p.kind == "map" else p


def in_the_workspace(launch):
    """Put all that the launch takes from the workspace at its start."""
    slot = max(p.value.slot for p in launch.parameters if p.kind == "pointer")
    start = tape.Address(slot, 0)
    moved = [p._replace(value=start) if p.kind == "pointer" and p.value.slot == slot else p for p in launch.parameters]
    return launch._replace(parameters=moved)


def with_fault(fault, case):
    class Faulty(Watched):
        def tape(self, returned):
            return fault(super().tape(returned))

    tape.Recorder = Faulty
    try:
        return replayed(case)[1]
    finally:
        tape.Recorder = Watched


found["planted"] = {}
for name, fault in faults.items():
    found["planted"][name] = with_fault(fault, Case(temperature=torch.tensor(0.2, requires_grad=True)))
del stub.refused[:]

# Calls that a tape does not cover go through Python each time: the kernels of their forward, or of their backward.
uncovered = {
    "columns apart": (
        Case(given=[torch.randn(100, 128, dtype=torch.bfloat16)[:, ::2] for _ in range(2)]),
        {"load_rows_kernel"},
    ),
    "a copy beside an expanded view": (
        Case(given=[torch.randn(1, 64).bfloat16().expand(100, 64), torch.randn(100, 128).bfloat16()[:, ::2]]),
        {"load_rows_kernel"},
    ),
}
found["uncovered"] = {}
for name, (case, kernels) in uncovered.items():
    case.run()
    found["uncovered"][name] = [x.kernel for x in case.run() if x.replayed and x.kernel in kernels]

# Ways in which a signature could lie.
x, y = (torch.randn(100, 64, dtype=torch.bfloat16) for _ in range(2))
wide = torch.randn(100, 72, dtype=torch.bfloat16)
flat = torch.randn(100 * 64 + 1, dtype=torch.bfloat16)
tensors = torch.linspace(0.1, 0.2, 3)
plain = Case(given=[x, y])
pairs = {
    "other tensors": (plain, Case()),
    "exchanged": (plain, Case(given=[y, x])),
    "one tensor twice": (Case(given=[x, x]), plain),
    "no longer twice": (plain, Case(given=[x, x])),
    "a queue that is a view": (Case(given=[x, y], temperature=0.1), Case(given=[x, y], queue=100)),
    "strides": (plain, Case(given=[wide[:, :64], y])),
    "strides of the other view": (plain, Case(given=[x, wide[:, :64]])),
    "alignment": (plain, Case(given=[x, flat[1:].view(100, 64)])),
    "dtype": (plain, Case(dtype=torch.float16)),
    "samples": (plain, Case(batch=101)),
    "two samples": (plain, Case(batch=2)),
    "features": (plain, Case(dim=60)),
    "views": (plain, Case(views=3)),
    "temperature": (Case(given=[x, y], temperature=0.1), Case(given=[x, y], temperature=1 / 3)),
    "temperature becomes a tensor": (Case(given=[x, y], temperature=0.1), Case(given=[x, y], temperature=tensors[0])),
    "temperature's place": (Case(given=[x, y], temperature=tensors[0]), Case(given=[x, y], temperature=tensors[1])),
    "eps": (plain, Case(given=[x, y], eps=1e-6)),
    "normalize": (plain, Case(given=[x, y], normalize=False)),
    "reduction": (plain, Case(given=[x, y], reduction="sum")),
    "objective": (plain, Case(given=[x, y], objective="decoupled")),
    "core view": (Case(views=3, core_view=0), Case(views=3, core_view=2)),
    "queue's length": (Case(queue=70), Case(queue=71)),
    "upstream gradient": (plain, Case(given=[x, y], reduce=lambda loss: torch.stack([loss, loss])[1] * 2.5)),
    "labels": (Case(given=[x, y], labels=torch.arange(100) % 7), Case(given=[x, y], labels=torch.arange(100) // 7)),
    "labels' dtype": (
        Case(given=[x, y], labels=torch.arange(100) % 7),
        Case(given=[x, y], labels=torch.arange(100, dtype=torch.int16) % 7),
    ),
    "labels' strides": (
        Case(given=[x, y], labels=torch.arange(100)),
        Case(given=[x, y], labels=torch.arange(200)[::2]),
    ),
    "weights of the anchors": (
        Case(given=[x, y], reduction="none"),
        Case(given=[x, y], reduction="none", reduce=lambda loss: (loss * torch.ones(2, 100)).sum()),
    ),
    "upstream gradient's dtype": (plain, Case(given=[x, y], reduce=lambda loss: loss.float())),
}
found["lies"] = {name: after(*pair) for name, pair in pairs.items()}
full = Case(dtype=torch.float32)
found["lies"] |= {
    "TF32": after(full, full, tf32),
    "deterministic": after(plain, plain, stub_driver.deterministic),
    "tiles": after(plain, plain, other_tiles),
    "a tool that watches": after(plain, plain, watching),
}

# Threads: each its own sizes, all at once, with tapes of their own.
_C.tape.clear()
sizes = [33, 34, 35, 36]
kept = {n: Case(batch=n) for n in sizes}
for case in kept.values():
    case.run()
before, errors = len(stub.launches), []


def repeat(case):
    try:
        for _ in range(20):
            case.run()
    except Exception as error:
        errors.append(repr(error))


threads = [threading.Thread(target=repeat, args=(case,)) for case in kept.values()]
[t.start() for t in threads]
[t.join() for t in threads]
found["threads"] = {"errors": errors, "python": sum(not x.replayed for x in stub.launches[before:])}

# A forked process cannot use the driver. What it raises comes through a pipe.
case = kept[33]
read, write = os.pipe()
if os.fork() == 0:
    try:
        case.run()
    except RuntimeError as error:
        os.write(write, str(error).encode())
    os._exit(0)
os.close(write)
with open(read) as answer:
    found["forked"] = answer.read()
os.wait()

# Not enough memory for a replay: Python's allocation raises.
case = Case(batch=20_000, dim=16, views=2)
case.run()
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
try:
    blocks = []
    with contextlib.suppress(RuntimeError, MemoryError):  # what the allocator has left
        while True:
            blocks.append(torch.empty(200_000, dtype=torch.uint8))
    case.run()
    found["without memory"] = "nothing raised"
except RuntimeError as error:
    found["without memory"] = str(error)
finally:
    del blocks
    resource.setrlimit(resource.RLIMIT_AS, limits)

# Signatures without end. Most of a call's own time is that of the stub, which can be turned off.
stub.watch(False)
small = [torch.randn(2, 16, dtype=torch.bfloat16) for _ in range(2)]
most = 0
for i in range(3000):
    sk.info_nce_loss(small, impl="triton", eps=1e-12 * (1 + i))
    most = max(most, _C.tape.size())
found["known"] = most
stub.watch(True)

found["refused"] = list(stub.refused)
found["versions"] = [torch.__version__, triton.__version__]
print(json.dumps(found))
