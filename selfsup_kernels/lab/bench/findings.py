"""What the rows of a run say, in sentences."""

from selfsup_kernels.lab.bench import results, rivals, tables

PROSE = {"compile": "torch.compile", "foreach_lerp": "torch._foreach_lerp_", "loop": "a loop of lerp_"}


def answer(rows) -> str:
    """The run in one sentence: its largest case of forward and backward, against the rivals that matter most."""
    for op in tables.TITLES:
        of_op = [row for row in rows if row["op"] == op and row["part"] in ("both", "update")]
        compared = [row for row in of_op if results.ours(row) and others(row)]
        measured = compared or [row for row in of_op if results.ours(row)]
        if measured:
            return sentence(max(measured, key=work))
    return "Nothing was measured: the reasons are below."


def work(row):
    return row.get("views", 1) * row.get("batch", 0), row.get("numbers", 0)


def others(row):
    """The rivals with a time, the fastest first."""
    names = [name for name in row["times"] if not rivals.impl_of(name)]
    return sorted(names, key=lambda name: row["times"][name]["p50_ms"])


def sentence(row) -> str:
    ours = results.ours(row)
    rest = others(row)
    named = [name for name in ("eager", "compile") if name in rest]
    named += [name for name in rest[:1] if name not in named]  # the fastest is always named
    time = f"{where(row)} {subject(row)} takes {tables.duration(row['times'][ours]['p50_ms'])}"
    text = ", ".join([time, *([joined([compared(row, name) for name in named])] if named else [])])
    peak, theirs = row["peak_bytes"].get(ours), [row["peak_bytes"].get(name) for name in named]
    if peak is not None and any(theirs) and row["op"] != "ema":
        worst = max(filter(None, theirs))
        text += f", and {tables.size(peak)} of memory above its inputs where " + (
            f"{spoken(named[theirs.index(worst)])} takes {tables.size(worst)}"
        )
    missing = [name for name in row["unavailable"] if tables.status(row["unavailable"][name]) == "out of memory"]
    if missing:
        text += f"; {joined([spoken(name) for name in missing])} ran out of memory"
    return text + "."


def where(row):
    if row["op"] == "ema":
        return f"Over {row['model']}'s {row['numbers'] / 1e6:.3g} million parameters ({row['source']})"
    return f"At B = {row['batch']} ({row['views']} views, D = {row['dim']}, {row['dtype']})"


def subject(row):
    return {"info_nce": "our InfoNCE", "byol": "our BYOL loss", "ema": "our EMA update"}[row["op"]]


def spoken(name):
    return PROSE.get(name, name)


def compared(row, name):
    ratio = results.ratio(row, name)
    if 0.97 < ratio < 1.03:
        return f"as long as {spoken(name)}"
    if ratio > 1:
        return f"{times(ratio)} times less than {spoken(name)}"
    return f"{times(1 / ratio)} times as long as {spoken(name)}"


def times(value):
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 1.95 else f"{value:.2f}"


def joined(words):
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def slower(row):
    """Rivals that are faster than ours beyond the spread of the calls: their slow ones beat our quick ones."""
    ours = results.ours(row)
    if ours is None:
        return []
    return [name for name in others(row) if row["times"][name]["p80_ms"] < row["times"][ours]["p20_ms"]]


def findings(rows) -> list[str]:
    """Sentences below the answer: the largest case of each operation, and where ours loses."""
    made = []
    first = answer(rows)
    for op in tables.TITLES:
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["op"] == op):
            some = [row for row in rows if row["op"] == op and row["dtype"] == dtype]
            text = answer(some)
            if text != first and any(row["times"] for row in some):
                made.append(text)
    lost = [(row, slower(row)) for row in rows if slower(row)]
    count = sum(1 for row in rows if results.ours(row) and others(row))
    if not count:
        return made
    if not lost:
        return [
            *made,
            f"In none of {count} comparisons is a rival faster than ours, beyond the spread of the calls.",
        ]
    places = [f"{place(row)} ({', '.join(compared(row, name) for name in names)})" for row, names in lost]
    return [*made, f"In {len(lost)} of {count} comparisons a rival is faster than ours: {'; '.join(places)}."]


def place(row):
    part = {"both": "forward + backward", "update": ""}.get(row["part"], row["part"])
    facts = [tables.TITLES[row["op"]]]
    facts += [tables.fact(key, row[key]) for key in ("model", "views", "batch", "dim", "dtype") if key in row]
    return ", ".join([*facts, *filter(None, [part])])


def wrong(rows) -> list[str]:
    """Columns whose errors are more than rounding."""
    found = {}
    for row in rows:
        for name in row["errors"]:
            if tables.wrong(row, name):
                found.setdefault(name, []).append(tables.worst(row, name))
    return [f"{tables.label(name)} differs from float64 by up to {max(errors):.0e}." for name, errors in found.items()]
