"""``python -m selfsup_kernels info``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfsup_kernels as sk
from selfsup_kernels import _build, backends, info
from selfsup_kernels.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def _forget():
    backends.load_extension.cache_clear()
    backends._reasons.clear()


@pytest.fixture
def hidden(monkeypatch):
    """A pure-Python install: no extension, the record of a build that failed."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_build, "record", lambda: {"failure": "no compiler was found."})
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def test_as_a_command():
    command = [sys.executable, "-m", "selfsup_kernels", "info"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (sk.__version__, torch.__version__, "Implementations", "reference  yes"):
        assert word in done.stdout


def test_json_says_what_the_package_does(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["auto"] == backends.select("auto", torch.empty(0))
    for name, state in facts["implementations"].items():
        assert state["available"] == (backends.unavailable(name) is None)
        assert state["available"] or state["reason"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()


def test_loaded_extension_is_described():
    if backends.unavailable("cpu") is not None:
        pytest.skip("the extension is not built")
    extension = info.collect()["extension"]
    assert extension["loaded"]
    assert extension["record"]["torch"]
    assert isinstance(extension["cpu_capability"], str)
    assert "error" not in extension["build_info"]
    assert extension["cpu_capability"] in info.render(info.collect())


def test_without_the_extension(hidden, capsys, monkeypatch):
    monkeypatch.setattr(info, "compiler", lambda: "/usr/bin/c++")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "no compiler was found." in text
    assert f"mend: {backends.REBUILD}\n" in text
    assert "not loaded" in text
    state = info.collect()["implementations"]["cpu"]
    assert not state["available"]
    assert backends.REBUILD not in state["reason"]
    assert info.collect()["auto"] == "reference"


def test_without_a_compiler_the_command_gets_one_first(hidden, monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    state = info.collect()["implementations"]["cpu"]
    assert state["mend"] == f"apt-get install -y g++ && {backends.REBUILD}"
    assert "No C++ compiler" in state["reason"]


def test_a_broken_probe_is_reported_not_raised(monkeypatch):
    def broken(*arguments):
        raise OSError("probe fell over")

    for module, name in ((backends, "unavailable"), (backends, "load_extension"), (torch.cuda, "is_available")):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(info, "_cpu_model", broken)
    text = info.render(info.collect())
    assert text.count("probe fell over") >= 5
    json.dumps(info.collect())
