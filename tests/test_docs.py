"""Test that the documents match the committed results, that their links work, and that their examples run."""

import doctest
import importlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import benchmarks_script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

pytest.importorskip("matplotlib", reason="the pictures of the documents are matplotlib's")

import sections  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import selfsup_kernels as sk  # noqa: E402

HEADER = {"device": "Imagined GPU", "driver": "1.2", "cuda": "13.0", "torch": "2.13.0", "triton": "3.7.1"}
HEADER |= {"date": "2026-01-02", "peers": {"lightly": "1.6.0"}, "copy_gb_per_s": 4000.0, "in_place_gb_per_s": 3900.0}
HEADER |= {"matrix_product_tflops": {"float32": 50.0, "bfloat16": 800.0}}


def timed(milliseconds):
    return {"p20_ms": 0.9 * milliseconds, "p50_ms": milliseconds, "p80_ms": 1.2 * milliseconds, "calls": 10}


def info_nce_row(batch, part, ours, eager, **more):
    """Return a result row with the times of ours and eager in ms; ``eager=None``: out of memory. lightly is absent."""
    unavailable = {"lightly": "absent: lightly is not installed", "Liger": "takes one view"}
    times = {"selfsup_kernels": timed(ours)}
    if eager is None:
        unavailable["eager"] = "out of memory: asked for 137 GB"
    else:
        times["eager"] = timed(eager)
    row = {"op": "info_nce", "views": 2, "batch": batch, "dim": 128, "dtype": "float32", "part": part, "notes": {}}
    row |= {"times": times, "unavailable": unavailable, "tflops": 20.0, "fraction": 0.4}
    row["peak_bytes"] = {"selfsup_kernels": 4096 * batch, "eager": None if eager is None else 40 * batch**2}
    row["errors"] = {"selfsup_kernels": {"loss": 2e-7, "gradient": 3e-6}}
    return row | more


@pytest.fixture
def documents(tmp_path):
    """Return the updated documents of a checkout with results of one made-up GPU."""
    folder = tmp_path / "benchmarks" / "results" / "imagined-gpu"
    folder.mkdir(parents=True)
    rows = [info_nce_row(256, "both", 2.0, 1.5), info_nce_row(1024, "forward", 1.0, 8.0)]
    rows += [info_nce_row(1024, "both", 4.0, 50.0), info_nce_row(65536, "both", 1234.0, None)]
    (folder / "info_nce.json").write_text(json.dumps({"header": HEADER, "rows": rows}))
    ema = {"op": "ema", "model": "ViT-B", "tensors": 200, "numbers": 86_000_000, "target": "float32"}
    ema |= {"source": "bfloat16", "dtype": "bfloat16", "part": "update"}
    ema |= {key: {} for key in ("peak_bytes", "unavailable", "notes", "errors")}
    ema |= {"times": {"selfsup_kernels": timed(0.25), "loop": timed(5.0)}, "gb_per_s": 3000.0, "fraction": 0.75}
    (folder / "ema.json").write_text(json.dumps({"header": HEADER, "rows": [ema]}))
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "docs")
    markers = ("results:imagined-gpu/info_nce", "pictures:imagined-gpu")
    readme = "".join(f"\n<!-- {marker} -->\n<!-- end -->\n" for marker in markers)
    (tmp_path / "README.md").write_text("# A page\n" + readme + "\nAfter it.\n")
    made = tables.Documents(tmp_path)
    assert made.update()
    return made


def test_committed_pages_and_pictures_match_the_results():
    documents = tables.Documents()
    assert not documents.update(write=False), "run: make docs"
    shown = "".join(page.read_text(encoding="utf-8") for page in documents.pages)
    assert {path.name for path in documents.images.iterdir() if path.name not in shown} == set()


PERFORMANCE = """
## Imagined GPU
Imagined GPU, driver 1.2, cuda 13.0, torch 2.13.0, triton 3.7.1, measured 2026-01-02.
50 TFLOP/s (float32)
4000 GB/s
InfoNCE, 2 views, B = 1024, D = 128, float32, forward + backward: ours 4.00 ms and 4.2 MB, eager 50.0 ms (12.5x) and
| InfoNCE, 2 views, D = 128, float32 | eager | 256 forward + backward | 2.00 ms, eager 1.50 ms (0.75x) |
| 1024, forward + backward | 4.00 ms | 50.0 ms (12.5x) | 20 TFLOP/s, 40% |
| 65536, forward + backward | 1.23 s | out of memory | 20 T
- eager: out of memory: asked for 137 GB (2 views, B = 65536, D = 128, float32)
- lightly: absent: lightly is not installed
| 1024 | 4.2 MB | 42 MB | 4.0x |
| ViT-B, 200 tensors, bfloat16 to float32 | 0.25 ms | 5.00 ms (20.0x) | 3000 GB/s, 75% |
| float32 | selfsup_kernels | 2e-07 | 3e-06 |
"""
README = """
| 256, 128 | 2.00 ms | 1.50 ms (0.75x) | 1.0 MB | 2.6 MB |
| 65536, 128 | 1.23 s | out of memory | 268 MB | - |
<img src="docs/images/imagined-gpu-info_nce-2x128-float32-time.png" width="480"
"""


@pytest.mark.parametrize(("page", "lines"), [("docs/performance.md", PERFORMANCE), ("README.md", README)])
def test_a_gpu_renders(documents, page, lines):
    text = (documents.root / page).read_text()
    assert [line for line in lines.strip().splitlines() if line not in text] == []
    if page == "README.md":
        assert text.startswith("# A page\n")
        assert text.endswith("<!-- end -->\n\nAfter it.\n")


def test_cuda_graph_times_have_a_column_if_they_were_measured():
    rows = [info_nce_row(256, "forward", 2.0, 1.5), info_nce_row(256, "both", 2.0, 1.5)]
    assert "CUDA graph" not in sections.times_table(rows)[0]
    for row in rows:
        row["graph_ms"] = {"selfsup_kernels": 0.25, "impl='cuda'": 0.5, "eager": 1.0}
    head, _, forward, both = sections.times_table(rows)
    assert head.endswith("| CUDA graph | of a matrix product |")
    assert forward.split(" | ")[-2] == "-"
    assert both.split(" | ")[-2] == "0.25 ms (eager 4.0x)"


def test_a_non_finite_error_is_shown_as_the_largest():
    rows = [info_nce_row(256, "both", 2.0, 1.5), info_nce_row(512, "both", 2.0, 1.5)]
    rows[0]["errors"] = {"selfsup_kernels": {"loss": 1e-7, "gradient": None, "rows": 16}}
    assert "| float32 | selfsup_kernels | 2e-07 | inf |" in sections.errors(rows)


def test_a_changed_result_changes_page_and_picture(documents, monkeypatch, capsys):
    images = documents.images
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    assert len(before) == 1
    assert documents.update() == []
    path = documents.results / "imagined-gpu" / "info_nce.json"
    data = path.read_text()
    path.write_text(data.replace('"p50_ms": 50.0', '"p50_ms": 51.0'))
    monkeypatch.setattr(tables, "Documents", lambda: documents)
    with pytest.raises(SystemExit, match="run: python"):
        tables.main(["--check"])
    lines = capsys.readouterr().out.splitlines()
    assert {Path(line.split()[0]).name for line in lines} == {"README.md", "performance.md", *before}
    documents.update()
    path.write_text(data)
    documents.update()
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before  # the same bytes for the same data


def test_the_pages_of_a_release_name_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE).groups()
    assert version == sk.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'\nversion: {version}\ndate-released: "{date}"\n' in citation


FENCE = re.compile(r"^( *)(`{3,}).*?^\1\2`*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a Markdown page."""
    found = set()
    for title in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title).lower()).replace(" ", "-")
        found.add(next(name for n in range(99) if (name := slug + (f"-{n}" if n else "")) not in found))
    return found


def test_links_between_pages_are_not_broken():
    """Every relative link of the Markdown pages is a file, and its anchor a heading there, as on GitHub."""
    pages = [*tables.Documents().pages, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    broken, count = [], 0
    for page, text in texts.items():
        for target in map("".join, LINK.findall(FENCE.sub("", text))):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            count += 1
            aim = (page.parent / path).resolve() if path else page
            if not aim.exists() or (anchor and aim.suffix == ".md" and anchor not in anchors(texts[aim])):
                broken.append(f"{page.name}: {target}")
    assert not broken
    assert count > 100


def test_the_functions_of_where_to_look_are_defined():
    """The README names files and functions; each function is defined in its file."""
    cell = re.compile(r"\[`[^`]+`\]\(([^)]+)\): ((?:`\w+`(?:, )?)+)")
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Where to look")[2]
    named = [(path, name) for path, names in cell.findall(table) for name in re.findall(r"\w+", names)]
    assert len(named) > 15
    for path, name in named:
        defined = rf"(?m)^(def |struct |(?:[\w:<>&*]+ )*){name}\b *[({{]"
        assert re.search(defined, (ROOT / path).read_text(encoding="utf-8")), f"{name} is not defined in {path}"


RUN = ["quickstart.md", "ema.md", "faq.md", "methods/siglip.md"]
RUN += sorted(f"migrate/{page.name}" for page in (ROOT / "docs" / "migrate").iterdir())


@pytest.mark.parametrize("name", RUN)
def test_blocks_of_a_page_run(name):
    """All blocks run in one namespace, but for those whose first line says which library they need."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    blocks = [block for block in blocks if not re.match(r"# .*\bneeds \w", block)]
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)
    assert names.get("loss", torch.zeros(())).isfinite()


WITHOUT_EXAMPLE = {"ContrastiveStats", "PARTS", "Run", "patch", "report"}
"""Results of other calls, and functions that need another library."""


def documented():
    """Yield the public functions and classes, by the module that lists them."""
    listed = ["selfsup_kernels", *(f"selfsup_kernels.{name}" for name in ("methods", "optim", "profile", "compat"))]
    listed += [f"selfsup_kernels.compat.{name}" for name in sk.compat.__all__ if name not in ("patch", "report")]
    for module in map(importlib.import_module, listed):
        for name in module.__all__:
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and name not in WITHOUT_EXAMPLE:
                yield pytest.param(thing, id=f"{module.__name__.removeprefix('selfsup_kernels.')}.{name}")
    for name in ("unavailable", "select", "require"):
        yield pytest.param(getattr(sk.backends, name), id=f"backends.{name}")


@pytest.mark.parametrize("thing", list(documented()))
def test_the_example_of_a_docstring_runs(thing):
    globs = {"torch": torch, "nn": nn, "sk": sk}
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=globs)
    assert found.examples, f"{thing.__name__} has no example"
    said = []
    doctest.DocTestRunner(verbose=False).run(found, out=said.append)
    assert not said, "".join(said)


def test_the_curves_are_recorded_method_by_method(tmp_path):
    """A run of one method keeps the curves of the others."""
    pytest.importorskip("sklearn", reason="the curves train on scikit-learn's digits")
    curves = benchmarks_script("curves")
    for name in ("siglip", "cmc"):
        curves.main(["--method", name, "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)])
    found = tables.load(tmp_path, "curves")
    assert [row["method"] for row in found["rows"]] == ["cmc", "siglip"]
    assert all(len(row["runs"][0]["accuracy"]) == 2 for row in found["rows"])
    assert found["header"]["settings"]["train"] == 1300


@pytest.mark.parametrize(
    ("gone", "milliseconds", "rate"), [("selfsup_kernels", 2.0, 50.0), ("impl='cuda'", 1.0, 100.0)]
)
def test_columns_of_removed_kernels_are_left_out(tmp_path, gone, milliseconds, rate):
    """If the default was removed, the other kernel is ours, with its rates."""
    row = info_nce_row(64, "both", 1.0, 3.0, gb_per_s=100.0, graph_ms={"selfsup_kernels": 1.0, "impl='cuda'": 4.0})
    row["times"]["impl='cuda'"] = {"p50_ms": 2.0}
    data = {"header": {"removed": [gone]}, "rows": [row | {"graph_fraction": 0.8}]}
    (tmp_path / "byol.json").write_text(json.dumps(data))
    (found,) = tables.load(tmp_path, "byol")["rows"]
    assert list(found["times"]) == ["selfsup_kernels", "eager"]
    assert (found["times"]["selfsup_kernels"]["p50_ms"], found["gb_per_s"]) == (milliseconds, rate)
    assert (found["graph_ms"]["selfsup_kernels"], found["graph_fraction"]) == ((4.0, 0.2) if rate == 50 else (1.0, 0.8))


def test_the_picture_of_what_limits_a_call_takes_any_sizes():
    """All cases may be limited by the host, or there may be one size."""
    header = {"device": "Imagined GPU", "matrix_product_tflops": {"bfloat16": 800.0}}
    shape = {"op": "info_nce", "dim": 256, "dtype": "bfloat16"}
    rows = [info_nce_row(batch, "both", 2.0, 1.5, graph_ms={"selfsup_kernels": 0.1}, **shape) for batch in (64, 128)]
    for some in (rows, rows[:1]):
        shown = tables.limits.shown(some)
        assert {tables.limits.limit(row) for row in shown} == {"host"}
        assert tables.limits.picture(shown, header)
