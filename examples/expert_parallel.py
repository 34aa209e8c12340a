"""Experts on many machines: an upcycled byte language model whose experts lie on different ranks.

    torchrun --nproc-per-node 2 examples/expert_parallel.py            # gloo on CPUs, nccl where there are GPUs
    torchrun --nnodes 2 --nproc-per-node 8 ... examples/expert_parallel.py --experts 64 --steps 1000

Every rank reads its own text, holds E/W of the experts, and a shard of everything else (FSDP2). The checkpoint holds
whole tensors and is that of one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import gatecc
from gatecc.parallel import clip_grad_norm_, expert_parallel, expert_parameters
from gatecc.parallel.estimate import Sizes, estimate
from gatecc.train.tasks import stdlib_bytes

VOCABULARY, WIDTH, HEADS, LENGTH = 256, 64, 4, 64


class Block(nn.Module):
    """Causal attention and a gated feed-forward layer, x: (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LM(nn.Module):
    """Bytes (B, N) -> logits (B, N, 256)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.size(1), device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass
class Trained:
    """What a run shows: the losses of its steps, the elements that this rank holds and all, and bytes per token."""

    losses: list[float]
    held: int
    whole: int
    sent: float
    same_checkpoint: bool


def make(experts: int, k: int, mesh: DeviceMesh, dispatcher: str, device: torch.device) -> nn.Module:
    """The upcycled model over a mesh: experts by `expert_parallel`, the rest by FSDP2. The same on every rank count."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    model = gatecc.transform(LM(), gatecc.recipe("upcycle", experts=experts, k=k), (ids,), inplace=True).to(device)
    expert_parallel(model, mesh, dispatcher)
    fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model)))
    return model.train()


def train(
    steps: int, experts: int, k: int, dispatcher: str, folder: Path, batch: int = 8, device: str = "cpu"
) -> Trained:
    """Train on a process group that is there; every rank calls it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    place = torch.device(device)
    mesh = init_device_mesh(place.type, (ranks,), mesh_dim_names=("ranks",))
    model = make(experts, k, mesh, dispatcher, place)
    text, _ = stdlib_bytes((steps + 1) * ranks * batch * (LENGTH + 1))
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1).long()[rank::ranks]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses: list[float] = []
    for step in range(steps):
        chosen = rows[step * batch : (step + 1) * batch].to(place)
        loss = F.cross_entropy(model(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    sizes = Sizes.of(model, k)
    way = estimate(sizes, ranks, "ep+fsdp", dispatcher=dispatcher)
    same = saved_and_loaded(model, folder)
    return Trained(losses, held, sum(p.numel() for p in model.parameters()), way.forward + way.backward, same)


def saved_and_loaded(model: nn.Module, folder: Path) -> bool:
    """Save sharded, spoil the weights, load: whether they are back, bitwise."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    before: dict[str, Any] = get_model_state_dict(model, options=whole)
    save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": get_model_state_dict(model)}
    load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    after: dict[str, Any] = get_model_state_dict(model, options=whole)
    return all(torch.equal(after[name], t) for name, t in before.items())


def main(
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 50,
    experts: Annotated[int, typer.Option(help="of each layer; a multiple of the ranks")] = 8,
    k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    dispatcher: Annotated[str, typer.Option(help="all-to-all or all-gather")] = "all-to-all",
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")] = Path("expert-parallel"),
) -> None:
    """Run under torchrun."""
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    found = train(steps, experts, k, dispatcher, out, device=device)
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{ranks} ranks, {experts} experts, {k} for each token, {dispatcher}")
        print(f"loss {found.losses[0]:.3f} → {found.losses[-1]:.3f} in {steps} steps")
        print(f"a rank holds {found.held:,} of {found.whole:,} parameters and sends {found.sent:,.0f} bytes per token")
        print(f"checkpoint in {out}: loaded {'bitwise equal' if found.same_checkpoint else 'DIFFERENT'}")
    dist.destroy_process_group()
    if not found.same_checkpoint:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
