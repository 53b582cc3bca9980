"""``bench --base REF``: this version of the package against another commit's, interleaved in one run.

Both are measured on the workloads of *this* version, by processes that take turns
(:mod:`selfsup_kernels.lab.bench._versus`); two of them run the same base, and what those differ by is the noise that a
ratio has to exceed (:mod:`selfsup_kernels.lab.bench.verdict`).
"""

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from selfsup_kernels.lab.bench import verdict
from selfsup_kernels.lab.bench._versus import CALLS_MS

ROOT = Path(__file__).resolve().parents[3]
BASE, AGAIN, HEAD = "base", "base again", "head"
LAUNCHES = 3


class Unusable(Exception):
    """The comparison cannot be made; the message says why, in one line."""


# ---------------------------------------------------------------- the other version


def git(*arguments, **options):
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True, **options).stdout
    except FileNotFoundError:
        raise Unusable("--base: expected git on PATH, found none") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        raise Unusable(
            f"git {' '.join(arguments)}: {said.strip().splitlines()[-1] if said.strip() else 'failed'}"
        ) from None


def require_checkout():
    if not (ROOT / ".git").exists():
        raise Unusable(f"--base: expected a package that runs from its git checkout, got the one in {ROOT}")


def commit(ref) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}", text=True).strip()
    except Unusable:
        raise Unusable(f"--base: expected a commit of this checkout, got {ref!r}") from None


def describe(sha) -> str:
    return git("log", "-1", "--format=%h %s", sha, text=True).strip()


def changed() -> bool:
    """Whether what is measured differs from the commit that is checked out."""
    return bool(git("status", "--porcelain", "--", "selfsup_kernels", "csrc", "setup.py", text=True).strip())


def tree_of(sha, device, say) -> Path:
    """The built sources of a commit, in ``build/versions``; built once."""
    folder = ROOT / "build" / "versions" / sha[:12]
    built = folder / f".built-{device}"
    if built.exists():
        return folder
    say(f"building {describe(sha)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as packed:
        packed.write(git("archive", "--format=tar", sha))
        packed.seek(0)
        with tarfile.open(fileobj=packed) as archive:
            # Python 3.10 and 3.11 have the filter from a late patch on; the archive is git's own.
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    own = {"SELFSUP_KERNELS_SKIP_BUILD": "0" if extension_loaded() else "1"}
    if device != "cuda":
        own["SELFSUP_KERNELS_SKIP_CUDA_BUILD"] = "1"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode:
        raise Unusable(f"{describe(sha)} does not build: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    record = folder / "selfsup_kernels" / "_build_info.json"
    if extension_loaded() and record.exists() and "failure" in json.loads(record.read_text()):
        raise Unusable(f"{describe(sha)} was built without its extension")  # which in older versions is no error
    built.touch()
    return folder


def extension_loaded() -> bool:
    """What this version runs with is what the other one is built with."""
    from selfsup_kernels.core import backends

    return backends.load_extension()[0] is not None


# ---------------------------------------------------------------- taking turns


class Process:
    """One side, in a process of its own."""

    def __init__(self, tree, device):
        files = [str(Path(__file__).with_name(name)) for name in ("_versus.py", "workloads.py")]
        without = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, files[0], str(tree), files[1], str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=without,
            text=True,
        )

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            raise Unusable(
                f"a version ended with status {self.process.returncode}: {said[-1] if said else 'no message'}"
            )
        return json.loads(line)

    def ask(self, **request):
        # A process that has ended cannot be written to; what it said is read below.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()


def launch(trees, device, cases, turns, advance, seed):
    """One launch of all three processes: ``{case index: [(base, base again, head), ...] or the reason for none}``."""
    order = random.Random(seed)
    sides, result = {}, {}
    try:
        for name, tree in trees.items():
            sides[name] = Process(tree, device)
        hello = {name: side.read() for name, side in sides.items()}
        for index, (case, part, _) in enumerate(cases):
            prepared = {name: side.ask(case=case, part=part) for name, side in sides.items()}
            failed = {name: p["failed"] for name, p in prepared.items() if "failed" in p}
            if failed:
                name = next(iter(failed))
                result[index] = f"{name}: {failed[name]}"
                advance()
                continue
            calls = prepared[BASE]["calls"]
            result[index] = []
            for _ in range(turns):
                names = list(sides)
                order.shuffle(names)
                took = {name: sides[name].ask(calls=calls)["ms"] for name in names}
                result[index].append((took[BASE], took[AGAIN], took[HEAD]))
            advance()
        return hello, result
    finally:
        for side in sides.values():
            side.close()


def compare(trees, device, cases, turns, launches, advance=lambda: None) -> dict:
    """Rows with the ratio, the noise and the verdict of every case, and what each side ran."""
    of_launch = []
    for seed in range(launches):
        hello, result = launch(trees, device, cases, turns, advance, seed)
        of_launch.append(result)
    rows = []
    for index, (case, part, label) in enumerate(cases):
        of_case = [result[index] for result in of_launch]
        row = {**case, "part": part, "label": label}
        reasons = [r for r in of_case if isinstance(r, str)]
        if reasons:
            rows.append({**row, "verdict": "not measured", "reason": reasons[0]})
            continue
        columns = list(zip(*(turn for turns_ in of_case for turn in turns_), strict=True))
        times = dict(zip((BASE, AGAIN, HEAD), columns, strict=True))
        rows.append({**row, **verdict.judge(of_case), "times": {n: _summary(v) for n, v in times.items()}})
    return {"sides": hello, "rows": rows}


def _summary(values):
    from selfsup_kernels.lab.bench import timing

    return timing.summary(values)


# ---------------------------------------------------------------- the command


def requests(cases):
    """Cases of ``workloads.py``: their parameters, each part that needs no graph made before it, and a label."""
    for made in cases:
        parameters = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        for part in made.parts:
            if part != "backward":  # its forward would be timed with it: "both" has it
                yield {"op": made.op, **parameters}, part, made.label


def main(cases, device, base="auto", head=None, seconds=3.0, json_path=None) -> int:
    """Measure, print a table, and return 1 where something is slower.

    Args:
        cases: of :mod:`selfsup_kernels.lab.bench.workloads`.
        base: a commit; "auto" for the last one that differs from what is measured: the one that is checked out where
            files of the package have been changed, else its parent.
        head: a commit; None for this package as it stands.
        seconds: about how long to measure each case and part, on each of the three processes.
        json_path: where to write everything as data, or None.
    """
    from selfsup_kernels.lab.pages import console, progress

    out = console()

    def say(text):
        out.print(text, highlight=False, soft_wrap=True)

    try:
        require_checkout()
        if base == "auto":
            base = "HEAD" if head is None and changed() else f"{head or 'HEAD'}^"
        old, new = commit(base), head and commit(head)
        kind = str(device).split(":")[0]
        trees = dict.fromkeys((BASE, AGAIN), tree_of(old, kind, say)) | {
            HEAD: tree_of(new, kind, say) if new else ROOT,
        }
        wanted = list(requests(cases))
        turns = max(5, int(seconds / LAUNCHES / (2e-3 * CALLS_MS)))
        with progress.Progress() as bar:
            bar.stage("Measure", LAUNCHES * len(wanted))
            result = compare(trees, device, wanted, turns, LAUNCHES, bar.advance)
    except Unusable as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if not new:
        new = git("rev-parse", "HEAD", text=True).strip()
    names = {BASE: describe(old), HEAD: describe(new) + (" with changes" if head is None and changed() else "")}
    header = {"names": names, "sides": result["sides"], "turns": turns, "launches": LAUNCHES, "device": str(device)}
    if json_path:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(json_path).write_text(json.dumps({"header": header, "rows": result["rows"]}, indent=1) + "\n")
    say(f"now:  {names[HEAD]}")
    say(f"base: {names[BASE]}")
    out.print(table(result["rows"]))
    slower = [row for row in result["rows"] if row["verdict"] == "slower"]
    say(
        f"{len(slower)} of {len(result['rows'])} slower than the base, beyond the noise of this run."
        if slower
        else "Nothing is slower than the base, beyond the noise of this run."
    )
    return 1 if slower else 0


def table(rows):
    from rich.table import Table

    made = Table()
    for name in ("case", "part", "base ms", "now ms", "ratio", "noise", "verdict"):
        made.add_column(name, justify="left" if name in ("case", "part", "verdict") else "right")
    styles = {"slower": "bold red", "faster": "green"}
    for row in rows:
        label = row["label"]
        if row["verdict"] == "not measured":
            made.add_row(label, row["part"], "", "", "", "", row["reason"])
            continue
        old, new = (row["times"][name]["p50_ms"] for name in (BASE, HEAD))
        cells = (f"{old:.3g}", f"{new:.3g}", f"{row['ratio']:.3f}", f"±{100 * row['noise']:.1f} %")
        made.add_row(label, row["part"], *cells, row["verdict"], style=styles.get(row["verdict"]))
    return made
