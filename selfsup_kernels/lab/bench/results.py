"""Results as files: what a run was measured on, JSON and CSV, and the folder of one device."""

import csv
import json
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

import selfsup_kernels as sk
from selfsup_kernels.core import backends
from selfsup_kernels.lab.bench import rivals

SCHEMA = Path(__file__).with_name("results.schema.json")


# ---------------------------------------------------------------- the header


def header(clock, ops=tuple(rivals.RIVALS)):
    """What the numbers depend on, besides the rates of the device (:class:`timing.Rates`)."""
    common = {
        "triton": _version("triton"),
        "torch": torch.__version__,
        "selfsup_kernels": sk.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "peers": rivals.versions(ops),
    }
    if not clock.cuda:
        return cpu_header() | common
    properties = torch.cuda.get_device_properties(clock.device)
    return {
        "device": properties.name,
        "kind": "cuda",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": clock.cache_bytes(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    } | common


def cpu_header():
    extension, _ = backends.load_extension()
    return {
        "device": processor_name(),
        "kind": "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capability": extension.cpu_capability() if extension else "no C++ kernels",
        "driver": None,
    }


def _version(package):
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version():
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out = subprocess.run(query, capture_output=True, text=True)
        if out.returncode == 0 and out.stdout.strip():
            return out.stdout.split()[0]
    return None


# ---------------------------------------------------------------- files


def folder_name(header):
    """The name of the folder of a device's results, such as ``amd-epyc-2-threads``."""
    threads = header.get("threads")
    name = header["device"] + (f"-{threads}-threads" if threads else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(folder, name, header, rows):
    """``FOLDER/NAME.json``, as ``benchmarks/results`` has them."""
    write_json(Path(folder) / f"{name}.json", header, rows)


def write_json(path, header, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


FACTS = ("op", "model", "views", "batch", "dim", "dtype", "part")
MEASURED = ("rival", "p20_ms", "p50_ms", "p80_ms", "calls", "times_ours", "peak_bytes")
RATES = ("loss_error", "gradient_error", "value_error", "tflops", "gb_per_s", "fraction", "unavailable", "note")


def lines(rows):
    """One dict for each (case, part, rival); empty where there is nothing to say."""
    for row in rows:
        reference = ours(row)
        for name in (*row["times"], *row["unavailable"]):
            times = row["times"].get(name, {})
            line = {key: row.get(key) for key in FACTS} | {"rival": name, **times}
            if times and reference:
                line["times_ours"] = times["p50_ms"] / row["times"][reference]["p50_ms"]
            line["peak_bytes"] = row["peak_bytes"].get(name)
            line |= {f"{key}_error": value for key, value in row["errors"].get(name, {}).items()}
            if name == reference:
                line |= {key: row.get(key) for key in ("tflops", "gb_per_s", "fraction")}
            line |= {"unavailable": row["unavailable"].get(name), "note": row.get("notes", {}).get(name)}
            yield {key: line.get(key) for key in (*FACTS, *MEASURED, *RATES)}


def write_csv(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FACTS, *MEASURED, *RATES))
        writer.writeheader()
        writer.writerows(lines(rows))


def ours(row):
    """The column that the others of a row are compared with: ours as users call it, or the first that was asked for."""
    if rivals.OURS in row["times"]:
        return rivals.OURS
    return next((name for name in row["times"] if rivals.impl_of(name)), None)


def ratio(row, name):
    """How many times ours a column takes; None where ours has no time."""
    reference = ours(row)
    return row["times"][name]["p50_ms"] / row["times"][reference]["p50_ms"] if reference else None
