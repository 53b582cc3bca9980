"""``python -m selfsup_kernels info | demo``."""

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m selfsup_kernels", description="Fused self-supervised losses.")
    commands = root.add_subparsers(dest="command", required=True, metavar="info | demo")

    info = commands.add_parser("info", help="what this machine runs, and what is missing, why and how to mend it")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    demo = commands.add_parser("demo", help="train on handwritten digits with the eager losses and with ours; report")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="where the report goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of networks, batches and views (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    demo.add_argument("--figure", metavar="PATH", help="also write a compact picture of the results (PNG or SVG)")
    return root


def main(arguments=None) -> int:
    options = parser().parse_args(arguments)
    # The commands are imported late: `info` must work where the packages of the demo are missing.
    if options.command == "info":
        from selfsup_kernels import info

        return info.main(as_json=options.json)
    from selfsup_kernels import demo

    return demo.main(out=options.out, seed=options.seed, quick=options.quick, figure=options.figure)


if __name__ == "__main__":
    sys.exit(main())
