"""Operators of stochastic gates: a sample whose gradient is REINFORCE's, and a score that learns from labels.

Both exist as operators so that they keep their meaning inside a captured graph. The reward is only known after the
forward pass: ``reinforce_sample`` takes a buffer that is read when the backward pass runs, see ``write_reward``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gatecc.codegen.onnx.lowering import GRADIENT, Lowering
from gatecc.errors import ArgumentError
from gatecc.ops.registry import Operator, register
from gatecc.ops.transforms import derivatives, has_tangents, instead, refuse

BASELINES = ("mean", "none", "leave_one_out", "min_variance")
BASELINE, RUNNING, SCALE = range(
    3
)  # of the state: the baseline in use, the running mean of the loss, a sample's weight
MOMENTUM = 0.9


# -- reinforce_sample --------------------------------------------------------------------------------------------------


@torch.library.custom_op("gatecc::reinforce_sample", mutates_args=())
def reinforce_sample(
    logit: Tensor, noise: Tensor, reward: Tensor, count: Tensor, state: Tensor, baseline: str
) -> Tensor:
    """b = 1[noise < σ(logit)], with gradient (b - σ(logit)) · (L - baseline) for the logit.

    logit, noise: (B, ...); noise uniform in [0, 1). reward: (capacity,), count: () and state: (3,), see
    ``write_reward``. The gradient that arrives at b is not used: the sample cannot be differentiated, and the loss L
    says all that there is to know.
    """
    return (noise < torch.sigmoid(logit)).to(logit.dtype)


@reinforce_sample.register_fake
def _(logit: Tensor, noise: Tensor, reward: Tensor, count: Tensor, state: Tensor, baseline: str) -> Tensor:
    return torch.empty_like(logit)


@torch.library.custom_op("gatecc::reinforce_backward", mutates_args=())
def reinforce_backward(
    gradient: Tensor, logit: Tensor, sample: Tensor, reward: Tensor, count: Tensor, state: Tensor, baseline: str
) -> Tensor:
    """(b - p) · (L - baseline) · weight of a sample, of the shape of logit.

    ``gradient`` is an argument so that compilers cannot move this operator into the forward pass, where no loss is
    known.
    """
    loss = _losses(logit, reward, count)
    score = sample.float() - torch.sigmoid(logit.float())
    advantage = loss - _baseline(baseline, score, loss, state)
    return (score * advantage * state[SCALE]).to(logit.dtype)


@reinforce_backward.register_fake
def _(
    gradient: Tensor, logit: Tensor, sample: Tensor, reward: Tensor, count: Tensor, state: Tensor, baseline: str
) -> Tensor:
    return torch.empty_like(logit)


def _losses(logit: Tensor, reward: Tensor, count: Tensor) -> Tensor:
    """The losses of the batch, (B, 1, ...)."""
    known = int(count)
    if known == logit.size(0):
        return reward[:known].float().reshape(-1, *[1] * (logit.dim() - 1))
    raise ArgumentError(
        "a REINFORCE gate has no loss for its samples",
        found=f"{known} losses for {logit.size(0)} samples",
        expected="one loss for each sample of the batch",
        do="call gatecc.train.set_reward(model, loss) with loss of shape (B,), between forward and backward",
    )


def _baseline(kind: str, score: Tensor, loss: Tensor, state: Tensor) -> Tensor:
    """What to subtract from the loss of a sample; never computed from that sample, so that nothing is biased."""
    if kind == "none":
        return torch.zeros_like(loss)
    if kind == "mean" or loss.size(0) == 1:
        return state[BASELINE]
    weight = torch.ones_like(loss) if kind == "leave_one_out" else score.square()
    others = weight.sum(0, keepdim=True) - weight
    return ((weight * loss).sum(0, keepdim=True) - weight * loss) / others.clamp_min(torch.finfo(others.dtype).tiny)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logit, _, reward, count, state, baseline = inputs
    ctx.save_for_backward(logit, output, reward, count, state)
    ctx.baseline = baseline


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    logit, sample, reward, count, state = ctx.saved_tensors
    return reinforce_backward(gradient, logit, sample, reward, count, state, ctx.baseline), None, None, None, None, None


def _no_derivative(*_: Any) -> NoReturn:
    refuse(
        "a sample of REINFORCE has one derivative, an estimate that reads the losses of the batch",
        found="a second derivative, forward mode, or torch.func",
        do='another estimator ("straight_through", "concrete"), or model.eval()',
    )


def _sample_under_func(
    logit: Tensor, noise: Tensor, reward: Tensor, count: Tensor, state: Tensor, baseline: str
) -> Tensor:
    """Samples alone can be drawn under vmap."""
    if has_tangents((logit,)) or derivatives(logit):
        _no_derivative()
    return (noise < torch.sigmoid(logit)).to(logit.dtype)


reinforce_sample.register_autograd(_backward, setup_context=_setup)
reinforce_backward.register_autograd(_no_derivative)
instead(reinforce_sample, _sample_under_func)
instead(reinforce_backward, _no_derivative)
register(
    Operator(
        overload=torch.ops.gatecc.reinforce_sample.default,
        onnx={"portable": Lowering(lambda logit, noise, *_: (noise < torch.sigmoid(logit)).to(logit.dtype))},
    )
)
register(Operator(overload=torch.ops.gatecc.reinforce_backward.default, onnx={"portable": GRADIENT}))


def write_reward(reward: Tensor, count: Tensor, state: Tensor, loss: Tensor, *, scale: float) -> None:
    """Put the losses of a batch, (B,), where the backward pass of ``reinforce_sample`` finds them.

    The baseline in use is the running mean of earlier batches (of this one at the first call: a start is needed, and
    one step's bias of 1/B vanishes). Raises ArgumentError for another shape, or for more samples than the buffer holds.
    """
    if loss.dim() != 1 or loss.numel() > reward.numel() or loss.numel() == 0:
        raise ArgumentError(
            "these are not the losses of a batch",
            found=f"shape {tuple(loss.shape)}",
            expected=f"(B,) with 1 <= B <= {reward.numel()}",
            do='reduction="none" in the loss; reinforce(capacity=...) for larger batches',
        )
    # The buffers were saved for the backward pass that is to come. Written through .data they keep their version, so
    # that autograd, which saved them for the very purpose of reading what is written now, does not object.
    mean = loss.float().mean()
    baseline = torch.where(count > 0, state[RUNNING], mean)
    reward.data[: loss.numel()].copy_(loss)
    running = MOMENTUM * baseline + (1 - MOMENTUM) * mean
    state.data.copy_(torch.stack([baseline, running, torch.full_like(mean, scale)]))
    count.data.fill_(loss.numel())


# -- inject_bce --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gatecc::inject_bce", mutates_args=())
def inject_bce(logit: Tensor, label: Tensor, weight: float) -> Tensor:
    """logit itself; its gradient gains that of weight · mean BCE(σ(logit), label), as if this loss had been added."""
    return logit.clone()


@inject_bce.register_fake
def _(logit: Tensor, label: Tensor, weight: float) -> Tensor:
    return torch.empty_like(logit)


def _setup_bce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logit, label, weight = inputs
    ctx.save_for_backward(logit, label)
    ctx.weight = weight


def _backward_bce(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        _injected_once()
    return _with_bce(ctx, gradient)


def _with_bce(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    logit, label = ctx.saved_tensors
    return gradient + (torch.sigmoid(logit) - label) * (ctx.weight / logit.numel()), None, None


class _Inject(torch.autograd.Function):
    """``inject_bce`` for torch.func: under vmap each sample has a mean of its own, as in a loop over the samples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logit: Tensor, label: Tensor, weight: float) -> Tensor:
        return logit.clone()

    setup_context = staticmethod(_setup_bce)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _with_bce(ctx, *grad_outputs)


def _inject_under_func(logit: Tensor, label: Tensor, weight: float) -> Tensor:
    if has_tangents((logit,)) or derivatives(logit) > 1:
        _injected_once()
    return _Inject.apply(logit, label, weight)


def _injected_once() -> NoReturn:
    # The backward pass adds the same gradient whatever arrives: it is no linear map, and a second pass would add again.
    refuse(
        "a loss that is injected into a gradient has one derivative, in reverse mode",
        found="a second derivative (create_graph=True), or forward mode",
        do="one derivative; give torch.func tensors that need no gradient (p.detach()); or train without labels",
    )


inject_bce.register_autograd(_backward_bce, setup_context=_setup_bce)
instead(inject_bce, _inject_under_func)
register(
    Operator(
        overload=torch.ops.gatecc.inject_bce.default,
        onnx={"portable": Lowering(lambda logit, label, weight: logit.clone())},
    )
)
