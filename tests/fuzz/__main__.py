"""Random calls of every public function, against the dense equations in float64: ``make fuzz CASES=N SEED=S``.

    make fuzz CASES=1000 SEED=1                             # numbers 0 .. 999
    make fuzz SEED=1 CASE=517                               # one of them again
    make fuzz DEVICE=cuda IMPL=triton PYTHON=python3        # on a GPU

The seed and the number of a case determine everything about it, including the kernels it runs on (`SHARES`), unless
--impl is given. A failure is one line that ends with the command that repeats it. bounds.py has the error bounds.
"""

import argparse
import collections
import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import time

import process as child

SHARES = [
    ("cpu", {}, 770),
    ("cpu", {"SELFSUP_KERNELS_CPU_CAPABILITY": "avx2"}, 100),
    ("cpu", {"SELFSUP_KERNELS_CPU_CAPABILITY": "default"}, 100),
    ("reference", {}, 22),
    ("triton", {"TRITON_INTERPRET": "1"}, 3),
    ("cuda", {}, 5),
]
"""(implementation, environment, cases per 1000): the processor's default instructions, narrower instructions, the
reference, Triton's kernels in its interpreter, CUDA's in the emulator that SELFSUP_KERNELS_CUDA_EMULATOR names."""


def share_of(number):
    """Return the index into SHARES for a case. Consecutive cases differ in it: 617 and 1000 have no common factor."""
    place = number * 617 % 1000
    ends = itertools.accumulate(count for *_, count in SHARES)
    return next(i for i, end in enumerate(ends) if place < end)


def parse():
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="the number of cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all cases (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first number (default %(default)s)")
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--impl", help="for all cases: cpu, reference, triton or cuda")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    return parser.parse_args()


class Run:
    def __init__(self, options):
        self.options = options
        self.counts = collections.Counter()
        self.wrong = 0
        self.done = 0
        self.began = self.told = time.monotonic()

    def command(self, number):
        """Return the command that repeats a case."""
        words = [f"make fuzz SEED={self.options.seed} CASE={number}"]
        words += [f"IMPL={self.options.impl}"] if self.options.impl else []
        words += [f"DEVICE={self.options.device} PYTHON=python3"] if self.options.device != "cpu" else []
        return " ".join(words)

    def record(self, number, kernels, name, kind, outcome, message):
        self.counts[name, kernels, kind, outcome] += 1
        self.done += 1
        if outcome in ("WRONG", "CRASH"):
            self.wrong += 1
            print(f"{outcome} {name} by {kernels}: {message}: {self.command(number)}", flush=True)
        elif self.options.verbose:
            print(f"{number} {name} by {kernels} {kind}: {outcome}", flush=True)
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            print(f"... {self.done} cases in {self.told - self.began:.0f} s", flush=True)

    def by(self, impl, environment, numbers):
        """Run ``numbers`` on one kind of kernels, in separate processes."""
        kernels = " ".join([impl, environment.get("SELFSUP_KERNELS_CPU_CAPABILITY", "")]).strip()
        jobs = min(self.options.jobs, len(numbers))
        # On a GPU consecutive cases share compiled kernels, so they run in one process.
        block = child.CLASS if self.options.device != "cpu" else 1
        waiting = [[n for n in numbers if n // block % jobs == i] for i in range(jobs)]
        waiting = [rest for rest in waiting if rest]
        running = {}

        def start(rest):
            context = multiprocessing.get_context("spawn")
            from_child, to_parent = context.Pipe(duplex=False)
            current = context.Value("q", rest[0], lock=False)
            before = {name: os.environ.get(name) for name in environment}
            os.environ.update(environment)
            arguments = (self.options.seed, rest, impl, self.options.device, current, to_parent)
            process = context.Process(target=child.work, args=arguments)
            process.start()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            to_parent.close()
            running[from_child] = process, current, rest

        for rest in waiting:
            start(rest)
        while running:
            for pipe in multiprocessing.connection.wait(list(running)):
                try:
                    number, *result = pipe.recv()
                    self.record(number, kernels, *result)
                    continue
                except EOFError:
                    process, current, rest = running.pop(pipe)
                    process.join()
                if process.exitcode > 0 and process.exitcode != child.LOST:
                    sys.exit(f"the cases of {kernels} do not run: a process ended with status {process.exitcode}")
                if process.exitcode:
                    number = current.value
                    if process.exitcode != child.LOST:
                        self.record(number, kernels, "?", "?", "CRASH", f"killed by signal {-process.exitcode}")
                    rest = [n for n in rest if n > number]
                    if rest:
                        start(rest)

    def summary(self):
        """Print the outcome counts: by function and dtype (by argument for bad calls), by kernels, in total."""
        for title, key in (("function", lambda k: (k[0], k[2])), ("kernels", lambda k: (k[1], "")), ("all", None)):
            rows = collections.defaultdict(collections.Counter)
            for kept, count in self.counts.items():
                rows[key(kept) if key else ("all", "")][kept[3]] += count
            print("" if title == "all" else f"\n{title}")
            for (name, kind), outcomes in sorted(rows.items()):
                told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
                print(f"  {name:<26}{kind:<16}{told}")
        print(f"{self.done} cases, seed {self.options.seed}, in {time.monotonic() - self.began:.0f} s")


def main():
    options = parse()
    one = options.case is not None
    numbers = [options.case] if one else list(range(options.first, options.first + options.cases))
    run = Run(options)
    # The processes share the cores, and the cases are too small for several threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.device != "cpu" and options.impl is None:
        sys.exit("--impl: expected triton or cuda with --device cuda")
    if options.impl:
        environment = {"TRITON_INTERPRET": "1"} if options.impl == "triton" and options.device == "cpu" else {}
        run.by(options.impl, environment, numbers)
    else:
        emulator = os.environ.pop("SELFSUP_KERNELS_CUDA_EMULATOR", "")
        for i, (impl, environment, _) in enumerate(SHARES):
            mine = [n for n in numbers if share_of(n) == i]
            if impl == "cuda":
                environment = {"SELFSUP_KERNELS_CUDA_EMULATOR": emulator}
            if mine and (impl != "cuda" or emulator):
                run.by(impl, environment, mine)
            elif mine:
                print(
                    f"{len(mine)} cases of the CUDA kernels did not run: SELFSUP_KERNELS_CUDA_EMULATOR names no library"
                )
    run.summary()
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
