"""Test ``python -m selfsup_kernels info``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfsup_kernels as sk
from selfsup_kernels.__main__ import main
from selfsup_kernels.core import backends, build, info

ROOT = Path(__file__).resolve().parents[1]


def _forget():
    backends.load_extension.cache_clear()
    backends._reasons.clear()


@pytest.fixture
def hidden(monkeypatch):
    """Simulate a pure-Python install outside of a source folder."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "record", lambda: {"failure": "it was not asked for."})
    monkeypatch.setattr(build, "SOURCE", None)
    monkeypatch.setattr(build, "cannot_compile", lambda: None)
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


def cpu_state():
    return info.collect()["implementations"]["cpu"]


def test_without_the_extension(hidden, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_installed_from", lambda: str(tmp_path / "a folder"))
    monkeypatch.delenv("SELFSUP_KERNELS_SKIP_BUILD", raising=False)
    command = f"pip install --force-reinstall --no-deps '{tmp_path}/a folder'"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "why: the C++ extension was not built: it was not asked for.\n" in text
    assert f"run: {command}\n" in text
    assert "(impl='auto' on CPU tensors: reference)" in text
    assert cpu_state() == {
        "available": False,
        "reason": "the C++ extension was not built: it was not asked for.",
        "command": command,
    }
    backends._reasons.clear()
    monkeypatch.setenv("SELFSUP_KERNELS_SKIP_BUILD", "1")  # the command has to override it
    assert cpu_state()["command"] == f"SELFSUP_KERNELS_SKIP_BUILD=0 {command}"


def test_the_folder_that_pip_installed_from(monkeypatch, tmp_path):
    class Installed:
        text = None

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.text

    monkeypatch.setattr(build.importlib.metadata, "distribution", lambda name: Installed())
    assert build._installed_from() == "."
    source = tmp_path / "a folder"
    Installed.text = json.dumps({"url": source.as_uri(), "dir_info": {}})
    assert build._installed_from() == "."  # the folder does not exist
    source.mkdir()
    (source / "setup.py").touch()
    assert build._installed_from() == str(source)


def test_a_source_folder_that_is_not_built(hidden, monkeypatch, tmp_path):
    """`python -m selfsup_kernels` in a checkout imports the checkout, even if another copy is installed."""
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    monkeypatch.setattr(build, "record", dict)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site")])
    state = cpu_state()
    assert f"not built in the source folder {tmp_path}" in state["reason"]
    assert state["command"].endswith(f"pip install -e {tmp_path}")

    installed = tmp_path / "site" / "selfsup_kernels"
    installed.mkdir(parents=True)
    (installed / "_C.so").touch()
    _forget()
    state = cpu_state()
    assert f"The one installed in {installed} has it: start Python in another folder" in state["reason"]
    assert state["command"].endswith(f"pip install -e {tmp_path}")


def test_without_a_compiler_the_command_installs_one_first(hidden, monkeypatch):
    monkeypatch.setattr(build, "cannot_compile", lambda: ("no C++ compiler: g++ is not on PATH.", "apk add g++ && "))
    state = cpu_state()
    assert state["command"].startswith("apk add g++ && pip install ")
    assert "no C++ compiler" in state["reason"]


def test_packages_that_a_command_needs(monkeypatch, capsys):
    monkeypatch.setattr(info, "_is_installed", lambda name: name not in ("rich", "sklearn"))
    assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "bench no needs rich run: pip install rich profile no needs rich run: pip install rich demo" in text
    assert "demo no needs sklearn, rich run: pip install scikit-learn rich" in text


def test_build_details_are_shown_only_with_verbose(capsys):
    assert main(["info"]) == 0
    assert "torch_target" not in capsys.readouterr().out
    assert main(["info", "--verbose"]) == 0
    assert ("torch_target" in capsys.readouterr().out) == (backends.unavailable("cpu") is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_install_command_is_shown_for_triton(monkeypatch):
    monkeypatch.setattr(backends, "emulated", lambda impl: False)
    monkeypatch.setitem(backends._reasons, "triton", backends.Unavailable("Triton is not installed.", "pip"))
    state = info.collect()["implementations"]["triton"]
    assert state == {"available": False, "reason": "no NVIDIA GPU was found.", "command": None}


def test_a_missing_cuda_library_is_explained_on_a_gpu():
    facts = info.collect()
    facts["cuda"] = [{"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.6}]
    facts["implementations"]["triton"] = {"available": True, "reason": None, "command": None}
    facts["implementations"]["cuda"] = {"available": False, "reason": "not built.", "command": None}
    text = " ".join(info.render(facts).split())
    assert "why: not built. so: on GPU tensors these run as PyTorch's own operators (impl='reference')" in text


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"selfsup_kernels {sk.__version__}\n"


def test_a_broken_probe_is_reported_not_raised(monkeypatch):
    def broken(*arguments):
        raise OSError("probe fell over")

    for module, name in ((backends, "unavailable"), (backends, "load_extension"), (torch.cuda, "is_available")):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(info, "_cpu_model", broken)
    text = info.render(info.collect())
    assert text.count("probe fell over") >= 5
    json.dumps(info.collect())
