"""The page of ``bench --html``, in a browser, and the sentences on it, from rows that are made up."""

import json
import re

import pytest
from browser import check_layout, open_page

from selfsup_kernels.lab.bench import findings, results, tables
from selfsup_kernels.lab.bench.workloads import case

for package in ("rich", "psutil", "jinja2", "matplotlib"):
    pytest.importorskip(package)
jsonschema = pytest.importorskip("jsonschema")

HEADER = {
    "device": "A Processor With A Long Name (R) Platinum 1234X 64-Core",
    "kind": "cpu",
    "threads": 2,
    "cpu_capability": "avx2",
    "driver": None,
    "triton": None,
    "torch": "2.13.0",
    "selfsup_kernels": "0.1.0",
    "python": "3.11.7",
    "date": "2026-01-02",
    "peers": {"lightly": "1.6.0"},
    "matrix_product_tflops": {"float32": 0.2, "bfloat16": 0.6},
    "matrix_product_size": 2048,
    "copy_gb_per_s": 50.0,
    "in_place_gb_per_s": 80.0,
    "copied_bytes": 2**28,
}
GPU = {k: v for k, v in HEADER.items() if k not in ("threads", "cpu_capability")} | {
    "kind": "cuda",
    "multiprocessors": 132,
    "memory_bytes": 80 * 10**9,
    "cuda": "13.0",
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


ALL = [
    *info_nce(256, 1.0, 2.0, compile=1.5),
    *info_nce(1024, 8.0, 40.0, compile=20.0),
    *info_nce(4096, 100.0, 1000.0, compile=400.0),
    *info_nce(16384, 1500.0),
    row(
        "byol", "both", {"selfsup_kernels": 5.0, "eager": 50.0, "compile": 4.0}, {"selfsup_kernels": 10**7}, batch=4096
    ),
    ema(3.5, 3.0),
]
PAGES = {
    "everything": (HEADER, ALL),
    "one size": (HEADER, list(info_nce(1024, 8.0, 40.0))),
    "one update": (HEADER, [ema(3.5, 3.0)]),
    "a GPU": (GPU, ALL),
    "nothing": (HEADER, [row("info_nce", "both", {}, unavailable={"selfsup_kernels": "out of memory"}, batch=8)]),
}


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_up_keeps_to_the_schema(name):
    header, rows = PAGES[name]
    jsonschema.validate({"header": header, "rows": rows}, json.loads(results.SCHEMA.read_text()))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page_in_a_browser(name, width, tmp_path):
    from selfsup_kernels.lab.bench import report

    header, rows = PAGES[name]
    path = tmp_path / "page.html"
    report.write(path, header, rows)
    with open_page(path, width=width) as page:
        check_layout(page)
        assert page.inner_text("h1") == findings.answer(rows)
        pictures = page.locator("img").count()
        expected = {"everything": 6, "one size": 3, "one update": 2, "a GPU": 6, "nothing": 0}
        assert pictures == expected[name]
        text = page.inner_text("main")
        if name != "nothing":
            assert "How close to the machine?" in text
            assert "Is it the same number?" in text
        if name == "everything":
            assert "out of memory" in text
            assert "5 M" not in text
    assert not re.search(r"(src|href)=.https?:", path.read_text())


def test_answer():
    assert findings.answer(ALL) == (
        "At B = 4096 (2 views, D = 128, float32) our InfoNCE takes 100 ms, 10.0 times less than eager and 4.0 times "
        "less than torch.compile, and 4.1 MB of memory above its inputs where eager takes 839 MB."
    )
    (text,) = [s for s in findings.findings(ALL) if "BYOL" in s and s.startswith("At B")]
    assert "takes 5 ms, 10.0 times less than eager and 1.25 times as long as torch.compile" in text
    assert findings.answer([ema(3.5, 3.0)]) == (
        "Over ResNet-50's 25.6 million parameters (float32) our EMA update takes 3.5 ms, 1.17 times as long as "
        "torch._foreach_lerp_."
    )
    assert "as long as torch._foreach_lerp_" in findings.answer([ema(3.0, 3.0)])
    assert findings.answer(PAGES["nothing"][1]) == "Nothing was measured: the reasons are below."
    alone = findings.answer(list(info_nce(16384, 1500.0)))
    assert alone.endswith("our InfoNCE takes 1.5 s; eager ran out of memory.")


def test_where_ours_is_slower_is_said():
    lost = findings.findings(ALL)[-1]
    assert lost.startswith("In 2 of 11 comparisons a rival is faster than ours: BYOL loss")
    assert "1.17 times as long as torch._foreach_lerp_" in lost
    won = findings.findings(list(info_nce(256, 1.0, 2.0)))[-1]
    assert won == "In none of 3 comparisons is a rival faster than ours, beyond the spread of the calls."
    # Faster in the median, but the calls' spreads overlap.
    assert findings.slower(ema(3.0, 2.9)) == []
    assert findings.slower(ema(3.5, 3.0)) == ["foreach_lerp"]


def test_errors_beyond_rounding_are_flagged():
    made = next(info_nce(256, 1.0, 2.0))
    assert findings.wrong([made]) == []
    made["errors"]["eager"]["gradient"] = 3e-2
    assert findings.wrong([made]) == ["eager differs from float64 by up to 3e-02."]
    made["errors"]["eager"]["gradient"] = None  # not finite
    assert findings.wrong([made]) == ["eager differs from float64 by up to inf."]
    made["dtype"] = "bfloat16"
    made["errors"]["eager"]["gradient"] = 1e-2
    assert findings.wrong([made]) == []


def test_the_pages_table_of_errors_flags_the_worst_row():
    from selfsup_kernels.lab.bench import report

    bad, good = next(info_nce(256, 1.0, 2.0)), next(info_nce(1024, 1.0, 2.0))
    bad["errors"]["eager"]["gradient"] = 3e-2
    for rows in ([bad, good], [good, bad]):
        cells = dict(report.errors(rows)[1])
        assert cells["eager"] == [("3e-02", True)]


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("out of memory: 1.0 GB were available", "out of memory"),
        ("skipped: would take about 9 s (--seconds)", "skipped"),
        ("absent: No module named 'x'", "absent"),
        ("ValueError: no", "failed"),
        ("takes two views, not 4", "not possible"),
    ],
)
def test_what_stands_in_the_place_of_a_time(reason, word):
    assert tables.status(reason) == word
