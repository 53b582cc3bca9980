"""Test that each plain loop of ``examples/`` runs as a script and that its loss falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["simclr", "moco", "byol", "cmc", "byol_contrast", "clip", "siglip", "chunked"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_loss_falls(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    try:
        import importlib

        losses = importlib.import_module(name).main(["--steps", "40"] + (["--batch", "512"] * (name == "chunked")))
    finally:
        for module in (name, "digits"):
            sys.modules.pop(module, None)
    assert len(losses) == 40
    early = losses[12:17] if name == "moco" else losses[:5]  # MoCo's queue first fills with similar keys
    assert sum(losses[-5:]) < 0.99 * sum(early)
    out = capsys.readouterr().out
    if name in ("clip", "siglip"):
        found = re.search(r"top-1 of 497 held-out pairs: (\S+) left to right, (\S+) right to left, chance 0.002", out)
        assert min(map(float, found.groups())) > 0.1
    else:
        assert "k-NN accuracy 0.9" in out


@pytest.mark.parametrize("name", ["moco", "lightning_modules"])
def test_runs_as_a_script(name):
    arguments = ["byol"] if name == "lightning_modules" else ["--queue", "300"]
    result = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments, "--steps", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "k-NN accuracy" in result.stdout
