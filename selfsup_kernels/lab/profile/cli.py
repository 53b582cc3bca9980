"""Check the options of ``python -m selfsup_kernels profile``, and run it."""

import math
import re
import sys
from pathlib import Path

from selfsup_kernels.lab.options import Wrong, device, number, plain, whole_numbers, writable_folder

BATCHES = {"cpu": (256, 1024, 4096), "cuda": (512, 2048, 8192)}
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def add_arguments(parser):
    groups = ("what is trained", "where, and how long", "what is written")
    what, how, files = (parser.add_argument_group(title) for title in groups)
    add = what.add_argument
    add(
        "--method",
        default="simclr",
        help="simclr (default), cmc, clip and siglip (two encoders), moco, byol, or byol_contrast",
    )
    add(
        "--encoder",
        metavar="NAME",
        default="convnet",
        help="convnet, a small network of the package (default); MODULE:CALLABLE, which returns a module that maps "
        "(B, 3, S, S) to (B, features); or, with timm, the name of one of its models",
    )
    add(
        "--batch",
        metavar="B",
        help="samples of a step, comma-separated (default: 256,1024,4096; on a GPU 512,2048,8192)",
    )
    add("--views", metavar="V", default="2", help="views of a sample (default: 2)")
    add("--image-size", default="16", metavar="S", help="of the synthetic images, S x S (default: 16)")
    add("--dim", metavar="D", default="128", help="width of an embedding (default: 128)")
    add("--accumulate", default="1", metavar="N", help="parts of a batch whose gradients are added up (default: 1)")
    add("--amp", metavar="DTYPE", help="autocast: bf16, or fp16 with a gradient scaler")
    add("--compile", action="store_true", help="torch.compile of encoder and heads")
    add = how.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--steps", metavar="N", default="8", help="steps with marks, and as many without (default: 8)")
    add("--memory", metavar="BYTES", help="limit for the largest batch, such as 8GB (default: what is free)")
    add("--seconds", metavar="S", default="120", help="about how long all of it may take (default: 120)")
    files.add_argument("--out", default="out/profile", metavar="DIR", help="page, data, traces (default: %(default)s)")


def main(options) -> int:
    from selfsup_kernels.core import info
    from selfsup_kernels.lab import pages

    absent = info.missing("profile")
    if absent:
        print(f"profile: {', '.join(absent)} missing; run: {info.install(absent)}", file=sys.stderr)
        return 1
    try:
        plan = checked(options)
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    from selfsup_kernels.lab.profile import command, report

    results = command.run(**plan)
    report.write(results, plan["out"], console=pages.console())
    return 0 if any(case["status"] == "measured" for case in results["cases"]) else 1


def checked(options) -> dict:
    """Return the arguments of ``command.run``.

    Raises:
        ValueError: an option cannot be used; the message is one line.
    """
    from selfsup_kernels.lab.profile import workload

    target, accumulate = device("device", options.device), number("accumulate", options.accumulate, int, 1)
    sizes = batches(options.batch, accumulate, BATCHES[target.partition(":")[0]])
    methods = {plain(name): name for name in workload.METHODS}
    if plain(options.method) not in methods:
        raise Wrong("method", f"one of {', '.join(methods.values())}", options.method)
    if options.amp not in (None, *workload.AMP):
        raise Wrong("amp", f"one of {', '.join(workload.AMP)}", options.amp)
    method = methods[plain(options.method)]
    if method in workload.TWO_TOWERS and options.views != "2":
        raise Wrong("views", f"2 with --method {method}", options.views)
    work = workload.Workload(
        method=method,
        encoder=options.encoder,
        batch=sizes[0],
        views=number("views", options.views, int, 2),
        image_size=number("image-size", options.image_size, int, 4),
        dim=number("dim", options.dim, int, 2),
        accumulate=accumulate,
        amp=options.amp,
        compile=options.compile,
        device=target,
    )
    plan = {"work": work, "batches": sizes, "steps": number("steps", options.steps, int, 2), "out": options.out}
    plan["seconds"] = amount("seconds", options.seconds, "a number > 0", {"": 1})
    expected = "an amount of memory such as 8GB or 500MiB"
    plan["limit"] = options.memory and math.ceil(amount("memory", options.memory, expected, UNITS))
    try:
        workload.width(workload.make_encoder(work.encoder), work.image_size)
    except Exception as error:  # whatever a network says of such images
        line, size = (str(error).splitlines() or [""])[0], work.image_size
        expected = f"convnet, MODULE:CALLABLE or a name of timm that makes (2, features) of (2, 3, {size}, {size})"
        raise Wrong("encoder", expected, f"{work.encoder} ({type(error).__name__}: {line})") from None
    writable_folder("out", Path(options.out))
    return plan


def amount(name, text, expected, units) -> float:
    """Return a number > 0, with one of ``units`` or without: ``8GB``, ``500 MiB``."""
    found = re.fullmatch(r"\s*\+?((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    value = float(found[1]) * units.get(found[2], 0) if found else 0.0
    if not 0 < value < float("inf"):
        raise Wrong(name, expected, text)
    return value


def batches(text, accumulate, default) -> list[int]:
    if text is None:
        return [batch // accumulate * accumulate for batch in default if batch >= 2 * accumulate] or [2 * accumulate]
    found = whole_numbers("batch", text, 2)
    if any(batch % accumulate or batch < 2 * accumulate for batch in found):
        raise Wrong("batch", f"multiples of --accumulate {accumulate} with at least 2 samples in a part", text)
    return sorted(found)
