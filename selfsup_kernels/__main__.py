"""``python -m selfsup_kernels info | bench | profile | demo | tune``."""

import argparse
import importlib
import importlib.util
import sys

from selfsup_kernels.version import __version__

OWN_OPTIONS = {
    "bench": "time, memory and errors of the operations, compared with what people use today",
    "profile": "where time and memory of real training steps go, and the largest batch that fits",
}
"""Commands whose ``cli`` module has their options."""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m selfsup_kernels", description="Fused self-supervised losses.")
    root.add_argument("--version", action="version", version=f"selfsup_kernels {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="info | bench | profile | demo | tune")

    info = commands.add_parser("info", help="what this machine runs, what is missing, why, and what to type")
    info.add_argument("--json", action="store_true", help="print one JSON object, with everything")
    info.add_argument("--verbose", action="store_true", help="also how the libraries were built")

    for name, description in OWN_OPTIONS.items():
        command = commands.add_parser(name, help=description, description=description[0].upper() + description[1:])
        importlib.import_module(f"selfsup_kernels.lab.{name}.cli").add_arguments(command)

    demo = commands.add_parser("demo", help="train on handwritten digits with the eager losses and with ours; report")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="where the report goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of networks, batches and views (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    demo.add_argument("--figure", metavar="PATH", help="also write a compact picture of the results (PNG or SVG)")

    tune = commands.add_parser("tune", help="measure tile shapes of the Triton kernels on this GPU, write their table")
    tune.add_argument(
        "--op", nargs="+", metavar="KERNEL", help="of [masked_]{sums,gradient,wave}, product (default: all)"
    )
    tune.add_argument("--dtype", nargs="+", help="of half, tf32, tf32x3 (default: all that the table has)")
    tune.add_argument("--dim", nargs="+", type=int, help="numbers of a row (default: one for each width of the table)")
    tune.add_argument("--out", metavar="FILE", help="write the whole table there")
    tune.add_argument("--write", action="store_true", help="write it into this checkout")
    tune.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    tune.add_argument("--minutes", type=float, default=8.0, help="about how long to measure (default: %(default)s)")
    return root


def main(arguments=None) -> int:
    options = parser().parse_args(arguments)
    # The commands are imported late: `info` must work where the packages of the demo are missing.
    if options.command == "info":
        from selfsup_kernels.core import info

        return info.main(as_json=options.json, verbose=options.verbose)
    if options.command == "tune":
        if importlib.util.find_spec("triton") is None:
            print("tune: Triton is not installed. Run: pip install 'triton>=3.6'")
            return 2
        from selfsup_kernels.lab import tune

        return tune.main(
            options.op, options.dtype, options.dim, options.out, options.write, options.minutes, options.json
        )
    if options.command in OWN_OPTIONS:
        return importlib.import_module(f"selfsup_kernels.lab.{options.command}.cli").main(options)
    from selfsup_kernels.lab import demo

    return demo.main(out=options.out, seed=options.seed, quick=options.quick, figure=options.figure)


if __name__ == "__main__":
    sys.exit(main())
