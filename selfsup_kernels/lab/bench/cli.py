"""Parse the options of ``python -m selfsup_kernels bench`` and run what they ask for."""

import importlib
import itertools
import sys
import time
from pathlib import Path

from selfsup_kernels.info_nce.objectives import SYNONYMS, TABLE
from selfsup_kernels.lab.options import Wrong, device, number, plain, whole_numbers, writable_file

OPS = ("info_nce", "siglip", "byol", "ema")
IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
BATCHES = {"info_nce": (256, 1024, 4096), "siglip": (1024, 4096), "byol": (4096, 32768)}
DIMS = {"info_nce": (128,), "siglip": (128,), "byol": (256,)}
WIDTH = 150  # of tables that do not go to a terminal


def add_arguments(parser):
    groups = ("what is measured", "where, and how long", "what is written")
    what, how, files = (parser.add_argument_group(title) for title in groups)
    parser.epilog = "Several values are comma-separated: --batch 256,1024 --dtype float32,bf16"
    add = what.add_argument
    add("--op", help=f"{', '.join(OPS)}, or all (default; with --objective: info_nce)")
    add(
        "--objective",
        metavar="NAME",
        help=f"of info_nce: {', '.join(TABLE)}, or all; also clip, ntxent, dcl and the like (default: supcon_out)",
    )
    add("--impl", default="auto", help="ours: auto (default), reference, cpu, triton, cuda")
    add(
        "--vs",
        metavar="NAME",
        help="baselines: eager, compile, chunked, lightly, pytorch-metric-learning, open_clip, timm and so on; all, "
        "none, or your own MODULE:CALLABLE, which takes the inputs, such as views (V, B, D), and returns the loss "
        "(default: eager,compile; ema: eager)",
    )
    add("--batch", metavar="B", help="samples (default: 256,1024,4096; siglip: 1024,4096; byol: 4096,32768)")
    add("--views", metavar="V", default="2", help="views of a sample (default: 2)")
    add("--dim", metavar="D", help="width of an embedding (default: 128; byol: 256)")
    add("--model", default="ResNet-50", help="whose parameters ema averages: ResNet-50 (default), ViT-B")
    add("--dtype", default="float32", help="float32 (default), float64, bf16, fp16; of ema: of the source")
    add("--base", metavar="REF", help="compare with another commit of this checkout instead of with baselines")
    add = how.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seconds", metavar="S", default="3", help="about how long the calls of one case take in all (default: 3)")
    add("--rounds", metavar="N", help="on a CPU: calls of each baseline, instead of --seconds")
    add = files.add_argument
    add("--json", metavar="FILE", help="all results")
    add("--csv", metavar="FILE", help="the same, one line for each case, part and baseline")
    add("--html", metavar="FILE", help="a page with plots, which needs no network")
    add("--results", metavar="DIR", help="DIR/DEVICE/OP.json, as benchmarks/results has them")


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
    from selfsup_kernels.lab.bench import base, tables
    from selfsup_kernels.lab.pages import console

    if options.base:
        cases = [case for case, _ in plan.cases]
        return base.main(cases, plan.device, options.base, seconds=plan.seconds, json_path=options.json)
    suite = measured(plan)
    out = console(WIDTH)
    tables.show(out, suite.header, suite.rows)
    for path in written(options, plan, suite):
        out.print(f"wrote {path}", style="dim", highlight=False, soft_wrap=True, markup=False)
    tables.show_answer(out, suite.rows)
    return 0


def measured(plan):
    """Measure all cases, with progress and the time that is left; return the suite."""
    from selfsup_kernels.lab.bench.suite import Suite
    from selfsup_kernels.lab.pages.progress import Progress

    steps = {op: sum(len(names) + 1 for case, names in plan.cases if case.op == op) for op in plan.ops}
    begin, done = time.monotonic(), 0

    def advance(text):
        nonlocal done
        done += 1
        left = (time.monotonic() - begin) / done * (sum(steps.values()) - done)
        bar.advance(text if left < 1 else f"{text}, about {duration(left)} left")

    with Progress(sys.stderr) as bar:
        bar.stage("rates", 1)
        settings = {"dtypes": plan.product_dtypes, "seconds": plan.seconds, "rounds": plan.rounds}
        suite = Suite(plan.device, advance=advance, compared=plan.compared, **settings)
        bar.advance("of the device's matrix product and memory")
        for op in plan.ops:
            bar.stage(op, steps[op])
            for case, names in plan.cases:
                if case.op == op:
                    suite.measure(case, names)
    suite.rate()
    return suite


def duration(seconds) -> str:
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"


def written(options, plan, suite):
    """Write the files that were asked for, and yield their paths."""
    from selfsup_kernels.lab.bench import results

    if options.json:
        results.write_json(options.json, suite.header, suite.rows)
        yield options.json
    if options.csv:
        results.write_csv(options.csv, suite.rows)
        yield options.csv
    for op in plan.ops if options.results else ():
        path = Path(options.results) / results.folder_name(suite.header) / f"{op}.json"
        results.write_json(path, suite.header, [row for row in suite.rows if row["op"] == op])
        yield path
    if options.html:
        from selfsup_kernels.lab.bench import report

        report.write(options.html, suite.header, suite.rows)
        yield options.html


class Plan:
    """Hold what the options ask for: ``cases`` is a list of (case, names of the columns). Raise :class:`Wrong`."""

    def __init__(self, options):
        self.ops = operations(options.op or ("info_nce" if options.objective else "all"))
        named = objectives(options.objective or "supcon_out")
        if options.objective and "info_nce" not in self.ops:
            raise Wrong("objective", "--op info_nce with it", options.objective)
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
        own = {"info_nce": {"objective": named, "views": views}, "siglip": {}, "byol": {"views": views}}
        self.cases = []
        for op in self.ops:
            sizes = {"model": models, "dtype": dtypes}
            if op != "ema":
                sizes = {"dtype": dtypes, **own[op], "dim": dims or DIMS[op], "batch": sorted(batches or BATCHES[op])}
            for values in itertools.product(*sizes.values()):
                self.cases.append(workloads.case(op, **dict(zip(sizes, values, strict=True))))
        columns = self.columns(options.vs)
        self.cases = [(case, columns[case]) for case in self.cases]
        self.product_dtypes = dtypes if {"info_nce", "siglip"} & set(self.ops) else ["float32"]

    def columns(self, vs):
        """Return ``{case: names}``: our implementations, then the baselines; set ``compared``, their tables."""
        from selfsup_kernels.lab.bench import baselines

        self.compared = [baselines.of(case) for case in self.cases]
        found = {case: [baselines.impl_name(impl) for impl in self.impls] for case in self.cases}
        for word in words("eager,compile" if vs is None else "" if vs == "none" else vs):
            if ":" in word:
                importable("vs", word)
            named = {case: [word] if ":" in word else baselines.named(case, word.lower()) for case in self.cases}
            if vs is None and word == "compile":  # takes minutes for an update of many tensors
                named = {case: names if case.op != "ema" else [] for case, names in named.items()}
            elif not any(named.values()):
                every = sorted({name for table in self.compared for name in table}, key=str.lower)
                raise Wrong("vs", f"some of {', '.join(['all', 'none', *every])} or MODULE:CALLABLE", word)
            for case, names in named.items():
                found[case] += [name for name in names if name not in found[case]]
        return found


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def operations(text):
    for word in words(text):
        if word not in OPS and plain(word) in SYNONYMS:
            raise Wrong("op", f"some of {', '.join(OPS)} (an objective: --objective {word})", word)
    return OPS if text == "all" else choices("op", text, OPS)


def objectives(text):
    """Return names of objectives, also for what others call them."""
    if text == "all":
        return list(TABLE)
    found = []
    for word in words(text) or [text]:
        names = [name for name in TABLE if plain(name) == plain(word)] or SYNONYMS.get(plain(word), [])
        if len(names) != 1:
            raise Wrong("objective", " or ".join(names) or f"some of {', '.join(TABLE)}, or all", word)
        found.append(names[0].strip("'"))
    return list(dict.fromkeys(found))


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
