"""Peak memory of one piece of work, as the operating system saw it.

Run it in a fresh process: an allocator that keeps what earlier work has freed would hide what this work needs.
"""

import contextlib
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_growth(work) -> int | None:
    """Bytes by which the resident set rose above its level at the start while ``work()`` ran; None if not known."""
    if _field("VmHWM") is not None:
        # 5 sets the high-water mark back to the present level. Where that is not allowed the mark of the imports
        # stands, and a growth below it reads as zero.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        start = _field("VmHWM")
        work()
        return _field("VmHWM") - start
    try:
        import resource
    except ImportError:
        work()
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * unit


def _field(name) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def available() -> int:
    import psutil

    return psutil.virtual_memory().available
