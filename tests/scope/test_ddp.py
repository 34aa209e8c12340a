"""A transformed model inside DistributedDataParallel: every gate gets the gradient that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import gatecc
from gatecc import MLP, Gate, GateSpec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Net()
        self.second = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, in memory."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_gradients_under_ddp() -> None:
    x = torch.randn(4, 3, 8)
    gated = gatecc.transform(Model(), [Gate(MLP[...].out, GateSpec("self", granularity="token"))], (x,))
    gated.train()
    alone = torch.autograd.grad(gated(x).square().sum(), list(gated.parameters()))
    parallel = DistributedDataParallel(gated)
    parallel(x).square().sum().backward()
    for (name, p), expected in zip(gated.named_parameters(), alone, strict=True):
        assert p.grad is not None, name
        assert torch.allclose(p.grad, expected, atol=1e-6), name
    assert sum(".gate." in name for name, _ in parallel.named_parameters()) == 4
