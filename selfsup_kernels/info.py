"""What this machine runs, what is missing, why, and the command that mends it."""

import importlib
import json
import os
import platform
import shutil
import sys

IMPLEMENTATIONS = {
    "reference": "eager PyTorch, blockwise, every device",
    "cpu": "C++ kernels for the CPU",
    "triton": "Triton kernels for GPUs",
    "cuda": "CUDA C++ kernels for NVIDIA GPUs",
}

INSTALL_COMPILER = {
    "apt-get": "apt-get install -y g++",
    "dnf": "dnf install -y gcc-c++",
    "apk": "apk add g++",
    "xcode-select": "xcode-select --install",
}


def main(as_json=False) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else render(facts))
    return 0


def collect() -> dict:
    """Everything that ``info`` prints, as plain data. Never raises: a probe that fails says so in its place."""
    return {
        "selfsup_kernels": _probe(_package_version),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _probe(lambda: importlib.import_module("torch").__version__),
        "triton": _probe(_triton_version),
        "cpu": cpu(),
        "cuda": _probe(_cuda),
        "implementations": {name: _probe(lambda name=name: _implementation(name)) for name in IMPLEMENTATIONS},
        "auto": _probe(_auto),
        "extension": _probe(_extension),
        "cuda_library": _probe(_cuda_library),
    }


def cpu() -> dict:
    """The processor, and how much of it torch uses. Also printed beside every number of the demo."""
    return {
        "model": _probe(_cpu_model),
        "cores": os.cpu_count(),
        "threads": _probe(lambda: importlib.import_module("torch").get_num_threads()),
        "capability": _probe(lambda: importlib.import_module("torch").backends.cpu.get_cpu_capability()),
    }


def _probe(function):
    try:
        return function()
    except Exception as error:  # whatever is broken here is what the reader wants to know
        return {"error": f"{type(error).__name__}: {error}"}


def _package_version():
    from selfsup_kernels.version import __version__

    return __version__


def _triton_version():
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


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
    from selfsup_kernels import backends

    reason = backends.unavailable(name)
    if reason is None and name in ("triton", "cuda"):
        reason = _no_gpu(name)
    why, asks, mend = (reason or "").partition(" To mend it, run: ")
    if not asks:
        return {"available": reason is None, "reason": reason, "mend": None}
    if compiler() is None:
        # Without a compiler a rebuild would fail as the build did, so the one command begins with getting one.
        install = INSTALL_COMPILER.get(next(filter(shutil.which, INSTALL_COMPILER), None), "install g++ or clang")
        return {
            "available": False,
            "reason": f"{why} No C++ compiler is on PATH.",
            "mend": f"{install} && {mend}",
        }
    toolkit = _toolkit() if name == "cuda" else {}
    return {"available": False, "reason": why, "mend": toolkit.get("missing") or mend}


def _no_gpu(name):
    """Asked here, not by ``backends``: at import the question would start the CUDA driver, which no fork survives."""
    import torch

    from selfsup_kernels import backends

    if backends.emulated(name) or torch.cuda.is_available():
        return None
    return "no NVIDIA GPU was found."


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


def _auto():
    import torch

    from selfsup_kernels import backends

    return backends.select("auto", torch.empty(0))


def _extension():
    from selfsup_kernels import _build, backends

    module, reason = backends.load_extension()
    facts = {"loaded": module is not None, "reason": reason, "compiler": compiler(), "record": _build.record()}
    if module is not None:
        facts["cpu_capability"] = _probe(lambda: module.cpu_capability())
        facts["build_info"] = _probe(lambda: dict(module.build_info()))
    return facts


def _cuda_library():
    """What stands in the package's folder, whether or not this torch can load it."""
    from selfsup_kernels import _build, backends

    path, missing = _build.cuda_library()
    loaded, reason = backends.load_cuda()
    record = {k.removeprefix("cuda_"): v for k, v in _build.record().items() if k.startswith("cuda_")}
    return {
        "path": path and str(path),
        "reason": missing,
        "loaded": loaded is not None and path is not None and str(loaded) == str(path),
        "not_loaded": reason,
        "record": record,
        "toolkit": _toolkit(),
    }


def _toolkit():
    """The compiler that a build would use, or what is missing and what to do about it."""
    from selfsup_kernels import _build_cuda

    try:
        kit = _build_cuda.toolkit()
    except _build_cuda.Unavailable as error:
        return {"missing": str(error)}
    return {"nvcc": str(kit.nvcc), "version": kit.name}


def render(facts) -> str:
    lines = [
        f"selfsup_kernels  {_text(facts['selfsup_kernels'])}",
        f"Python           {facts['python']} on {facts['platform']}",
        f"torch            {_text(facts['torch'])}",
        f"triton           {_text(facts['triton'] or 'not installed')}",
        f"CPU              {describe_cpu(facts['cpu'])}",
    ]
    cuda = facts["cuda"]
    if isinstance(cuda, list):
        names = [f"{d['name']} (compute capability {d['capability']}, {d['memory_gib']} GiB)" for d in cuda]
        lines.append(f"CUDA devices     {', '.join(names) or 'none'}")
    else:
        lines.append(f"CUDA devices     {_text(cuda)}")

    lines += ["", f"Implementations (impl='auto' on CPU tensors: {_text(facts['auto'])})"]
    for name, state in facts["implementations"].items():
        available = state.get("available", False)
        lines.append(f"  {name:<10} {'yes' if available else 'no ':<4} {IMPLEMENTATIONS[name]}")
        if not available:
            lines.append(f"             why:  {state.get('reason') or _text(state)}")
        if state.get("mend"):
            lines.append(f"             mend: {state['mend']}")

    extension = facts["extension"]
    lines += ["", f"C++ extension    {'loaded' if extension.get('loaded') else 'not loaded'}"]
    if "error" in extension:
        lines.append(f"  {_text(extension)}")
    if "cpu_capability" in extension:
        lines.append(f"  kernels run as  {_text(extension['cpu_capability'])}")
    for title in ("build_info", "record"):
        if extension.get(title):
            lines.append(f"  {'build' if title == 'build_info' else 'build record'}")
            # What concerns the CUDA library stands below.
            items = sorted((k, v) for k, v in extension[title].items() if not k.startswith("cuda_"))
            lines += [f"    {key:<14} {value}" for key, value in items]
    return "\n".join(lines + _render_cuda_library(facts["cuda_library"]))


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
