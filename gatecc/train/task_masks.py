"""Training of one task after another, with masks that keep the channels of earlier tasks as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatecc.errors import ArgumentError
from gatecc.passes.task_mask import FOR_ALL, TaskMasks


class TaskTraining:
    """What a loop tells the masks of a model while one of its tasks is in training. See `task_training`."""

    def __init__(self, modules: Collection[TaskMasks], task: int, steepest: float) -> None:
        self._modules, self._task, self._steepest = modules, task, steepest
        self.anneal(0.0)

    @torch.no_grad()
    def anneal(self, part: float) -> None:
        """Set the slope after this part, 0 to 1, of an epoch: from 1/s_max to s_max in a straight line."""
        low, high = 1 / self._steepest, self._steepest
        for module in self._modules:
            module.slope.fill_(low + (high - low) * min(1.0, max(0.0, part)))

    def loss(self) -> Tensor:
        """Σ m (1 - c) / Σ (1 - c) over all masks, c what earlier tasks have on: the share of the free channels that the
        task takes. (), 0 if no channel is free."""
        taken, free = list[Tensor](), list[Tensor]()
        for module in self._modules:
            for name in module.names:
                e = module.get_parameter(name)[self._task]
                rest = 1 - _earlier(module, name, self._task)
                taken.append((torch.sigmoid(module.slope.to(e.dtype) * e) * rest).sum())
                free.append(rest.sum())
        return torch.stack(taken).sum() / torch.stack(free).sum().clamp_min(1.0)


@contextmanager
def task_training(
    model: nn.Module,
    task: int,
    optimizer: Optimizer,
    *,
    steepest: float = 400.0,
    held: tuple[str, ...] = ("*cls_token*", "*class_token*"),
) -> Generator[TaskTraining]:
    """Train the task with this number, counted from 0, after those before it (recipe "gcab").

    Inside, the masks of the task are σ(s e), and what earlier tasks use of the masked layers does not change: gradients
    of a weight from input j to output i are multiplied by 1 - min(c_i, c_j), c the hard masks of all earlier tasks
    together, and each step of the optimizer leaves guarded weights alone, its momentum and its weight decay included.
    So do, from the second task on, the parameters of the blocks that hold masks which no mask selects (norms, scales),
    and those whose names match ``held``: the class token. Other layers train: `FeatureDrift` bounds what that does.

        with task_training(model, 1, optimizer) as masks:
            for i, (x, y, task) in enumerate(batches):
                masks.anneal(i / (len(batches) - 1))
                (F.cross_entropy(model(x, task), y) + 0.1 * masks.loss()).backward()
                optimizer.step()
                optimizer.zero_grad()

    Afterwards masks are hard. Raises ArgumentError for a model without masks, or a task that they do not have.
    """
    found = [(_root(model, name, m), m) for name, m in model.named_modules() if isinstance(m, TaskMasks)]
    modules = [m for _, m in found]
    tasks = min((m.get_parameter(m.names[0]).size(0) for m in modules), default=0)
    if not 0 <= task < tasks or steepest < 1:
        raise ArgumentError(
            "no such task can be trained",
            found=f"task={task}, {len(modules)} sites with masks of {tasks} tasks, steepest={steepest}",
            expected='a model of the recipe "gcab", a number below its tasks, steepest >= 1',
        )
    free = _factors(model, found, task, held)
    hooks = [p.register_hook(lambda grad, f=f: grad * f.to(grad.dtype)) for p, f in free if p.requires_grad]
    hooks.append(optimizer.register_step_post_hook(_restoring(free)))
    for module in modules:
        module.current.fill_(task)
    try:
        yield TaskTraining(modules, task, steepest)
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            module.current.fill_(FOR_ALL)


class FeatureDrift(nn.Module):
    """Mean ‖P f - f'‖ over samples and tokens: f the features of the backbone now, f' those of it before this task.

    P is a linear projection, the identity at first, which is trained beside the model (GCAB's drift compensation): new
    features may differ from the old ones as long as the old ones can be read from them. f, f': (..., width) -> ().
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, features: Tensor, previous: Tensor) -> Tensor:
        """The features of one batch by both backbones; the gradient is that of the first."""
        return torch.linalg.vector_norm(self.projection(features) - previous.detach(), dim=-1).mean()


def _root(model: nn.Module, path: str, module: TaskMasks) -> nn.Module:
    """The module that the guards' paths begin at: the transformed model, which others may hold."""
    parts = path.split(".")
    for cut in range(len(parts)):
        root = model.get_submodule(".".join(parts[:cut]))
        known = dict(root.named_parameters(remove_duplicate=False))
        if all(guard.weight in known for guard in module.guards):
            return root
    raise ArgumentError("the layers that these masks select are gone", where=path, do="transform the model anew")


def _earlier(module: TaskMasks, name: str, task: int) -> Tensor:
    """What some task before this one has on, (C,) of 0 and 1."""
    e = module.get_parameter(name).detach()[:task]
    return (e > 0).any(0).to(e.dtype)


def _factors(
    model: nn.Module, found: Collection[tuple[nn.Module, TaskMasks]], task: int, held: tuple[str, ...]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters that may not change freely, and 1 where they may."""
    factors: dict[nn.Parameter, Tensor] = {}
    for root, module in found:
        for guard in module.guards:
            weight = root.get_parameter(guard.weight)
            rows = slice(*(guard.rows or (0, weight.size(0))))
            free = factors.setdefault(weight, torch.ones_like(weight))
            every = torch.full_like(weight.detach(), float(task > 0))  # without a mask each task reads all
            used = _earlier(module, guard.outputs, task) if guard.outputs else every[rows, 0]
            inputs = _earlier(module, guard.inputs, task) if guard.inputs else every[0]
            free[rows] = 1 - torch.minimum(used[:, None], inputs)
            if guard.bias:
                bias = root.get_parameter(guard.bias)
                factors.setdefault(bias, torch.ones_like(bias))[rows] = 1 - used
        for name in module.names:
            table = module.get_parameter(name)
            only = torch.zeros_like(table)
            only[task] = 1
            factors[table] = only
    if task:
        for parameter in _unmasked(model, found, held):
            factors.setdefault(parameter, torch.zeros_like(parameter))
    return [(p, f.detach()) for p, f in factors.items()]


def _unmasked(
    model: nn.Module, found: Collection[tuple[nn.Module, TaskMasks]], held: tuple[str, ...]
) -> Iterator[nn.Parameter]:
    """The parameters around the masked layers: of their blocks, and what is held by name."""
    owners = {name.rpartition(".")[0] for _, m in found for name, other in model.named_modules() if other is m}
    blocks = {owner.rpartition(".")[0] or owner for owner in owners} - {""}
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{block}.") for block in blocks) or any(fnmatchcase(name, glob) for glob in held):
            yield parameter


@torch.no_grad()
def _restoring(free: list[tuple[nn.Parameter, Tensor]]) -> Callable[..., None]:
    before = [p.detach().clone() for p, _ in free]

    @torch.no_grad()
    def hook(*_: Any) -> None:
        for (parameter, factor), old in zip(free, before, strict=True):
            parameter.copy_(torch.where(factor == 0, old, parameter))

    return hook
