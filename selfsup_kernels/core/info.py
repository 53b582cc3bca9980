"""The ``info`` command: what this machine runs, what is missing, why, and what to type."""

import importlib
import importlib.util
import json
import os
import platform
import sys
import warnings

IMPLEMENTATIONS = {
    "reference": "eager PyTorch, every device",
    "cpu": "C++ kernels for the CPU",
    "triton": "InfoNCE and SigLIP on GPUs, Triton kernels",
    "cuda": "BYOL, EMA and optimizers on NVIDIA GPUs, CUDA C++ kernels",
}

_PAGE = ("numpy", "matplotlib", "jinja2")
COMMANDS = {
    "bench": ("rich", "psutil", *_PAGE),
    "profile": (*_PAGE, "rich", "psutil"),
    "demo": ("sklearn", *_PAGE, "rich", "psutil"),
}
"""The packages that each command needs in addition to those of the losses (the extras of pyproject.toml)."""


def main(as_json=False, verbose=False) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else render(facts, verbose))
    return 0


def collect() -> dict:
    """Return everything that ``info`` prints, as plain data. Never raises: a failing probe returns its error."""
    return {
        "selfsup_kernels": _probe(_package_version),
        "location": _probe(_location),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _probe(lambda: importlib.import_module("torch").__version__),
        "triton": _probe(_triton_version),
        "ahead": _probe(_ahead),
        "cpu": cpu(),
        "cuda": _probe(_cuda),
        "implementations": {name: _probe(lambda name=name: _implementation(name)) for name in IMPLEMENTATIONS},
        "auto": _probe(_auto),
        "extension": _probe(_extension),
        "cuda_library": _probe(_cuda_library),
        "commands": {name: _probe(lambda name=name: missing(name)) for name in COMMANDS},
    }


def cpu() -> dict:
    """Return the CPU and how much of it torch uses. The demo prints it next to its numbers."""
    return {
        "model": _probe(_cpu_model),
        "cores": os.cpu_count(),
        "threads": _probe(lambda: importlib.import_module("torch").get_num_threads()),
        "capability": _probe(lambda: importlib.import_module("torch").backends.cpu.get_cpu_capability()),
    }


def _probe(function):
    try:
        return function()
    except Exception as error:  # any failure is worth reporting
        return {"error": f"{type(error).__name__}: {error}"}


def _package_version():
    from selfsup_kernels.version import __version__

    return __version__


def _location():
    from selfsup_kernels.core import build

    return {"package": str(build.PACKAGE), "source": build.SOURCE is not None}


def missing(command, page=True) -> list[str]:
    """Return the packages that ``command`` needs and that are not installed; ``page``: if it writes an HTML page."""
    needed = (name for name in COMMANDS[command] if page or name not in _PAGE)
    return [name for name in needed if not _is_installed(name)]


def _is_installed(name):
    return importlib.util.find_spec(name) is not None


def install(names) -> str:
    """Return the command that installs packages. It names no extra of ours, since pip would rebuild the kernels."""
    return f"pip install {' '.join('scikit-learn' if name == 'sklearn' else name for name in names)}"


def _triton_version():
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _ahead():
    """Return how many Triton kernels are compiled ahead of time, by architecture, and why the install compiled none."""
    from selfsup_kernels.core import build
    from selfsup_kernels.tiles import archive

    opened = archive.opened()
    counts = {} if opened is None else {f"sm_{a}": len(opened.entries(a)) for a in opened.architectures}
    return {"kernels": counts, "failure": build.record().get("ahead_failure")}


def _cpu_model():
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cuda():
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_gib": round(d.total_memory / 2**30, 1)}
        for d in devices
    ]


def _implementation(name):
    from selfsup_kernels.core import backends, build

    reason = _no_gpu(name) if name in ("triton", "cuda") else None
    reason = reason or backends.unavailable(name)
    if reason is None:
        return {"available": True, "reason": None, "command": None}
    why, command = reason
    if name == "cpu" and command and (lacking := build.cannot_compile()):
        why, command = f"{why} There is {lacking[0]}", lacking[1] + command
    toolkit = _toolkit() if name == "cuda" and command else {}
    if "missing" in toolkit:
        why, command = f"{why} {toolkit['missing']}", None
    return {"available": False, "reason": why, "command": command}


def _no_gpu(name):
    """Return why there is no GPU, or None. ``backends`` does not ask at import: CUDA once initialised breaks forks."""
    import torch

    from selfsup_kernels.core import backends

    if backends.emulated(name) or torch.cuda.is_available():
        return None
    return backends.Unavailable("no NVIDIA GPU was found.")


def _auto():
    import torch

    from selfsup_kernels.core import backends

    with warnings.catch_warnings():  # the report has the same information
        warnings.simplefilter("ignore", RuntimeWarning)
        return backends.select("auto", torch.empty(0))


def _extension():
    from selfsup_kernels.core import backends, build

    module, reason = backends.load_extension()
    facts = {"loaded": module is not None, "reason": reason, "compiler": build.compiler(), "record": build.record()}
    if module is not None:
        facts["cpu_capability"] = _probe(lambda: module.cpu_capability())
        facts["build_info"] = _probe(lambda: dict(module.build_info()))
    return facts


def _cuda_library():
    """Describe the CUDA library in the package's folder, even if this torch cannot load it."""
    from selfsup_kernels.core import backends, build

    path, missing = build.cuda_library()
    loaded, reason = backends.load_cuda()
    record = {k.removeprefix("cuda_"): v for k, v in build.record().items() if k.startswith("cuda_")}
    return {
        "path": path and str(path),
        "reason": missing,
        "loaded": loaded is not None and path is not None and str(loaded) == str(path),
        "not_loaded": reason,
        "record": record,
        "toolkit": _toolkit(),
    }


def _toolkit():
    """Return the compiler that a build would use, or what is missing and what to do about it."""
    from selfsup_kernels.core import build_cuda

    try:
        kit = build_cuda.toolkit()
    except build_cuda.Unavailable as error:
        return {"missing": str(error)}
    return {"nvcc": str(kit.nvcc), "version": kit.name}


def _describe_ahead(ahead, triton):
    if "error" in ahead:
        return _text(ahead)
    kernels = ", ".join(f"{count} for {architecture}" for architecture, count in ahead["kernels"].items())
    if kernels:
        return f"compiled ahead of time: {kernels}"
    failure = f"; in the install {ahead['failure']}" if ahead["failure"] else ""
    return f"compiled in first calls on a GPU, for seconds{failure}" if triton else f"none{failure}"


def render(facts, verbose=False) -> str:
    """Return the report as text; ``verbose`` adds how the libraries were built, and if a CUDA library can be built."""
    location = facts["location"]
    where = _text(location)
    if "package" in location:
        where = f"in {location['package']}{', a source folder' * location['source']}"
    lines = [
        f"selfsup_kernels  {_text(facts['selfsup_kernels'])} {where}",
        f"Python           {facts['python']} on {facts['platform']}",
        f"torch            {_text(facts['torch'])}",
        f"triton           {_text(facts['triton'] or 'not installed')}",
        f"Triton kernels   {_describe_ahead(facts['ahead'], facts['triton'])}",
        f"CPU              {describe_cpu(facts['cpu'])}",
    ]
    cuda = facts["cuda"]
    if isinstance(cuda, list):
        names = [f"{d['name']} (compute capability {d['capability']}, {d['memory_gib']} GiB)" for d in cuda]
        lines.append(f"CUDA devices     {', '.join(names) or 'none'}")
    else:
        lines.append(f"CUDA devices     {_text(cuda)}")

    lines += ["", f"Implementations (impl='auto' on CPU tensors: {_text(facts['auto'])})"]
    extension = facts["extension"]
    for name, state in facts["implementations"].items():
        available = state.get("available", False)
        as_what = name == "cpu" and available and "cpu_capability" in extension
        runs = f", run as {_text(extension['cpu_capability'])}" if as_what else ""
        lines.append(f"  {name:<10} {'yes' if available else 'no ':<4} {IMPLEMENTATIONS[name]}{runs}")
        if not available:
            lines.append(f"             why: {state.get('reason') or _text(state)}")
        if not available and cuda and name in ("triton", "cuda"):
            lines.append("             so:  on GPU tensors these run as PyTorch's own operators (impl='reference')")
        if state.get("command"):
            lines.append(f"             run: {state['command']}")

    lines += ["", "Commands"]
    for name, absent in facts["commands"].items():
        known = isinstance(absent, list)
        lines.append(
            f"  {name:<10} {'no ' if absent else 'yes'}" + (f"  needs {', '.join(absent)}" if known and absent else "")
        )
        if absent:
            lines.append(f"             run: {install(absent)}" if known else f"             why: {_text(absent)}")
    if verbose or "error" in extension:
        lines += _render_extension(extension)
    library = facts["cuda_library"]
    if verbose or cuda or library.get("path"):
        lines += _render_cuda_library(library)
    return "\n".join(lines)


def _render_extension(extension):
    lines = ["", f"C++ extension    {'loaded' if extension.get('loaded') else 'not loaded'}"]
    if "error" in extension:
        lines.append(f"  {_text(extension)}")
    for title in ("build_info", "record"):
        if extension.get(title):
            lines.append(f"  {'build' if title == 'build_info' else 'build record'}")
            # The CUDA library's entries are printed below.
            items = sorted((k, v) for k, v in extension[title].items() if not k.startswith("cuda_"))
            lines += [f"    {key:<14} {value}" for key, value in items]
    return lines


def _render_cuda_library(library):
    if "error" in library:
        return ["", f"CUDA library     {_text(library)}"]
    record, toolkit = library["record"], library["toolkit"]
    state = "loaded" if library["loaded"] else "not loaded" if library["path"] else "not built"
    lines = ["", f"CUDA library     {state}"]
    if library["path"]:
        built = f"for {record.get('architectures', '?')}, by CUDA {record.get('toolkit', '?')}, its runtime inside"
        lines.append(f"  built          {built}")
    if not library["loaded"]:
        lines.append(f"  why            {library['not_loaded'] if library['path'] else library['reason']}")
    found = toolkit.get("nvcc") and f"{toolkit['nvcc']} (CUDA {toolkit['version']})"
    lines.append(f"  nvcc           {found or toolkit['missing']}")
    return lines


def describe_cpu(facts) -> str:
    cores, threads = facts["cores"], facts["threads"]
    return (
        f"{_text(facts['model'])}, {cores} core{'s' * (cores != 1)}, {_text(threads)} thread{'s' * (threads != 1)} in"
        f" torch ({_text(facts['capability'])})"
    )


def _text(value) -> str:
    return f"unknown ({value['error']})" if isinstance(value, dict) and "error" in value else str(value)


if __name__ == "__main__":
    sys.exit(main("--json" in sys.argv[1:]))
