"""Parse the options of ``python -m selfsup_kernels bench`` and run what they ask for."""

import importlib
import itertools
import sys
from pathlib import Path

from selfsup_kernels.lab.options import Wrong, device, number, whole_numbers, writable_file

OPS = ("info_nce", "siglip", "byol", "ema")
IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
BATCHES = {"info_nce": (256, 1024, 4096), "siglip": (1024, 4096), "byol": (4096, 32768)}
DIMS = {"info_nce": (128,), "siglip": (128,), "byol": (256,)}
WIDTH = 150  # of tables that do not go to a terminal


def add_arguments(parser):
    add = parser.add_argument
    add("--op", default="all", help="info_nce, siglip, byol, ema, several of them with commas, or all (default)")
    add("--impl", default="auto", help="ours: auto (default), reference, cpu, triton, cuda")
    add(
        "--vs",
        help="what to compare with: eager, compile, chunked, lightly, pytorch-metric-learning, timm and so on; all, "
        "none, or your own MODULE:CALLABLE, which takes the inputs, such as views (V, B, D), and returns the loss "
        "(default: eager and compile; of ema: eager)",
    )
    add("--batch", help="numbers of samples (default: 256,1024,4096; siglip: 1024,4096; byol: 4096,32768)")
    add("--views", default="2", help="numbers of views of a sample (default: 2)")
    add("--dim", help="width of an embedding (default: 128; byol: 256)")
    add("--model", default="ResNet-50", help="of ema: ResNet-50 (default), ViT-B")
    add("--dtype", default="float32", help="float32 (default), float64, bf16, fp16; of ema: of the source")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seconds", default="3", help="about how long the turns of one case take (default: 3)")
    add("--rounds", help="turns of every part, in place of --seconds; on a CPU")
    add("--json", metavar="FILE", help="write all results there")
    add("--csv", metavar="FILE", help="the same, one line for each case, part and baseline")
    add("--html", metavar="FILE", help="a page with plots, which needs no network")
    add("--results", metavar="DIR", help="write DIR/DEVICE/OP.json, as benchmarks/results has them")
    add("--base", metavar="REF", help="compare with another commit of this checkout instead")


def main(options) -> int:
    from selfsup_kernels.core import info

    absent = info.missing("bench", page=bool(options.html))
    if absent:
        print(f"bench: {', '.join(absent)} missing; run: {info.install(absent)}", file=sys.stderr)
        return 1
    try:
        plan = Plan(options)
    except Wrong as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    from selfsup_kernels.lab.bench import base, results, tables

    if options.base:
        cases = [case for case, _ in plan.cases]
        return base.main(cases, plan.device, options.base, seconds=plan.seconds, json_path=options.json)
    from selfsup_kernels.lab.bench.suite import Suite
    from selfsup_kernels.lab.pages import console
    from selfsup_kernels.lab.pages.progress import Progress

    with Progress(sys.stderr) as bar:
        bar.stage("measure", 1 + sum(len(names) + 1 for _, names in plan.cases))
        settings = {"dtypes": plan.product_dtypes, "seconds": plan.seconds, "rounds": plan.rounds, "ops": plan.ops}
        suite = Suite(plan.device, advance=lambda text: bar.advance(text), **settings)
        bar.advance("rates of the device")
        for case, names in plan.cases:
            suite.measure(case, names)
    suite.rate()
    tables.show(console(WIDTH), suite.header, suite.rows)
    if options.json:
        results.write_json(options.json, suite.header, suite.rows)
    if options.csv:
        results.write_csv(options.csv, suite.rows)
    if options.results:
        folder = Path(options.results) / results.folder_name(suite.header)
        for op in plan.ops:
            results.write_json(folder / f"{op}.json", suite.header, [row for row in suite.rows if row["op"] == op])
        print(f"wrote {folder}", file=sys.stderr)
    if options.html:
        from selfsup_kernels.lab.bench import report

        report.write(options.html, suite.header, suite.rows)
        print(f"wrote {options.html}", file=sys.stderr)
    return 0


class Plan:
    """Hold what the options ask for: ``cases`` is a list of (case, names of the columns). Raise :class:`Wrong`."""

    def __init__(self, options):
        self.ops = OPS if options.op == "all" else choices("op", options.op, OPS)
        self.impls = choices("impl", options.impl, IMPLS)
        self.seconds = number("seconds", options.seconds, float, 0.01)
        self.rounds = None if options.rounds is None else number("rounds", options.rounds, int, 1)
        for name in ("json", "csv", "html"):
            if getattr(options, name):
                writable_file(name, Path(getattr(options, name)))
        if options.results:
            writable_file("results", Path(options.results) / "results.json")
        batches = options.batch and whole_numbers("batch", options.batch, 2)
        views = whole_numbers("views", options.views, 2)
        dims = options.dim and whole_numbers("dim", options.dim, 1)
        # torch is imported from here on: what is wrong above is said at once.
        from selfsup_kernels.lab.bench import workloads

        dtypes = choices("dtype", options.dtype, workloads.DTYPES)
        models = choices("model", options.model, list(workloads.MODELS))
        self.device = device("device", options.device)
        self.cases = []
        for op, columns in self.columns(options.vs).items():
            sizes = {"model": models, "dtype": dtypes}
            if op != "ema":
                sizes = {"dtype": dtypes, "views": [2] if op == "siglip" else views, "dim": dims or DIMS[op]}
                sizes["batch"] = sorted(batches or BATCHES[op])
            for values in itertools.product(*sizes.values()):
                self.cases.append((workloads.case(op, **dict(zip(sizes, values, strict=True))), columns))
        self.product_dtypes = dtypes if {"info_nce", "siglip"} & set(self.ops) else ["float32"]

    def columns(self, vs):
        """Return ``{op: names}``: our implementations, then the baselines."""
        from selfsup_kernels.lab.bench import baselines

        found = {op: [baselines.impl_name(impl) for impl in self.impls] for op in self.ops}
        for word in words("eager,compile" if vs is None else "" if vs == "none" else vs):
            if ":" in word:
                importable("vs", word)
            named = {op: [word] if ":" in word else baselines.named(op, word.lower()) for op in self.ops}
            if vs is None and "ema" in named and word == "compile":
                named["ema"] = []  # torch.compile takes minutes to compile it
            elif not any(named.values()):
                every = sorted({name for op in self.ops for name in baselines.BASELINES[op]}, key=str.lower)
                raise Wrong("vs", f"some of {', '.join(['all', 'none', *every])} or MODULE:CALLABLE", word)
            for op, names in named.items():
                found[op] += [name for name in names if name not in found[op]]
        return found


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def choices(argument, text, known):
    """Return the chosen ones of ``known``: names, or a dict from names to values."""
    table = {name.lower(): known[name] if isinstance(known, dict) else name for name in known}
    for word in words(text) or [text]:
        if word.lower() not in table:
            raise Wrong(argument, f"some of {', '.join(known)}", word)
    return list(dict.fromkeys(table[word.lower()] for word in words(text)))


def importable(argument, word):
    module, _, name = word.partition(":")
    try:
        if callable(getattr(importlib.import_module(module), name)):
            return
        problem = "it is not callable"
    except Exception as error:  # whatever a user's module raises when it is imported
        problem = f"{type(error).__name__}: {error}"
    raise Wrong(argument, f"MODULE:CALLABLE that can be imported ({problem})", word)
