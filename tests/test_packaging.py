"""What is shipped is gatecc and nothing else: not the tests, not the links passes/ and codegen/ at the root."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hatchling.builders.plugin.interface import BuilderInterface
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(builder: type[BuilderInterface[Any, Any]], folder: Path) -> Path:
    """Build in this process: hatchling's own backend does no more, and an isolated build would want a network."""
    (artifact,) = builder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(artifact)


def test_wheel_ships_only_gatecc(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(WheelBuilder, tmp_path)) as wheel:
        names = [PurePosixPath(name) for name in wheel.namelist()]
        metadata = wheel.read(f"gatecc-{PROJECT['version']}.dist-info/METADATA").decode()
    assert {name.parts[0] for name in names} == {"gatecc", f"gatecc-{PROJECT['version']}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gatecc").rglob("*.py")}
    assert {str(name) for name in names if name.suffix == ".py"} == sources
    assert PurePosixPath("gatecc/py.typed") in names
    assert "License-Expression: Apache-2.0" in metadata


def test_sdist_builds_the_package_and_carries_no_links(tmp_path: Path) -> None:
    with tarfile.open(build(SdistBuilder, tmp_path)) as sdist:
        members = sdist.getmembers()
    top = {PurePosixPath(member.name).parts[1] for member in members}
    # hatchling adds the two that it needs in order to repeat the build: PKG-INFO and .gitignore.
    assert top == {"gatecc", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert not any(member.issym() or member.islnk() for member in members)


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_root_links_point_into_the_package(name: str) -> None:
    link = ROOT / name
    # A checkout without symbolic links leaves a text file that holds the target.
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text(encoding="utf-8")
    assert target == f"gatecc/{name}"


def test_onnxruntime_stays_out_of_the_base_and_is_one_of_two() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {Requirement(requirement).name for requirement in requirements}

    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    assert set(extras) == {"onnx", "ort", "ort-gpu", "genai", "spiking", "hf", "viz", "peft", "test", "dev"}
    assert not names(PROJECT["dependencies"]) & {"onnx", "onnxruntime", "onnxruntime-gpu", "transformers", "triton"}
    assert names(extras["ort"]) == {"onnxruntime"}
    assert names(extras["ort-gpu"]) == {"onnxruntime-gpu"}
    assert not any("onnxruntime-gpu" in names(extras[name]) for name in extras if name != "ort-gpu")


@pytest.mark.parametrize(("group", "name"), [("console_scripts", "gatecc"), ("torch_dynamo_backends", "gatecc")])
def test_installed_entry_point_loads(group: str, name: str) -> None:
    (entry,) = entry_points(group=group, name=name)
    assert callable(entry.load())


def test_import_leaves_dynamo_and_inductor_out() -> None:
    """They are half of its time, and many a user needs neither."""
    late = ("torch._dynamo", "torch._inductor", "transformers", "onnx")
    code = f"import gatecc, sys; print([m for m in {late} if m in sys.modules]); from gatecc import explain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
