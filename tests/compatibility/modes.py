"""The modes of a call. Each runs a module as a user would; ``right`` finds the same numbers in the plainest way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from tests.compatibility.subject import canonical, gradients, inputs, whole

Results = dict[str, Tensor]
FACTOR = 1.125  # what the functional modes multiply every weight by


@dataclass(frozen=True)
class Mode:
    """``run(module)`` gives named tensors; ``right(module)`` the same ones, of a plain module, found another way."""

    run: Callable[[nn.Module], Results]
    right: Callable[[nn.Module], Results]
    tolerance: float = 1e-4  # of the largest value


def _call(module: nn.Module, **changed: Any) -> Any:
    return module(**{**inputs(), **changed})


def _values(module: nn.Module) -> Results:
    out = _call(module)
    return {"logits": whole(out.logits).detach().clone(), "loss": out.loss.detach().clone()}


def _trained(module: nn.Module) -> Results:
    module.zero_grad()
    out = _call(module)
    out.loss.backward()
    return {"logits": whole(out.logits).detach().clone(), **gradients(module)}


def _no_grad(module: nn.Module) -> Results:
    with torch.no_grad():
        return _values(module)


def _inference(module: nn.Module) -> Results:
    with torch.inference_mode():
        found = _values(module)
    return {name: x.clone() for name, x in found.items()}


def _autocast(module: nn.Module) -> Results:
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = _call(module)
    out.loss.backward()
    return {"logits": whole(out.logits).detach().float(), "loss": out.loss.detach().float()}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() * FACTOR for n, p in module.named_parameters()}


def _loss(module: nn.Module, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    return functional_call(module, weights, (), {"input_ids": ids, "labels": ids}).loss


def _func(module: nn.Module) -> Results:
    weights, ids = _weights(module), inputs()["input_ids"]
    loss = _loss(module, weights, ids)
    found = grad(lambda w: _loss(module, w, ids))(weights)
    return {"loss": loss, **{f"grad {canonical(n)}": g for n, g in found.items()}}


def _right_func(module: nn.Module) -> Results:
    return {n: x for n, x in {**_trained(module), **_values(module)}.items() if n != "logits"}


def _vmap(module: nn.Module) -> Results:
    """A loss and a gradient per sample."""
    weights, ids = _weights(module), inputs()["input_ids"]
    per_sample = vmap(grad_and_value(lambda w, i: _loss(module, w, i[None])), in_dims=(None, 0))
    found, loss = per_sample(weights, ids)
    return {"loss": loss, **{f"grad {canonical(n)}": g for n, g in found.items()}}


def _right_vmap(module: nn.Module) -> Results:
    rows: list[Results] = []
    for row in inputs()["input_ids"]:
        module.zero_grad()
        loss = _call(module, input_ids=row[None], labels=row[None]).loss
        loss.backward()
        rows.append({"loss": loss.detach(), **gradients(module)})
    return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}


def _compile(module: nn.Module) -> Results:
    return _trained(torch.compile(module, backend="aot_eager"))  # pyright: ignore[reportArgumentType]


def _export(module: nn.Module) -> Results:
    given = {"input_ids": inputs()["input_ids"]}
    program = torch.export.export(module, (), given, strict=False)
    return {"logits": program.module()(**given).logits.detach()}


def _checkpointing(module: nn.Module) -> Results:
    holder: Any = module if hasattr(module, "gradient_checkpointing_enable") else module.module
    holder.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    found = _trained(module)
    module.eval()
    holder.gradient_checkpointing_disable()
    return found


def scaled(module: nn.Module, called: nn.Module | None = None) -> nn.Module:
    """A copy with every weight multiplied as the functional modes do it: those of the module that is ``called``."""
    other = copy.deepcopy(module)
    names = {n for n, _ in (called or module).named_parameters()}
    with torch.no_grad():
        for n, p in other.named_parameters():
            if n in names:
                p.mul_(FACTOR)
    return other


MODES: dict[str, Mode] = {
    "grad": Mode(_trained, _trained),
    "no_grad": Mode(_no_grad, _values),
    "inference": Mode(_inference, _values),
    "autocast": Mode(_autocast, _values, 0.1),
    "func": Mode(_func, _right_func),
    "vmap": Mode(_vmap, _right_vmap),
    "compile": Mode(_compile, _trained),
    "export": Mode(_export, _values),
    "checkpointing": Mode(_checkpointing, _trained),
}
FUNCTIONAL = ("func", "vmap")
