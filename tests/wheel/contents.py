"""Check what ``make wheel`` made: the wheel's tag, size, contents and requirements, and the source distribution.

python tests/wheel/contents.py FOLDER --architectures "8.0+PTX 9.0a"
"""

import argparse
import email
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

NEWEST_GLIBC = 34
"""A wheel built here needs at most glibc 2.34: Debian 12, Ubuntu 22.04, RHEL 9."""
MOST_BYTES = 40e6
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
OF_TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
"""What the libraries may link to. Nothing of it is in the wheel."""
EXCLUDED = ("csrc/", "tests/", "benchmarks/", "docs/", "examples/", "build/")


def needed(library: Path) -> set[str]:
    """Return the names of the libraries that one is linked to."""
    listed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert not re.search("RPATH|RUNPATH", listed), f"{library.name} has a search path of its own:\n{listed}"
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed))


def check_wheel(path: Path, architectures: list[str]) -> str:
    name, version, python, abi, tag = path.stem.split("-")
    assert name == "selfsup_kernels"
    assert python == abi == f"cp{sys.version_info.major}{sys.version_info.minor}", path.name
    platforms = [re.fullmatch(r"manylinux_2_(\d+)_x86_64", part) for part in tag.split(".")]
    assert all(platforms), f"{tag}: expected manylinux tags"
    oldest = min(int(found[1]) for found in platforms)
    assert oldest <= NEWEST_GLIBC, f"{tag} is for glibc 2.{oldest}, later than 2.{NEWEST_GLIBC}"
    assert path.stat().st_size <= MOST_BYTES, f"{path.name} has {path.stat().st_size / 1e6:.0f} MB"

    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = wheel.namelist()
        wheel.extractall(folder)
        package = Path(folder) / name
        for library in ("_CUDA.so", f"_C.cpython-{python[2:]}-x86_64-linux-gnu.so"):
            others = needed(package / library) - SYSTEM - OF_TORCH
            assert not others, f"{library} needs {others}"
        libraries = [entry for entry in names if ".so" in entry]
        assert len(libraries) == 2, f"expected the package's two libraries, got {libraries}"
        assert not [entry for entry in names if entry.startswith(EXCLUDED)]
        facts = json.loads((package / "_build_info.json").read_text())
        assert facts["version"] == version
        assert facts["cuda_architectures"].split() == architectures, facts
        with zipfile.ZipFile(package / "_kernels.zip") as kernels:
            compiled = json.loads(kernels.read("index.json"))["architectures"]
        expected = sorted({int(re.match(r"(\d+)\.(\d)", a).expand(r"\1\2")) for a in architectures})
        assert compiled == expected, f"Triton kernels for {compiled}, expected {expected}"

        (metadata,) = Path(folder).glob("*.dist-info/METADATA")
        facts = email.message_from_string(metadata.read_text())
        required = [entry for entry in facts.get_all("Requires-Dist") if "extra ==" not in entry]
        assert required == ["torch>=2.11"], required
        assert facts["License-Expression"] == "Apache-2.0"
        assert "entry_points.txt" in {Path(entry).name for entry in names}
        assert "LICENSE" in {Path(entry).name for entry in names}
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(names)} files, machine code for {compiled}"


def check_source(path: Path) -> str:
    with tarfile.open(path) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/cpu/module.cpp", "csrc/cuda/byol.cu"} <= names
    built = [name for name in names if name.endswith((".so", ".zip", "_build_info.json", ".pyc"))]
    assert not built, f"the source distribution has files of a build: {built}"
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architectures", type=str.split, required=True)
    options = parser.parse_args()
    (wheel,), (source,) = options.folder.glob("*.whl"), options.folder.glob("*.tar.gz")
    print(check_wheel(wheel, options.architectures))
    print(check_source(source))


if __name__ == "__main__":
    main()
