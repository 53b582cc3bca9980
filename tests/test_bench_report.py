"""The page of ``bench --html`` in a browser, from committed results, and what is on it, from rows that are made up."""

import json
import math
import re
from pathlib import Path

import pytest
from browser import check_layout, check_report, open_page

from selfsup_kernels.lab.bench import tables

for package in ("rich", "psutil", "jinja2", "matplotlib"):
    pytest.importorskip(package)

FOLDERS = sorted({p.parent for p in Path(__file__).parents[1].glob("benchmarks/results/*/info_nce.json")})


def made_up(op, part, milliseconds, **more):
    """Return a row; ``milliseconds``: name -> the median."""
    row = {"op": op, "dtype": "float32", "part": part, "fraction": 0.5, "gb_per_s": 8.0, "unavailable": {}, "notes": {}}
    row |= {"model": "ResNet-50", "numbers": 10} if op == "ema" else {"views": 2, "batch": 256, "dim": 128}
    row["times"] = {
        name: {"p20_ms": 0.95 * value, "p50_ms": value, "p80_ms": 1.05 * value, "calls": 9}
        for name, value in milliseconds.items()
    }
    row |= {"peak_bytes": {"selfsup_kernels": 10**6, "eager": 2 * 10**8}}
    return row | {"errors": {name: {"loss": 2e-8, "gradient": 1e-7} for name in milliseconds}} | more


LARGE = made_up("info_nce", "both", {"selfsup_kernels": 100.0, "eager": 1000.0, "compile": 1500.0}, batch=4096)
ALONE = made_up("info_nce", "both", {"selfsup_kernels": 1500.0}, batch=16384, unavailable={"eager": "out of memory"})
EMA = made_up("ema", "update", {"selfsup_kernels": 3.5, "foreach_lerp": 3.0})
ROWS = [made_up("info_nce", "both", {"selfsup_kernels": 1.0, "eager": 2.0}), LARGE, ALONE, EMA]
NOTHING = [made_up("info_nce", "both", {}, unavailable={"selfsup_kernels": "out of memory"})]


@pytest.mark.parametrize(
    ("folder", "rows", "pictures"),
    [*((folder, None, 20) for folder in FOLDERS), (FOLDERS[0], ROWS, 3), (FOLDERS[0], NOTHING, 1)],
    ids=[*(folder.name for folder in FOLDERS), "few", "none"],
)
def test_page_in_a_browser(folder, rows, pictures, tmp_path):
    from selfsup_kernels.lab.bench import report

    files = [folder / f"{op}.json" for op in tables.TITLES]
    found = [json.loads(path.read_text()) for path in files if path.exists()]
    rows = rows or [row for data in found for row in data["rows"]]
    report.write(tmp_path / "page.html", found[0]["header"], rows)
    assert not re.search(r"(src|href)=.https?:", (tmp_path / "page.html").read_text())
    sentence, numbers = tables.answer(rows)
    if rows is ROWS:
        check_report(tmp_path / "page.html")
    with open_page(tmp_path / "page.html", width=390) as page:
        check_layout(page)
        assert page.inner_text("h1") == sentence
        assert page.locator(".numbers dd").all_inner_texts() == [number for number, _ in numbers]
        assert page.locator("img").count() >= pictures


def test_answer():
    """The largest case that a baseline has a time for, where ours is not the fastest, and three numbers."""
    text, numbers = tables.answer(ROWS)
    largest = (
        "InfoNCE (views 2, B 4096, D 128, dtype float32) takes 100 ms; eager, the fastest baseline, takes 1000 ms."
    )
    slower = "EMA update (model ResNet-50, dtype float32): foreach_lerp takes 0.857x the time of ours."
    assert text == f"{largest} Ours is the fastest in 2 of 3 cases; the worst is {slower}"
    assert tables.answer(ROWS[:2])[0] == f"{largest} Ours is the fastest in all 2 cases."
    assert [number for number, _ in numbers] == ["10x", "200x", "50 %"]
    assert [number for number, _ in tables.answer([EMA])[1]] == ["0.857x", "50 %"]
    assert tables.answer([ALONE])[0].endswith("takes 1500 ms.")
    assert tables.answer(NOTHING)[1] == []


@pytest.mark.parametrize(
    ("dtype", "error", "style"),
    [("float32", 3e-2, "wrong"), ("float32", None, "wrong"), ("float32", 1e-7, "slower"), ("bfloat16", 1e-2, "slower")],
)
def test_errors_beyond_rounding_are_flagged(dtype, error, style):
    errors = {"selfsup_kernels": {"loss": 1e-8}, "eager": {"loss": error, "rows": 64}}
    row = made_up("info_nce", "both", {"selfsup_kernels": 1.0, "eager": 2.0}, dtype=dtype, errors=errors)
    assert tables.make("info_nce", [row]).styles == ["ours", style]
    assert tables.worst(row, "eager") == (math.inf if error is None else error)


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


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_contrast_with_the_page(theme):
    """As the Web Content Accessibility Guidelines (AA) ask: 4.5 for text, 3 for the shapes of pictures."""
    from selfsup_kernels.lab.pages import THEMES, figures
    from selfsup_kernels.lab.profile import plots

    def contrast(color):
        low, high = sorted([luminance(color), luminance(THEMES[theme]["paper"])])
        return (high + 0.05) / (low + 0.05)

    assert {name for name in ("ink", "soft", "ours", "faster", "wrong") if contrast(THEMES[theme][name]) < 4.5} == set()
    shapes = [*figures.COLORS.values(), *figures.OTHERS, *plots.COLORS]
    assert {color for color in shapes if contrast(color) < 3} == set()
