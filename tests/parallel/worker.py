"""What two processes do once, for all tests of this folder: ``torchrun --nproc-per-node 2 worker.py FOLDER``.

Each rank writes what it saw to FOLDER/rank.pt; the tests compare it with one process and with formulas.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import gatecc
from examples import expert_parallel as example
from gatecc.ir.weights import modules_of
from gatecc.parallel import clip_grad_norm_, dispatch, expert_parallel, expert_parameters
from gatecc.train import Transfer, Tune, heal
from tests.parallel import stock_worker
from tests.train.lm import LENGTH, VOCABULARY, pair

EXPERTS, SLOTS, WIDTH, TOKENS = 4, 2, 16, 20
DISPATCHERS = ("all-to-all", "all-gather", "all-reduce")
Gradients = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def upcycled() -> nn.Module:
    """Two layers with experts that differ; the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    recipe = gatecc.recipe("upcycle", experts=EXPERTS, k=SLOTS)
    model = gatecc.transform(model, recipe, (torch.randn(4, 5, WIDTH),), inplace=True, verify=False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model


def given(ranks: int) -> tuple[Tensor, Tensor]:
    """Inputs and the gradients of outputs, for all ranks."""
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(ranks * 4, 5, WIDTH, generator=generator) for _ in range(2))
    return x, grad


def gradients(model: nn.Module) -> Gradients:
    """By name without wrappers; whole ones."""
    named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    found = {n: g for n, g in named.items() if g is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def run(model: nn.Module, x: Tensor, grad: Tensor, inner: nn.Module | None = None) -> dict[str, Any]:
    """Output, and gradients of sum(output * grad); ``inner`` is what a wrapper wraps."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * grad).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "grads": gradients(inner or model)}


class Rank:
    """One of the processes, and what it found."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        self.rank, self.ranks, self.folder = rank, ranks, folder
        self.model = upcycled()
        self.x, self.grad = given(ranks)
        self.mine = slice(4 * rank, 4 * rank + 4)
        self.found: dict[str, Any] = {"one": run(self.model, self.x, self.grad), "folder": str(folder)}

    def mesh(self, name: str, *sizes: int) -> DeviceMesh:
        """A mesh of its own for each check, for a mesh has one setting."""
        sizes = sizes or (self.ranks,)
        return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(f"{name}{i}" for i in range(len(sizes))))

    def dispatchers(self) -> None:
        for name in DISPATCHERS:
            spread = expert_parallel(copy.deepcopy(self.model), self.mesh(name), name, gradients="sum")
            mine = slice(None) if name == "all-reduce" else self.mine
            with counted() as sent:
                self.found[name] = run(spread, self.x[mine], self.grad[mine])
            self.found[f"{name} twice"] = run(spread, self.x[mine], self.grad[mine])
            self.found[f"{name} calls"] = sent
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            self.found[f"{name} state"] = get_model_state_dict(spread, options=options)

    def wrappers(self) -> None:
        """The rest under DDP and FSDP2, and experts that lie on every rank: all average over ranks."""
        x, grad = self.x[self.mine], self.grad[self.mine]
        spread = expert_parallel(copy.deepcopy(self.model), self.mesh("ddp"))
        self.found["ddp"] = run(DistributedDataParallel(spread), x, grad)
        spread = expert_parallel(copy.deepcopy(self.model), self.mesh("fsdp"))
        fully_shard(spread, mesh=self.mesh("data"), ignored_params=set(expert_parameters(spread)))
        self.found["fsdp"] = run(spread, x, grad)
        norm = clip_grad_norm_(spread.parameters(), 0.5)
        self.found["clipped"] = {"norm": norm, "grads": gradients(spread)}
        spread = expert_parallel(copy.deepcopy(self.model), self.mesh("copies", self.ranks, 1))
        self.found["copies"] = run(DistributedDataParallel(spread), x, grad)
        spread = expert_parallel(copy.deepcopy(self.model), self.mesh("halves", 1, self.ranks), axis="halves1")
        self.found["halves"] = run(DistributedDataParallel(spread), x, grad)
        both = self.mesh("both", self.ranks, 1)
        spread = expert_parallel(copy.deepcopy(self.model), both["both1"])
        for layer in cast("nn.Sequential", spread):
            fully_shard(layer, mesh=both["both0"])
        fully_shard(spread, mesh=both["both0"])
        self.found["experts in fsdp"] = run(spread, x, grad)
        dense = copy.deepcopy(self.model)
        for layer in cast("nn.Sequential", dense):
            fully_shard(layer, mesh=self.mesh("all"))
        fully_shard(dense, mesh=self.mesh("all"))
        self.found["fsdp alone"] = run(dense, x, grad)

    def new_kinds_of_call(self) -> None:
        """A rank may meet a kind of call that the others do not: it learns it without them."""
        spread = expert_parallel(copy.deepcopy(self.model), self.mesh("kinds"))
        x = self.x[self.mine] if self.rank else self.x[:1, :1]
        with torch.autocast("cpu", torch.bfloat16):
            y = spread.train()(x)
        with torch.autocast("cpu", torch.bfloat16):
            right = copy.deepcopy(self.model).train()(x)
        self.found["kinds"] = float(((y - right).abs().max() / right.abs().max()).detach())

    def bytes(self) -> None:
        """Every pair of experts is asked for as often as any other, by tokens in bfloat16."""
        indices = torch.tensor(list(combinations(range(EXPERTS), SLOTS)))
        T = len(indices)
        for name in DISPATCHERS:
            experts = nn.Module()
            experts.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH, dtype=torch.bfloat16))
            experts.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12, dtype=torch.bfloat16))
            expert_parallel(experts, self.mesh(f"bytes {name}"), name)
            x = torch.randn(T, WIDTH, dtype=torch.bfloat16, requires_grad=True)
            weights = torch.rand(T, SLOTS, requires_grad=True)
            with counted() as forward:
                y = torch.ops.gatecc.moe_ffn(x, weights, indices, experts.gate_up_proj, experts.down_proj)
            with counted() as backward:
                y.sum().backward()
            self.found[f"{name} bytes"] = [sum(forward.values()) / T, sum(backward.values()) / T]

    def empty(self) -> None:
        """One rank without a token, slots that are empty, results by slot."""
        bank = [torch.randn(EXPERTS, 24, WIDTH), torch.randn(EXPERTS, WIDTH, 12)]
        for t in bank:
            dist.broadcast(t, 0)
        experts = nn.Module()
        experts.gate_up_proj, experts.down_proj = (nn.Parameter(t) for t in bank)
        expert_parallel(experts, self.mesh("empty"))
        T = 5 * self.rank
        x, weights = torch.randn(T, WIDTH, requires_grad=True), torch.rand(T, SLOTS)
        indices = torch.randint(0, EXPERTS + 1, (T, SLOTS))
        for combine in ("sum", "slots"):
            call: Callable[..., Tensor] = torch.ops.gatecc.moe_ffn
            y = call(x, weights, indices, experts.gate_up_proj, experts.down_proj, combine=combine)
            right = call(x, weights, indices, *bank, combine=combine)
            self.found[f"empty {combine}"] = (y - right).abs().sum().item(), tuple(y.shape)
            y.sum().backward()

    def example(self) -> None:
        with counted() as sent:
            found = example.train(6, 4, 2, "all-gather", self.folder / "example", batch=2)
        tokens = 6 * 2 * example.LENGTH
        exchanged = sum(sent.values())
        self.found["example"] = {**vars(found), "counted": exchanged / tokens}

    def empty_model(self) -> None:
        """A model without weights is transformed and sharded; then every rank gets its part of the first one's."""
        torch.manual_seed(0)
        with torch.device("meta"):
            model = nn.Sequential(Block(), Block()).eval()
        recipe = gatecc.recipe("upcycle", experts=EXPERTS, k=SLOTS)
        model = gatecc.transform(model, recipe, (torch.randn(4, 5, WIDTH),), inplace=True, verify=False)
        expert_parallel(model, self.mesh("empty model"))
        fully_shard(model, mesh=self.mesh("empty rest"), ignored_params=set(expert_parameters(model)))
        model.to_empty(device="cpu")
        self.found["taken out"] = {p.device.type for m in modules_of(model) for p in m.parameters() if p.is_meta}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, self.model.state_dict() if self.rank == 0 else {}, options=options)
        self.found["empty model"] = run(model, self.x[self.mine], self.grad[self.mine])

    def healing(self) -> None:
        """Two stages on all ranks, cut off and resumed; and the task with sharded experts."""
        folder = self.folder / "heal"
        self.found["healed whole"] = healed(1)
        with suppress(InterruptedError):
            healed(1, cut_off_after=5, checkpoint=folder)
        self.found["healed gone on"] = healed(1, checkpoint=folder)
        self.found["written"] = sorted(p.name for p in folder.iterdir())
        for name, steps in (("healed experts", 2), ("healed experts again", 3)):
            spread = expert_parallel(copy.deepcopy(self.model), self.mesh("heal"))
            self.found[name] = healed_experts(spread, steps, 1, self.folder / "spread")
            sharded = copy.deepcopy(self.model)
            fully_shard(sharded, mesh=self.mesh("heal fsdp"))
            self.found[f"{name}, fsdp"] = healed_experts(sharded, steps, 1, self.folder / "sharded")

    def stock(self) -> None:
        self.found["stock"] = stock_worker.stock(self.rank, self.ranks)
        stock_worker.saved(self.model, self.mesh("kept"), self.mesh("kept rest"), self.folder / "kept")


def healed(accumulate: int, cut_off_after: int = 99, **options: Any) -> dict[str, Any]:
    """A student healed in two stages on batches in an order that is drawn. Every rank begins with a head of its own,
    and draws numbers of its own: the first one's count."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    student, teacher = pair()
    with torch.no_grad():
        student.head.weight += rank
    torch.manual_seed(5 + rank)
    rows = torch.randint(0, VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(4))
    loader = DataLoader(cast("Any", rows), batch_size=2, shuffle=True)
    seen: list[float] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(float(cast("Any", model).head.weight.sum()))
        if len(seen) > cut_off_after:
            raise InterruptedError
        return seen[-1]

    stages = {
        "transfer": Transfer(steps=3, layers=("layers.*.attn",), accumulate=accumulate),
        "tune": Tune(steps=4, distill=1.0, accumulate=accumulate),
    }
    result = heal(student, teacher, loader, evaluate=evaluate, every=1, save_every=1, **stages, **options)
    found = {n: p.detach() for n, p in student.named_parameters()}
    return {"weights": found, "curve": result.curve, "seen": len(seen), "random": torch.rand(3)}


def healed_experts(model: nn.Module, steps: int, accumulate: int, folder: Path) -> Gradients:
    """An upcycled model trained on a task, its experts on one rank or several."""
    data = [(given(4)[0][4 * i : 4 * i + 4],) for i in range(4)]
    stage = Tune(steps=steps, accumulate=accumulate, task=1.0, loss=lambda y, batch: (y - 1).square().mean(), clip=0.1)
    heal(model, None, data, tune=stage, checkpoint=folder)
    named = {n: p.detach() for n, p in model.named_parameters()}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()}


@contextmanager
def counted() -> Generator[dict[str, int]]:
    """Bytes that this rank sends to others, by collective, seen where the dispatchers call torch."""
    sent: dict[str, int] = {}
    real = dispatch.dist.all_to_all_single
    ops = torch.ops._c10d_functional
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def note(name: str, count: float) -> None:
        sent[name] = sent.get(name, 0) + int(count)

    def all_to_all_single(output: Tensor, given: Tensor, back: Any = None, sizes: Any = None, **options: Any) -> Any:
        if sizes is not None:  # without sizes it is the exchange of the sizes themselves
            row = given[0].numel() if len(given) else 0
            note("all_to_all", sum(n for r, n in enumerate(sizes) if r != rank) * row * given.element_size())
        return real(output, given, back, sizes, **options)

    class Ops:
        def __getattr__(self, name: str) -> Any:
            times = {"all_gather_into_tensor": ranks - 1, "reduce_scatter_tensor": (ranks - 1) / ranks}
            times["all_reduce"] = 2 * (ranks - 1) / ranks

            def call(x: Tensor, *rest: Any) -> Any:
                if name in times:
                    note(name, x.numel() * x.element_size() * times[name])
                return getattr(ops, name)(x, *rest)

            return call

    dispatch.dist.all_to_all_single = all_to_all_single
    dispatch.OPS = cast("Any", Ops())
    try:
        yield sent
    finally:
        dispatch.dist.all_to_all_single = real
        dispatch.OPS = ops


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    one = Rank(rank, ranks, folder)
    one.dispatchers()
    one.wrappers()
    one.new_kinds_of_call()
    one.bytes()
    one.empty()
    one.healing()
    one.example()
    one.empty_model()
    one.stock()
    torch.save(one.found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]))
