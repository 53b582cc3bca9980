"""What was measured on what: versions and the device."""

import datetime

import torch

from selfsup_kernels.core import info


def collect(device) -> dict:
    device = torch.device(device)
    facts = info.collect()
    header = {
        "device": info.describe_cpu(facts["cpu"]),
        "kind": device.type,
        "selfsup_kernels": facts["selfsup_kernels"],
        "torch": facts["torch"],
        "python": facts["python"],
        "auto": facts["auto"] if isinstance(facts["auto"], str) else str(facts["auto"]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        header |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": facts["triton"] and str(facts["triton"]),
        }
    return header
