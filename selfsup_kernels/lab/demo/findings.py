"""What the numbers say, in sentences. Each is made from the numbers, also where they speak against us."""

from selfsup_kernels.lab.demo import evaluate, plots, train

CASE_TITLES = {
    ("clean", "few"): f"{evaluate.FEW} labels a class",
    ("clean", "all"): "all labels",
    ("moved", "few"): f"moved digits, {evaluate.FEW} labels a class",
    ("moved", "all"): "moved digits, all labels",
}


def findings(summary) -> list[str]:
    return [
        *_implementation(summary),
        *_agreement(summary),
        *_accuracy(summary),
        *_time(summary),
        *_sweep(summary),
    ]


def _implementation(summary):
    if summary["auto"] == "reference":
        build = f" To build them: {summary['build']}" if summary["build"] else ""
        yield f"The C++ kernels are not installed here: 'ours' is the package's eager reference, in PyTorch.{build}"


def _agreement(summary):
    for name, facts in summary["agreement"].items():
        checks = facts["checks"]
        ema = f", the moving average by {small(checks['ema_ours_eager'])}" if "ema_ours_eager" in checks else ""
        verdict = "agrees with eager to rounding" if facts["holds"] else "DOES NOT AGREE with eager to rounding"
        loss, gradient = (small(checks[f"{part}_ours_eager"]) for part in ("loss", "gradient"))
        yield (
            f"{plots.TITLES[name]}: {verdict}. On the same inputs the loss differs by at most {loss},"
            f" its gradient by {gradient}{ema} (relative). Whole float32 curves drift apart by up to"
            f" {small(facts['float32_curves']['all'])}; two eager runs whose initial weights differ in the last bit, by"
            f" {small(facts['control_curves']['all'])}."
        )


def _accuracy(summary):
    for name, rivals in summary["verdicts"].items():
        for rival, cases in rivals.items():
            worse = [case_title(case) for case, verdict in cases.items() if verdict == "worse"]
            better = sum(verdict == "better" for verdict in cases.values())
            line = f"{name}: features better than {rival} in {better} of {len(cases)} cases"
            if len(worse) > 3:
                line += f", WORSE in {len(worse)}"
            elif worse:
                line += f", WORSE in {len(worse)} ({'; '.join(worse)})"
            rest = len(cases) - better - len(worse)
            yield line + (f", no clear difference in {rest}." if rest else ".")


def _time(summary):
    for name, times in summary["step_seconds"].items():
        if "ours" not in name:
            continue
        before = summary["step_seconds"][name.replace("ours", "eager")]
        total, total_before = sum(times.values()), sum(before.values())
        loss, encoder = (100 * times[part] / total for part in ("loss", "encoder"))
        yield (
            f"{name}: {1e3 * total:.1f} ms a step, eager {1e3 * total_before:.1f} ms; the loss is {loss:.0f} % of it"
            f" (eager {100 * before['loss'] / total_before:.0f} %), the encoder {encoder:.0f} %."
            + (" The encoder dominates: a faster loss changes little here." if encoder > 60 else "")
        )


def _sweep(summary):
    both = [case for case in summary["sweep"]["cases"] if len(case["seconds"]) == len(train.LOSSES)]
    slower = [str(case["batch"]) for case in both if case["seconds"]["ours"] > case["seconds"]["eager"]]
    if both:
        case = both[-1]
        eager, ours = case["seconds"]["eager"], case["seconds"]["ours"]
        line = f"The loss alone at batch {case['batch']} ({case['rows']} rows):"
        line += f" {1e3 * ours:.0f} ms, eager {1e3 * eager:.0f} ms ({eager / ours:.1f}x)"
        peaks = case["peak_bytes"]
        if None not in (peaks["ours"], peaks["eager"]):
            line += f"; {mib(peaks['ours'])} MiB above the embeddings, eager {mib(peaks['eager'])} MiB"
        yield line + "."
    if slower:
        yield f"Ours is SLOWER than eager at batch {', '.join(slower)}."


def case_title(case) -> str:
    test, labels, probe = case.split("/")
    return f"{CASE_TITLES[test, labels]}, {'linear probe' if probe == 'linear' else 'nearest neighbours'}"


def mib(size) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def small(value) -> str:
    return "0" if value == 0 else f"{value:.1e}"
