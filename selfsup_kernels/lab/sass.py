"""Reads the machine code of a compiled kernel: how often each instruction stands in it, and what the main loop runs.

The main loop is found in the control flow, not guessed from the text: the innermost loop that has both matrix products
and exponentials. Of the ways through it the shortest one counts that passes most products and most stores: masks at the
edges, the slow path of a condition and spinning at a barrier are what it leaves out.
"""

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

LINE = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<when>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;&?\n]*)", re.M
)
"""Operands end at a semicolon, in newer listings before the scheduler's notes (``&req={1} ?WAIT2_END_GROUP;``)."""
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
RESULT = re.compile(r"RED|ATOMG|STG")
EXPONENTIAL = "MUFU.EX2"


class Instruction(NamedTuple):
    at: int
    name: str
    conditional: bool
    target: int | None
    """Where a branch goes."""


class MainLoop(NamedTuple):
    """What one warp issues for one pass: ``once``, and ``inner`` for every pass of the loop over pieces of the rows."""

    once: dict[str, int]
    inner: dict[str, int]


def instructions(text: str) -> list[Instruction]:
    """Those of a listing by ``cuobjdump -sass``."""
    found = []
    for m in LINE.finditer(text):
        name, operands = m["name"], m["operands"].strip()
        branch = name.split(".")[0] in ("BRA", "CALL")
        target = TARGET.search(operands) if branch else None
        # `BRA P4, 0x40` and `BRA.U UP0, 0x40` have a condition of their own; a call comes back.
        conditional = m["when"] is not None or name.startswith("CALL") or (branch and "," in operands)
        found.append(Instruction(int(m["at"], 16), name, conditional, target and int(target[1], 16)))
    return found


def is_matrix(name):
    return MATRIX.match(name) is not None


def main_loop(code: list[Instruction]) -> MainLoop | None:
    """None where the kernel has no matrix products. Where no loop makes whole tiles, the program is the loop."""
    if not any(is_matrix(i.name) for i in code):
        return None
    blocks, edges = _flow(code)
    loops = _loops(blocks, edges)

    def has(body, test):
        return any(test(i.name) for b in body for i in blocks[b])

    products = [body for body in loops.values() if has(body, is_matrix)]
    tiles = [body for body in products if has(body, lambda name: name.startswith(EXPONENTIAL))]
    tile = min(tiles, key=len, default=frozenset(blocks))
    inner = min((body for body in products if body < tile), key=len, default=frozenset())
    start = min(tile) if len(tile) == len(blocks) else next(h for h, body in loops.items() if body == tile)
    once, again = Counter(), Counter()
    for b in _hot_path(blocks, edges, tile, start):
        (again if b in inner else once).update(i.name for i in blocks[b])
    return MainLoop(dict(once), dict(again))


def _flow(code):
    """Basic blocks by the address where they begin, and each block's successors."""
    starts = {code[0].at} | {i.target for i in code if i.target is not None}
    ends = ("BRA", "CALL", "EXIT", "RET", "BRX")
    starts |= {after.at for i, after in pairwise(code) if i.name.split(".")[0] in ends}
    blocks = {}
    for i in code:
        if i.at in starts:
            blocks[i.at] = current = []
        current.append(i)
    order = list(blocks)
    edges = {}
    for n, b in enumerate(order):
        last = blocks[b][-1]
        leaves = last.name.split(".")[0] in ends and not last.conditional
        targets = [] if leaves or n + 1 == len(order) else [order[n + 1]]
        if last.target in blocks:
            targets.append(last.target)
        edges[b] = targets
    return blocks, edges


def _reachable(edges, start, without=None):
    seen, stack = set(), [start]
    while stack:
        b = stack.pop()
        if b not in seen and b != without:
            seen.add(b)
            stack += edges[b]
    return seen


def _loops(blocks, edges):
    """Natural loops: header -> the blocks of the loop."""
    start = next(iter(blocks))
    everywhere = _reachable(edges, start)
    before = {b: [a for a in everywhere if b in edges[a]] for b in everywhere}
    loops = {}
    for header in everywhere:
        backward = [a for a in before[header] if a >= header]
        if not backward:
            continue
        free = _reachable(edges, start, without=header)  # what the header does not dominate
        body = {header}
        stack = [a for a in backward if a not in free]
        if not stack:
            continue
        while stack:
            b = stack.pop()
            if b not in body:
                body.add(b)
                stack += before[b]
        loops[header] = frozenset(body)
    return loops


def _hot_path(blocks, edges, body, start):
    def worth(b):
        needed = sum(is_matrix(i.name) or RESULT.match(i.name) is not None for i in blocks[b])
        return 100_000 * needed - len(blocks[b])

    order, open_, done = [], set(), set()
    forward = {b: [] for b in body}

    stack = [(start, iter(edges[start]))]
    open_.add(start)
    while stack:  # depth first: an edge to a block that is still open closes a loop
        b, rest = stack[-1]
        for c in rest:
            if c not in body or c in open_:
                continue
            forward[b].append(c)
            if c not in done:
                open_.add(c)
                stack.append((c, iter(edges[c])))
                break
        else:
            stack.pop()
            open_.discard(b)
            done.add(b)
            order.append(b)
    best = {}
    closing = {b for b in done if start in edges[b]} or {b for b in done if not forward[b]}
    for b in order:  # successors come first
        options = [best[c] for c in forward[b] if c in best]
        if b in closing:
            options.append((0, []))
        if options:
            value, path = max(options, key=lambda o: o[0])
            best[b] = (value + worth(b), [b, *path])
    return best[start][1] if start in best else []


def matrix_operations(name: str, warps: int) -> int | None:
    """Floating-point operations of one matrix instruction, for all warps of a program. None: not in its name."""
    if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return 2 * int(m[1]) * int(m[2]) * int(m[3]) * warps // 4
    if m := re.match(r"HMMA\.168(\d+)", name):
        return 2 * 16 * 8 * int(m[1]) * warps
    return None
