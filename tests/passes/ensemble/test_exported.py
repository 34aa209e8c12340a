"""Ensembles in ONNX Runtime: a member that no sample chose does not run, and the outputs are torch's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.ir.router import RouterSpec

CHOSEN = [0, 1, 2, 3, 0, 2]  # by the largest of the four numbers of each sample
X = 2 * torch.eye(4)[CHOSEN] + torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
RUN = {"sin": {"Exp", "Sin"}, "cos": {"Exp", "Cos"}, "tan": {"Tan"}, "joint": {"Exp", "Sin", "Tan", "Sinh"}}


class Marked(nn.Module):
    """A Linear and a function whose operator no other model has. x: (B, 4) -> {"y": (B, 3), "z": (B,)}"""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.out = function, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.out(self.function(x))
        return {"y": y, "z": y.sum(-1)}


class Joint(nn.Module):
    def forward(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        y = torch.sinh(one["y"] + other["y"])
        return {"y": y, "z": y.mean(-1)}


class Feature(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


@pytest.fixture(scope="module")
def ensemble() -> gatecc.Ensemble:
    """Two members read a feature, which only they read; a fourth reads two of the others."""
    torch.manual_seed(0)
    members = {"sin": Marked(torch.sin), "cos": Marked(torch.cos), "tan": Marked(torch.tan), "joint": Joint()}
    reads = {"sin": {"x": "f"}, "cos": {"x": "f"}, "joint": {"one": "sin", "other": "tan"}}
    plain = gatecc.ensemble(members, {"x": X}, features={"f": Feature()}, inputs=reads)
    spec = RouterSpec("x", "linear", "softmax_topk(1)", "random(1.0)")
    made = gatecc.transform(plain.eval(), gatecc.Choose(gatecc.Model, spec), {"x": X}, verify=False)
    assert isinstance(made, gatecc.Ensemble)
    nn.init.eye_(next(p for p in made.get_submodule("router").parameters() if p.dim() == 2))
    return made


def run(folder: Path, x: Tensor) -> tuple[list[Any], set[str]]:
    """What a session gives, and the operators that it ran."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, {"x": x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return outputs, {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


def test_only_what_a_sample_chose_runs(ensemble: gatecc.Ensemble, tmp_path: Path) -> None:
    made = gatecc.export(ensemble, tmp_path / "out", {"x": X})
    whole, left = made.notes
    assert whole == "a member of an ensemble runs on all samples of a batch if one of them chose it, else not"
    assert "not compared: then_branch" in left  # of the member that the first three rows leave out
    assert not ensemble.branches
    marks = set[str]().union(*RUN.values())
    assert ensemble.chosen(x=X).indices[:, 0].tolist() == CHOSEN
    members = [ensemble.names[i] for i in CHOSEN]
    rows = [[i] for i in range(4)] + [[i for i in range(6) if members[i] != left] for left in RUN]
    for at in rows:
        got, ran = run(tmp_path / "out", X[at])
        assert ran & marks == set[str]().union(*(RUN[members[i]] for i in at))
        with torch.no_grad():
            expected = ensemble(x=X[at])
        for y, name in zip(got, ("y", "z"), strict=True):
            torch.testing.assert_close(torch.from_numpy(y), expected[name], atol=1e-5, rtol=1e-5)


def test_a_graph_of_torch_holds_every_member(ensemble: gatecc.Ensemble) -> None:
    """Branches are for ONNX; a compiler gets what it can fuse."""
    program = torch.export.export(ensemble, (), {"x": X})
    targets = {str(node.target) for node in program.graph.nodes}
    assert "gatecc.only_if.default" not in targets
    assert {"aten.sin.default", "aten.cos.default", "aten.tan.default"} <= targets
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x=X), ensemble(x=X))
