"""Conditional computation: units of a classifier that are computed only where they are needed.

    python examples/conditional_computation.py

Each hidden unit has a gate that reads the image and is 0 or not: a unit whose gate is 0 need not be computed for that
image. Such gates are not differentiable. The program trains them with the four estimators of "Estimating or Propagating
Gradients Through Stochastic Neurons" (Bengio, Léonard, Courville, 2013) and prints the accuracy on held-out digits, the
fraction of units that are on, and the difference between masking the other units and not computing them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gatecc
from gatecc.ir.gate import GateModule
from gatecc.train import set_reward

# Gates start open for most images, at random so that units differ. Noise goes with rectified gates: a sigmoid has no 0.
START = "init=random(std=0.1, bias=1.0)"
GATES = {
    "reinforce": f"in, linear, channel, sigmoid, estimator=reinforce(baseline=min_variance), {START}",
    "times_smooth": f"in, linear, channel, sigmoid, estimator=times_smooth, {START}",
    "noise": f"in, linear, channel, relu, estimator=noise(std=0.5), {START}",
    "st": f"in, linear, channel, sigmoid, estimator=st, {START}",
}


class Classifier(nn.Module):
    """x: (B, 64) -> logits (B, 10)."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.up = nn.Linear(64, units)
        self.down = nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


@dataclass(frozen=True)
class Outcome:
    """What one estimator achieved: ``skip_error`` is the largest difference between masked and skipped units."""

    accuracy: float
    active: float
    skip_error: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 64) in [0, 1] and labels, three quarters of them to train on."""
    data, target = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(x) * 3 // 4], order[len(x) * 3 // 4 :]
    return x[train], y[train], x[test], y[test]


def gated(name: str, units: int, example: Tensor) -> tuple[nn.Module, GateModule]:
    """A classifier whose hidden units are gated, and the gate."""
    rewrite = gatecc.Gate(gatecc.Linear["up"].out, gatecc.GateSpec.parse(GATES[name]))
    model = gatecc.transform(Classifier(units), [rewrite], (example,))
    (gate,) = (m for m in model.modules() if isinstance(m, GateModule))
    return model, gate


def train(model: nn.Module, gate: GateModule, x: Tensor, y: Tensor, *, epochs: int, price: float) -> None:
    """Cross entropy plus ``price`` for the mean openness of the gates, which pushes units to stay off."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    reinforce = gate.spec.estimator.tag == "reinforce"
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(model(x[batch]), y[batch], reduction="none")
            if reinforce:
                set_reward(model, loss.detach())
            openness = gate.activation(gate.score(x[batch], x[batch]).x).mean()
            optimizer.zero_grad()
            (loss.mean() + price * openness).backward()
            optimizer.step()


@torch.no_grad()
def measure(model: nn.Module, gate: GateModule, x: Tensor, y: Tensor) -> Outcome:
    """Accuracy with deterministic gates, the units that are on, and masked against skipped execution."""
    model.eval()
    logits = model(x)
    gates = gate(gate.score(x, x).x, x)
    skipped = torch.stack([skip(model, image, g) for image, g in zip(x, gates, strict=True)])
    return Outcome(
        accuracy=float((logits.argmax(-1) == y).float().mean()),
        active=float((gates != 0).float().mean()),
        skip_error=float((skipped - logits).abs().max()),
    )


def skip(model: nn.Module, image: Tensor, gate: Tensor) -> Tensor:
    """The logits of one image, (64,), from the units that are on and no others."""
    on = gate.nonzero().squeeze(-1)
    up, down = model.get_submodule("up"), model.get_submodule("down")
    hidden = F.linear(image, up.get_parameter("weight")[on], up.get_parameter("bias")[on])
    return F.linear(F.relu(gate[on] * hidden), down.get_parameter("weight")[:, on], down.get_parameter("bias"))


def run(name: str, *, epochs: int = 30, units: int = 96, price: float = 0.3) -> Outcome:
    """Train with one estimator and measure."""
    torch.manual_seed(0)
    x, y, held_x, held_y = digits()
    model, gate = gated(name, units, x[:4])
    train(model, gate, x, y, epochs=epochs, price=price)
    return measure(model, gate, held_x, held_y)


def main() -> None:
    """Print one line an estimator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--units", type=int, default=96)
    parser.add_argument("--price", type=float, default=0.3, help="of keeping all units on, in nats")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower with more
    print(f"{'estimator':<14}{'accuracy':>9}{'active':>9}{'mask-skip':>11}{'seconds':>9}")
    for name in GATES:
        began = time.perf_counter()
        out = run(name, epochs=options.epochs, units=options.units, price=options.price)
        seconds = time.perf_counter() - began
        print(f"{name:<14}{out.accuracy:>9.3f}{out.active:>9.3f}{out.skip_error:>11.1e}{seconds:>9.1f}")


if __name__ == "__main__":
    main()
