"""The layers are in order, and the check that says so can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import layers


def test_the_package_is_in_order() -> None:
    assert [str(violation) for violation in layers.check()] == []


FORBIDDEN = {
    "above": ("ir/site.py", "from gatecc.capture.export import capture", "ir imports capture, which stands above it"),
    "beside": ("decoder/derive.py", "import gatecc.diagnose", "decoder imports diagnose, which stands beside it"),
    "codegen to passes": ("codegen/c/emit.py", "from gatecc import passes", "codegen imports passes"),
    "passes to codegen": ("passes/gate.py", "from gatecc.codegen import onnx", "passes imports gatecc.codegen"),
    "facade": ("recipes/gates.py", "from gatecc.transform import transform", "recipes imports transform"),
    "public surface": ("passes/gate.py", "from gatecc import inspect", "passes imports the public surface"),
    "public surface whole": ("transform.py", "import gatecc", "transform imports the public surface"),
    "command line": ("__init__.py", "from gatecc.cli import app", "__init__ imports cli, which stands above it"),
    "lowest": ("errors.py", "from gatecc.ir.site import Site", "errors imports ir"),
    "relative": ("ir/site.py", "from ..passes.gate import Gate", "ir imports passes"),
    "relative module": ("ir/__init__.py", "from .. import passes", "ir imports passes"),
    "relative from a package": ("codegen/onnx/__init__.py", "from ...passes import gate", "codegen imports passes"),
    "in a function": ("ir/site.py", "def f():\n    if True:\n        import gatecc.report", "ir imports report"),
    "for types": (
        "ir/site.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gatecc.scope import Scope",
        "ir imports scope",
    ),
    "dynamic": ("ir/site.py", "import importlib\nimportlib.import_module('gatecc.passes')", "ir imports passes"),
    "second of two": ("ir/site.py", "import gatecc.errors, gatecc.cli", "ir imports cli"),
    "unknown target": ("cli.py", "import gatecc.attic.old", "gatecc.attic.old, which has no layer"),
    "unknown file": ("attic/old.py", "", "`attic` has no layer"),
    "torch.onnx": ("passes/lower.py", "import torch.onnx", "passes imports torch.onnx"),
    "torch.onnx by from": ("passes/lower.py", "from torch import onnx", "passes imports torch.onnx"),
    "torch.onnx by attribute": ("passes/lower.py", "import torch\ntorch.onnx.export(f)", "passes imports torch.onnx"),
    "onnx": ("passes/lower.py", "def f():\n    import onnx.helper", "passes imports onnx"),
    "onnx_ir": ("ir/site.py", "import onnx_ir as oir", "ir imports onnx_ir"),
    "triton": ("passes/fuse.py", "from triton import language as tl", "passes imports triton"),
    "triton by name": (
        "passes/fuse.py",
        "from importlib import import_module\nimport_module('triton')",
        "imports triton",
    ),
}


@pytest.mark.parametrize(("file", "source", "message"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_forbidden_import_is_caught(file: str, source: str, message: str) -> None:
    found = layers.violations(source, f"gatecc/{file}")
    assert len(found) == 1
    assert message in str(found[0])
    assert str(found[0]).startswith(f"gatecc/{file}:{max(1, len(source.splitlines()))}: ")


ALLOWED = {
    "below": ("passes/gate.py", "from gatecc.errors import GateccError\nfrom gatecc.ir.site import Site"),
    "within": ("passes/gate.py", "from gatecc.passes.edit import Editor\nfrom . import edit"),
    "relative within": ("ir/site.py", "from .mask import Mask"),
    "facade among itself": ("transform.py", "from gatecc.report import Report\nfrom gatecc import scope"),
    "public surface": ("__init__.py", "from gatecc.transform import inspect, transform"),
    "command line": ("cli.py", "import gatecc\nfrom gatecc import inspect\nfrom gatecc.errors import GateccError"),
    "onnx in codegen": ("codegen/onnx/write.py", "import onnx, onnx_ir, onnxruntime, onnxscript, torch.onnx"),
    "triton in an operator": ("ops/gla.py", "import triton"),
    "the rest of torch": ("passes/gate.py", "import torch\nfrom torch import fx\ntorch.ops.aten.mul.Tensor"),
    "a name that only looks like one": ("passes/gate.py", "import onnxlike, tritonic, gatecc_extra"),
}


@pytest.mark.parametrize(("file", "source"), ALLOWED.values(), ids=ALLOWED)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert layers.violations(source, f"gatecc/{file}") == []


def test_a_tree_is_walked_and_the_advice_is_given(tmp_path: Path) -> None:
    (tmp_path / "gatecc" / "ir").mkdir(parents=True)
    (tmp_path / "gatecc" / "__init__.py").write_text("")
    (tmp_path / "gatecc" / "ir" / "bad.py").write_text("import torch\nfrom gatecc.passes import gate\n")
    assert [str(violation) for violation in layers.check(tmp_path)] == [
        "gatecc/ir/bad.py:2: ir imports passes, which stands above it: "
        "move what both need into a layer below (errors), or hand it in as an argument"
    ]
