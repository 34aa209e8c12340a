"""Experts on two ranks against one process that holds them all; what ran is in worker.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import gatecc
from gatecc.errors import ArgumentError, EmptySelectionError, UnsupportedModelError
from gatecc.parallel import AllToAll, expert_parallel
from tests.parallel.worker import DISPATCHERS, upcycled

Ranks = list[dict[str, Any]]


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest number of the right one, if that is more than 1."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def worst(found: dict[str, Tensor], right: dict[str, Tensor], times: float = 1.0) -> float:
    assert found.keys() == right.keys()
    return max(difference(found[name] * times, right[name]) for name in right)


def of_experts(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in grads.items() if ".experts." in name}


def of_others(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in grads.items() if ".experts." not in name}


@pytest.mark.parametrize("name", DISPATCHERS)
def test_the_same_as_one_process(name: str, ranks: Ranks) -> None:
    """Outputs, gradients of inputs, and of experts as sums over all tokens."""
    for rank, found in enumerate(ranks):
        one, got = found["one"], found[name]
        mine = slice(None) if name == "all-reduce" else slice(4 * rank, 4 * rank + 4)
        assert difference(got["y"], one["y"][mine]) <= 1e-6
        assert difference(got["dx"], one["dx"][mine]) <= 1e-6
        assert len(of_experts(one["grads"])) == 8
        assert worst(of_experts(got["grads"]), of_experts(one["grads"])) <= 1e-6
        if name == "all-reduce":  # the same tokens everywhere: so are the gradients of the routers
            assert worst(got["grads"], one["grads"]) <= 1e-6
    if name != "all-reduce":  # each rank has those of its own tokens
        both = {n: ranks[0][name]["grads"][n] + g for n, g in of_others(ranks[1][name]["grads"]).items()}
        assert worst(both, of_others(ranks[0]["one"]["grads"])) <= 1e-6


@pytest.mark.broad(3)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_the_full_state_dict_is_bitwise_that_of_one_process(name: str, ranks: Ranks) -> None:
    right = upcycled().state_dict()
    found = ranks[0][f"{name} state"]
    assert found.keys() == right.keys()
    assert all(torch.equal(found[n], t) for n, t in right.items())


@pytest.mark.parametrize("name", DISPATCHERS)
def test_the_same_bits_again(name: str, ranks: Ranks) -> None:
    for found in ranks:
        first, second = found[name], found[f"{name} twice"]
        assert torch.equal(first["y"], second["y"])
        assert torch.equal(first["dx"], second["dx"])
        assert all(torch.equal(g, second["grads"][n]) for n, g in first["grads"].items())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "copies", "halves", "experts in fsdp", "fsdp alone"])
def test_any_mix_with_data_parallelism_averages_all_gradients(name: str, ranks: Ranks) -> None:
    """Each rank's loss is its own: what it gets is the mean over ranks, of experts and of everything else."""
    for rank, found in enumerate(ranks):
        one, got = found["one"], found[name]
        assert difference(got["y"], one["y"][4 * rank : 4 * rank + 4]) <= 1e-6
        assert worst(got["grads"], one["grads"], times=len(ranks)) <= 1e-6


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(ranks: Ranks) -> None:
    for found in ranks:
        grads = found["fsdp"]["grads"]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
        assert abs(float(found["clipped"]["norm"] / norm) - 1) < 1e-5
        assert worst(found["clipped"]["grads"], {n: g * (0.5 / norm) for n, g in grads.items()}) < 1e-6


def test_a_rank_learns_a_kind_of_call_alone(ranks: Ranks) -> None:
    for found in ranks:
        assert found["kinds"] <= 0.01  # in bfloat16, relative to the largest output


def test_no_tokens_empty_slots_and_results_by_slot(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks):
        for combine, shape in (("sum", (5 * rank, 16)), ("slots", (5 * rank, 2, 16))):
            error, got = found[f"empty {combine}"]
            assert got == shape
            assert error <= 1e-4  # a sum over elements


def test_a_model_without_weights_is_sharded_and_then_loaded(ranks: Ranks) -> None:
    """What the rewrite took out of it stays on the meta device: it costs no rank any memory."""
    for rank, found in enumerate(ranks):
        one, got = found["one"], found["empty model"]
        assert found["taken out"] == {"meta"}
        assert difference(got["y"], one["y"][4 * rank : 4 * rank + 4]) <= 1e-6
        assert worst(got["grads"], one["grads"], times=len(ranks)) <= 1e-6


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("alone",))
    dist.destroy_process_group()


class Ranks3:
    """What a mesh of three ranks says of itself, as far as it is asked before anything is sharded."""

    ndim = 1
    mesh_dim_names = ("three",)

    def size(self, axis: int = 0) -> int:
        return 3


def test_a_mesh_that_does_not_divide_the_experts() -> None:
    three: Any = Ranks3()
    with pytest.raises(
        ArgumentError, match=r"(?s)0\.experts\.gate_up_proj: the mesh does not divide.*4 experts over 3"
    ):
        expert_parallel(upcycled(), three)


def test_what_is_no_model_with_experts(mesh: DeviceMesh) -> None:
    with pytest.raises(EmptySelectionError, match="upcycle"):
        expert_parallel(nn.Linear(2, 2), mesh)
    with pytest.raises(EmptySelectionError, match=r"(?s)0\.experts, 1\.experts.*9\.\*"):
        expert_parallel(upcycled(), mesh, experts=("9.*",))
    with pytest.raises(ArgumentError, match=r"(?s)no such axis.*alone"):
        expert_parallel(upcycled(), mesh, axis="ep")


def test_sharded_twice_and_other_settings(mesh: DeviceMesh) -> None:
    model = expert_parallel(upcycled(), mesh)
    with pytest.raises(ArgumentError, match="sharded already"):
        expert_parallel(model, mesh)
    with pytest.raises(ArgumentError, match=r"(?s)other settings.*all-to-all.*all-gather"):
        expert_parallel(upcycled(), mesh, "all-gather")
    with pytest.raises(UnsupportedModelError, match="distributed already"):
        gatecc.transform(model, "upcycle", (torch.randn(4, 5, 16),))


def test_a_dispatcher_of_ones_own(mesh: DeviceMesh) -> None:
    seen: list[tuple[int, ...]] = []

    class Mine(AllToAll):
        name = "mine"

        def route(self, owners: Tensor, group: Any) -> Any:
            seen.append(tuple(owners.shape))
            return super().route(owners, group)

    own = init_device_mesh("cpu", (1,), mesh_dim_names=("own",))
    model = upcycled()
    x = torch.randn(4, 5, 16)
    right = model(x)
    assert torch.allclose(expert_parallel(model, own, Mine())(x), right, atol=1e-6)
    assert seen == [(20, 2), (20, 2)]

    class Other(AllToAll):
        name = "mine"

    with pytest.raises(ArgumentError, match="registered twice"):
        expert_parallel(model, own, Other())
    assert mesh.size() == 1


def test_compiled_without_a_break(mesh: DeviceMesh) -> None:
    """The exchange is one operator; sizes that a router decides need no graph of their own."""
    for name in DISPATCHERS:
        model = expert_parallel(upcycled(), init_device_mesh("cpu", (1,), mesh_dim_names=(f"compiled {name}",)), name)
        x = torch.randn(4, 5, 16)
        y = model(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert torch.allclose(compiled, y, atol=1e-6)
        compiled.square().sum().backward()
        for n, p in model.named_parameters():
            assert torch.allclose(whole(p.grad), whole(grads[n])), n
    assert mesh.size() == 1
