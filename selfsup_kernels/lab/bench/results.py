"""Write results as files: what a run was measured on, JSON and CSV, and the folder of one device."""

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
from selfsup_kernels.core import backends, info
from selfsup_kernels.lab.bench import base, baselines

SCHEMA = Path(__file__).with_name("results.schema.json")
PURE = "no C++ kernels"


def header(clock, compared=None):
    """Return what the numbers depend on, apart from the rates of the device (:class:`timing.Rates`).

    ``compared``: the tables of baselines whose packages' versions are listed; None for those of all operations.
    """
    compared = baselines.BASELINES.values() if compared is None else compared
    packages = sorted({baseline.package for table in compared for baseline in table.values() if baseline.package})
    commit = base.measured_commit()
    facts = {
        "kind": clock.device.type,
        "driver": driver_version() if clock.cuda else None,
        "triton": baselines.version("triton"),
        "torch": torch.__version__,
        "selfsup_kernels": sk.__version__,
        **({"commit": commit} if commit else {}),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "peers": {name: baselines.version(name) for name in packages if baselines.version(name)},
    }
    if not clock.cuda:
        extension, _ = backends.load_extension()
        facts |= {"device": info.cpu()["model"], "threads": torch.get_num_threads()}
        return facts | {"cpu_capability": extension.cpu_capability() if extension else PURE}
    properties = torch.cuda.get_device_properties(clock.device)
    return facts | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": clock.cache_bytes(),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def driver_version():
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True).stdout.split() or [None])[0]


def folder_name(header):
    """Return the name of the folder of a device's results, such as ``amd-epyc-2-threads``."""
    threads = header.get("threads")
    name = header["device"] + (f"-{threads}-threads" if threads else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path, header, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


FIELDS = ("op", "objective", "model", "views", "batch", "dim", "dtype", "part", "baseline", "calls")
FIELDS += ("p20_ms", "p50_ms", "p80_ms", "times_ours", "peak_bytes", "loss_error", "gradient_error", "value_error")
FIELDS += ("tflops", "gb_per_s", "fraction", "unavailable", "note")


def write_csv(path, rows):
    """Write one line for each case, part and baseline; empty where there is nothing to say."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            for name in (*row["times"], *row["unavailable"]):
                line = row | {"baseline": name, "times_ours": ratio(row, name), "note": row["notes"].get(name)}
                line |= {key: row[key].get(name) for key in ("peak_bytes", "unavailable")}
                line |= {f"{key}_error": value for key, value in row["errors"].get(name, {}).items()}
                line |= row["times"].get(name, {})
                line |= {} if name == ours(row) else dict.fromkeys(("tflops", "gb_per_s", "fraction"))
                writer.writerow(line)


def ours(row):
    """Return the column that others are compared with: ours as users call it, or the first that was asked for."""
    return next((n for n in (baselines.OURS, *row["times"]) if n in row["times"] and baselines.impl_of(n)), None)


def ratio(row, name):
    """Return how many times ours a column takes; None where one of them has no time."""
    reference = row["times"].get(ours(row))
    return row["times"][name]["p50_ms"] / reference["p50_ms"] if reference and name in row["times"] else None
