"""Experts on meshes of more than two processes, data parallelism on the other axis, against one process.

``python benchmarks/meshes.py [--check]`` starts torchrun with 4 processes (gloo).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _table import Row, main
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gatecc
from gatecc.parallel import expert_parallel, expert_parameters

RANKS, EXPERTS, WIDTH, ROWS = 4, 8, 16, 3
WRAPPERS = ("ddp", "fsdp", "experts in fsdp")


class Block(nn.Module):
    """x + down(gelu(up(x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def upcycled() -> nn.Module:
    """Two layers with experts that differ; the same in every process."""
    torch.manual_seed(0)
    recipe = gatecc.recipe("upcycle", experts=EXPERTS, k=2)
    model = gatecc.transform(nn.Sequential(Block(), Block()).eval(), recipe, (torch.randn(4, 5, WIDTH),), inplace=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def given(ranks: int) -> tuple[Tensor, Tensor]:
    """Inputs and the gradients of outputs, for all ranks."""
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(ranks * ROWS, 5, WIDTH, generator=generator) for _ in range(2))
    return x, grad


def gradients(
    model: nn.Module, runs: nn.Module, x: Tensor, grad: Tensor, experts: dist.ProcessGroup | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the whole gradient of every parameter. ``experts``: ranks over which nobody has averaged those of
    the rest."""
    y = runs(x)
    (y * grad).sum().backward()
    own = set(expert_parameters(model))
    for p in model.parameters() if experts is not None else ():
        if p not in own and isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad.to_local(), dist.ReduceOp.SUM, experts)
            p.grad /= dist.get_world_size(experts)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def wrapped(model: nn.Module, kind: str, mesh: Any) -> tuple[nn.Module, nn.Module]:
    """Experts along the last axis of a mesh, everything else by a wrapper over all ranks or along the first."""
    if kind == "experts in fsdp":
        expert_parallel(model, mesh[mesh.mesh_dim_names[1]])
        for part in (*cast("nn.Sequential", model), model):
            fully_shard(part, mesh=mesh[mesh.mesh_dim_names[0]])
        return model, model
    expert_parallel(model, mesh)
    if kind == "ddp":
        return model, DistributedDataParallel(model)
    flat = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(f"all {mesh.mesh_dim_names[0]}",))
    fully_shard(model, mesh=flat, ignored_params=set(expert_parameters(model)))
    return model, model


def rank(folder: Path) -> None:
    """One of the processes: what differs from one process that holds all, relative to the largest number."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    me, ranks = dist.get_rank(), dist.get_world_size()
    x, grad = given(ranks)
    y, right = gradients(model := upcycled(), model, x, grad)
    mine = slice(ROWS * me, ROWS * me + ROWS)
    found: dict[str, tuple[float, float, bool]] = {}
    for data, experts in ((r, ranks // r) for r in range(1, ranks + 1) if ranks % r == 0):
        for kind in WRAPPERS:
            if kind == "experts in fsdp" and data == 1:
                continue  # nothing to shard them over
            mesh = init_device_mesh("cpu", (data, experts), mesh_dim_names=(f"d{data}{kind}", f"e{data}{kind}"))
            spread, runs = wrapped(upcycled(), kind, mesh)
            group = mesh.get_group(1) if kind == "experts in fsdp" else None
            got, grads = gradients(spread, runs, x[mine], grad[mine], group)
            worst = max(
                float((grads[n] * ranks - g).abs().max() / g.abs().max().clamp_min(1)) for n, g in right.items()
            )
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = cast("dict[str, Tensor]", get_model_state_dict(spread, options=options))
            same = me > 0 or all(torch.equal(state[n], t) for n, t in upcycled().state_dict().items())
            error = float((got - y[mine]).abs().max() / y.abs().max().clamp_min(1))
            found[f"({data}, {experts}) {kind}"] = error, worst, same
    torch.save(found, folder / f"{me}.pt")
    dist.destroy_process_group()


def measure() -> Sequence[Row]:
    """The worst rank of each mesh."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        subprocess.run([*command, __file__, "--folder", folder], check=True, timeout=900, env={**os.environ})
        found = [torch.load(Path(folder) / f"{r}.pt") for r in range(RANKS)]
    return list(_rows(found))


def _rows(found: Sequence[dict[str, tuple[float, float, bool]]]) -> Iterator[Row]:
    for name in found[0]:
        outputs, grads, same = zip(*(one[name] for one in found), strict=True)
        yield Row(f"{name}: outputs", max(outputs), 1e-6)
        yield Row(f"{name}: gradients", max(grads), 1e-6)
        yield Row(f"{name}: other state dict", float(not all(same)), 0)


if __name__ == "__main__":
    if "--folder" in sys.argv:
        rank(Path(sys.argv[sys.argv.index("--folder") + 1]))
    else:
        main("meshes", measure)
