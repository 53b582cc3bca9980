"""Compare this version of the package with another commit's in one run (``bench --base REF``).

Processes of both versions run ``workloads.py`` of *this* version in turns. What the processes of one version differ by
is the noise that a ratio has to exceed.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from selfsup_kernels.lab.bench import timing

ROOT = Path(__file__).resolve().parents[3]
BASE, HEAD = "base", "head"
LAUNCHES = 9
"""Processes of each version."""
FLOOR = 0.02
"""Ratios nearer to 1 than this are never flagged."""


class Unusable(Exception):
    """The comparison cannot be made; the message says why, in one line."""


def run(what, command, **options) -> str:
    """Return what a command prints; raise :class:`Unusable` where it fails, with the last line of its message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise Unusable(f"--base: expected {command[0]} on PATH, found none") from None
    if done.returncode:
        raise Unusable(f"{what}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout.strip()


def git(*arguments) -> str:
    return run(f"git {' '.join(arguments)}", ["git", "-C", ROOT, *arguments])


def commit(ref) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except Unusable:
        raise Unusable(f"--base: expected a commit of this checkout, got {ref!r}") from None


def describe(sha) -> str:
    return git("log", "-1", "--format=%h %s", sha)


def changed() -> bool:
    """Tell whether files that a measurement depends on differ from the commit that is checked out."""
    return bool(git("status", "--porcelain", "--", "selfsup_kernels", "csrc", "setup.py"))


def measured_commit() -> str | None:
    """Return the commit of the running package, such as ``1a2b3c4``; None where it is not run from a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed() else "")
    except Unusable:
        return None


def tree_of(sha, device, say) -> Path:
    """Return the built sources of a commit, in ``build/versions``; build them once."""
    from selfsup_kernels.core import backends

    folder = ROOT / "build" / "versions" / sha[:12]
    built = folder / f".built-{device}"
    if built.exists():
        return folder
    say(f"building {describe(sha)}")
    folder.mkdir(parents=True, exist_ok=True)
    git("archive", "--format=tar", f"--output={folder}.tar", sha)  # needs no lock of the checkout's index
    shutil.unpack_archive(f"{folder}.tar", folder)
    Path(f"{folder}.tar").unlink()
    extension = backends.load_extension()[0] is not None  # what this version runs with, the other one is built with
    own = {"SELFSUP_KERNELS_SKIP_BUILD": "0" if extension else "1"}
    own |= {} if device == "cuda" else {"SELFSUP_KERNELS_SKIP_CUDA_BUILD": "1"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(f"{describe(sha)} does not build", command, cwd=folder, env=os.environ | own)
    built.touch()
    return folder


def launch(tree, device, cases, seconds):
    """Return what one process of a version measures."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"  # the package is that of the folder
    command = [sys.executable, "-c", code, str(Path(__file__).with_name("workloads.py")), str(device), str(seconds)]
    asked = json.dumps([[case, part] for case, part, _ in cases])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = json.loads(run("a version ended", command, input=asked, cwd=tree, env=environment).splitlines()[-1])
    if not Path(found.pop("package")).resolve().is_relative_to(Path(tree).resolve()):
        raise Unusable(f"--base: expected the package of {tree}, another one was imported")
    return found


def judge(base, head) -> dict:
    """Return the ratio (head over base), the noise (of the processes of one version, from the 20th to the 80th
    percentile) and a verdict: "slower" or "faster" where these ranges do not overlap, else "same".
    """
    times = {BASE: timing.summary(base), HEAD: timing.summary(head)}
    ratio = times[HEAD]["p50_ms"] / times[BASE]["p50_ms"]
    verdict = "same"
    if times[HEAD]["p20_ms"] > times[BASE]["p80_ms"] and ratio > 1 + FLOOR:
        verdict = "slower"
    elif times[HEAD]["p80_ms"] < times[BASE]["p20_ms"] and ratio < 1 / (1 + FLOOR):
        verdict = "faster"
    noise = max(found["p80_ms"] / found["p20_ms"] for found in times.values()) - 1
    return {"ratio": ratio, "noise": noise, "verdict": verdict, "times": times}


def requests(cases):
    """Yield the parameters of each case, each part that needs no graph made before it, and a label."""
    for made in cases:
        parameters = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        for part in made.parts:
            if part != "backward":  # its forward would be timed with it: "both" has it
                yield {"op": made.op, **parameters}, part, made.label


def compare(trees, device, cases, seconds, advance):
    """Return what each side ran, and rows with the ratio, the noise and the verdict of every case."""
    sides = {name: [] for name in trees}
    for number in range(LAUNCHES):
        for name in (BASE, HEAD) if number % 2 else (HEAD, BASE):
            sides[name].append(launch(trees[name], device, cases, seconds))
            advance(name)
    rows = []
    for index, (case, part, label) in enumerate(cases):
        times = {name: [found["rows"][index] for found in launches] for name, launches in sides.items()}
        row = {**case, "part": part, "label": label}
        reasons = [f"{name}: {t}" for name, of_side in times.items() for t in of_side if isinstance(t, str)]
        if reasons:
            rows.append({**row, "verdict": "not measured", "reason": reasons[0]})
        else:
            rows.append({**row, **judge(times[BASE], times[HEAD])})
    return {name: {key: found[0][key] for key in ("impl", "torch")} for name, found in sides.items()}, rows


def main(cases, device, base="auto", seconds=3.0, json_path=None) -> int:
    """Measure, print a table, and return 1 where something is slower.

    Args:
        base: a commit; "auto" for the one that is checked out where files of the package have been changed, else its
            parent.
        seconds: about how long to measure each case and part of each version.
    """
    from selfsup_kernels.lab.bench import results
    from selfsup_kernels.lab.pages import console, progress

    out = console()
    say = lambda text: out.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    try:
        if not (ROOT / ".git").exists():
            raise Unusable(f"--base: expected a package that runs from its git checkout, got the one in {ROOT}")
        edited = changed()
        old = commit(base if base != "auto" else "HEAD" if edited else "HEAD^")
        trees = {BASE: tree_of(old, str(device).split(":")[0], say), HEAD: ROOT}
        with progress.Progress() as bar:
            bar.stage("Measure", 2 * LAUNCHES)
            sides, rows = compare(trees, device, list(requests(cases)), seconds / LAUNCHES, bar.advance)
    except Unusable as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    names = {BASE: describe(old), HEAD: describe("HEAD") + (" with changes" if edited else "")}
    if json_path:
        header = {"names": names, "sides": sides, "launches": LAUNCHES, "device": str(device)}
        results.write_json(json_path, header, rows)
        say(f"wrote {json_path}")
    for name, side in sides.items():
        say(f"{name}: {names[name]} ({side['impl']}, torch {side['torch']})")
    say(f"{'':36} {'base ms':>9} {'now ms':>9} {'ratio':>6} {'noise':>6}")
    for row in rows:
        found = row.get("reason", "")
        if "ratio" in row:
            old, new = (row["times"][name]["p50_ms"] for name in (BASE, HEAD))
            found = f"{old:9.3g} {new:9.3g} {row['ratio']:6.3f} {100 * row['noise']:4.0f} %"
        say(f"{row['label'] + ' ' + row['part']:36} {found}  {row['verdict']}")
    slower = sum(row["verdict"] == "slower" for row in rows)
    some = f"{slower} of {len(rows)} slower" if slower else "Nothing is slower"
    say(f"{some} than the base, beyond the noise of this run.")
    return 1 if slower else 0
