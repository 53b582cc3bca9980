"""The page of ``bench --html`` in a browser, and what is on it, from rows that are made up."""

import json
import math
import re

import pytest
from browser import check_layout, open_page

from selfsup_kernels.lab.bench import results, tables
from selfsup_kernels.lab.bench.workloads import case

for package in ("rich", "psutil", "jinja2", "matplotlib"):
    pytest.importorskip(package)
jsonschema = pytest.importorskip("jsonschema")

HEADER = {
    **{"device": "A Processor With A Long Name (R) Platinum 1234X 64-Core", "kind": "cpu", "threads": 2},
    **{"cpu_capability": "avx2", "driver": None, "triton": None, "torch": "2.13.0", "selfsup_kernels": "0.1.0"},
    **{"python": "3.11.7", "date": "2026-01-02", "peers": {"lightly": "1.6.0"}, "matrix_product_size": 2048},
    **{"matrix_product_tflops": {"float32": 0.2, "bfloat16": 0.6}, "copied_bytes": 2**28},
    **{"copy_gb_per_s": 50.0, "in_place_gb_per_s": 80.0},
}
GPU = {k: v for k, v in HEADER.items() if k not in ("threads", "cpu_capability")} | {
    **{"kind": "cuda", "multiprocessors": 132, "memory_bytes": 80 * 10**9, "cuda": "13.0"},
    "matrix_product_tflops": {"bfloat16": 700.0, "tfloat32": 400.0, "float32": 50.0},
}


def row(op, part, milliseconds, peak=None, unavailable=None, notes=None, errors=None, **parameters):
    """``milliseconds``: name -> the median."""
    made = case(op, **parameters)
    facts = {**made.facts, "part": part}
    times = {n: {"p20_ms": 0.95 * v, "p50_ms": v, "p80_ms": 1.05 * v, "calls": 9} for n, v in milliseconds.items()}
    facts |= {"times": times, "peak_bytes": peak or {}, "errors": errors or {}}
    facts |= {"unavailable": unavailable or {}, "notes": notes or {}}
    ours = milliseconds.get("selfsup_kernels")
    if ours and op == "info_nce":
        facts |= {"tflops": made.operations(part) / ours / 1e9, "fraction": 0.5}
    elif ours:
        facts |= {"gb_per_s": made.bytes(part) / ours / 1e6, "fraction": 0.5}
    return facts


def info_nce(batch, ours, eager=None, **others):
    times = {"selfsup_kernels": ours, **({"eager": eager} if eager else {}), **others}
    unavailable = {} if eager else {"eager": "out of memory: 16.0 GB were available"}
    peak = {"selfsup_kernels": 1000 * batch, "eager": 50 * batch**2}
    errors = {name: {"loss": 2e-8, "gradient": 1e-7} for name in times}
    for part, share in (("forward", 0.3), ("backward", 0.7), ("both", 1.0)):
        shared = {name: share * value for name, value in times.items()}
        yield row("info_nce", part, shared, peak, unavailable, errors=errors, batch=batch)


def ema(ours, rival):
    errors = {"selfsup_kernels": {"value": 3e-8}}
    return row("ema", "update", {"selfsup_kernels": ours, "foreach_lerp": rival}, notes={"loop": "a"}, errors=errors)


BYOL = row("byol", "both", {"selfsup_kernels": 5.0, "compile": 4.0}, {"selfsup_kernels": 10**7}, batch=4096)
ALL = [*info_nce(256, 1.0, 2.0, compile=1.5), *info_nce(4096, 100.0, 1000.0), *info_nce(16384, 1500.0), BYOL]
ALL.append(ema(3.5, 3.0))
NOTHING = [row("info_nce", "both", {}, unavailable={"selfsup_kernels": "out of memory"}, batch=8)]
PAGES = {
    "everything": (HEADER, ALL, 4),
    "one size": (HEADER, list(info_nce(1024, 8.0, 40.0)), 2),
    "one update": (HEADER, [ema(3.5, 3.0)], 1),
    "a GPU": (GPU, ALL, 5),
    "nothing": (HEADER, NOTHING, 0),
}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page_in_a_browser(name, width, tmp_path):
    from selfsup_kernels.lab.bench import report

    header, rows, pictures = PAGES[name]
    jsonschema.validate({"header": header, "rows": rows}, json.loads(results.SCHEMA.read_text()))
    path = tmp_path / "page.html"
    report.write(path, header, rows)
    with open_page(path, width=width) as page:
        check_layout(page)
        sentence, numbers = tables.answer(rows)
        assert page.inner_text("h1") == sentence
        assert page.locator(".numbers b").all_inner_texts() == [number for number, _ in numbers]
        assert page.locator("img").count() == pictures
        if name == "everything":
            assert "out of memory" in page.inner_text("main")
    assert not re.search(r"(src|href)=.https?:", path.read_text())


def test_answer():
    """The largest case that a rival has a time for, and three numbers."""
    sentence, numbers = tables.answer(ALL)
    assert sentence == (
        "InfoNCE (views 2, B 4096, D 128, dtype float32) takes 100 ms; eager, the fastest rival, takes 1000 ms."
    )
    assert [number for number, _ in numbers] == ["10x", "205x", "50 %"]
    assert [number for number, _ in tables.answer([ema(3.5, 3.0)])[1]] == ["0.857x", "50 %"]
    assert tables.answer(list(info_nce(16384, 1500.0)))[0].endswith("takes 1500 ms.")
    assert tables.answer(NOTHING)[1] == []


def test_where_a_rival_is_faster_is_said():
    """Beyond the spread of the calls, and nowhere else."""
    assert len(list(tables.slower(ALL))) == 2
    assert list(tables.slower([ema(3.0, 2.9)])) == []
    assert "foreach_lerp takes 0.857x ours" in next(tables.slower([ema(3.5, 3.0)]))


@pytest.mark.parametrize(
    ("dtype", "error", "style"),
    [("float32", 3e-2, "wrong"), ("float32", None, "wrong"), ("float32", 1e-7, "slower"), ("bfloat16", 1e-2, "slower")],
)
def test_errors_beyond_rounding_are_flagged(dtype, error, style):
    made = list(info_nce(256, 1.0, 2.0))[-1] | {"dtype": dtype}
    made["errors"]["eager"]["gradient"] = error
    assert [style for _, style in tables.make("info_nce", [made]).lines] == ["ours", style]
    assert tables.worst(made, "eager") == (math.inf if error is None else error)


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("out of memory: 1.0 GB were available", "out of memory"),
        ("skipped: one call takes 9 s (--seconds)", "skipped"),
        ("absent: No module named 'x'", "absent"),
        ("ValueError: no", "failed"),
        ("takes two views, not 4", "not possible"),
    ],
)
def test_what_stands_in_place_of_a_time(reason, word):
    assert tables.status(reason) == word
