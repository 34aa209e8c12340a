"""Effect: what a rewrite does to the modules and parameters of a layer, as an object that can be done and undone.

An edit asks for effects (`Editor.module`, `scale_weight`, `widen`, `drop`, `split`); the engine does them on every
layer that shares the edit's graph, records them with the model, and takes them back. It knows no kind of effect: a new
kind is a new class in this package and nothing elsewhere. Paths are relative to the layer until `placed` puts its name
before them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gatecc.errors import UnsupportedModelError

Tensors = dict[str, torch.Tensor]  # a state dict

EFFECTS: dict[str, type[Effect]] = {}
SPREAD = 1 << 18  # elements of a parameter that get noise, at least; a copy of all of them may not fit into memory


@dataclass(frozen=True, eq=False)
class Held:
    """What a parameter shall hold for a while: other data, or other values of a ``part``, which is a view of it."""

    value: torch.Tensor
    part: torch.Tensor | None = None


Values = dict[nn.Parameter, Held]


class Ledger(Protocol):
    """What a scope remembers of its effects: paths of new modules, and what must be taken back for a while before the
    layer's own forward can run."""

    own: set[str]
    changes: list[Effect]


@dataclass(frozen=True, eq=False)
class Effect(ABC):
    """One change at ``path``: a module or a parameter.

    ``edits_model``: it changes a weight that the model had. ``keeps_forward``: the layer's own forward still runs when
    it is done, so that edits can be said on a running call.
    """

    path: str
    edits_model: ClassVar[bool] = True
    keeps_forward: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        EFFECTS[cls.__name__] = cls

    @abstractmethod
    def apply(self, layer: nn.Module) -> dict[str, int]:
        """Do it on a layer, from that layer's own weights; returns the number of new elements by parameter path."""

    @abstractmethod
    def undo(self, layer: nn.Module) -> None:
        """Take it back, bitwise; also where it was only prepared, or is undone already."""

    def prepare(self, layer: nn.Module) -> None:
        """Make what the edited graph reads, before the effect is done: new modules."""
        return

    @property
    def gone(self) -> tuple[str, ...]:
        """The modules and tensors that the layer no longer has: no graph may read them."""
        return ()

    def changed(self, model: nn.Module) -> list[str]:
        """The parameters of the model that it changes, which nobody else may read."""
        return [self.path] if self.edits_model else []

    def check(self, layer: nn.Module) -> None:
        """Raise UnsupportedModelError if `undo` could not be done."""
        for path in self.changed(layer):
            editable(layer, path)

    @contextmanager
    def suspended(self, layer: nn.Module) -> Generator[None]:
        """The layer as its own forward was written for, for a while."""
        yield

    @abstractmethod
    def describe(self, layer: nn.Module | None = None) -> str:
        """One line for a report; given the layer on which it was done, with the shapes of what is new."""

    def note(self, ledger: Ledger) -> None:
        """Enter it in what a scope remembers."""
        return

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        """What the parameters that it brought would hold with noise: a gate that starts at 1 then shows its effect."""
        return {}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        """A state dict as it was without it, bitwise. ``same``: the first name of each tied parameter."""
        return state

    def to_json(self) -> list[Any]:
        """Plain data: the kind, the path and the numbers. Two effects are the same if this is."""
        return [type(self).__name__, self.path]

    @classmethod
    def of(cls, path: str, *numbers: Any) -> Effect:
        """The inverse of `to_json`, to undo and not to do."""
        return cls(path, *numbers)

    def placed(self, fqn: str) -> Effect:
        """The same as plain data, from the root of a model whose layer ``fqn`` it belongs to: to undo, not to do."""
        return replace(self, path=joined(fqn, self.path))


def effect_from_json(data: list[Any]) -> Effect:
    """What `Effect.to_json` gave. Raises ValueError for an unknown kind, TypeError for other numbers than it has."""
    kind, path, *numbers = data
    if kind not in EFFECTS:
        raise ValueError(f"unknown effect {kind!r}")
    return EFFECTS[kind].of(path, *numbers)


@contextmanager
def suspended(layer: nn.Module, effects: Iterable[Effect]) -> Generator[None]:
    """A layer as its own forward was written for: what was done to its weights is taken back, and done again
    afterwards. Raises UnsupportedModelError for weights that were quantised since."""
    with ExitStack() as stack:
        for effect in reversed(list(effects)):
            stack.enter_context(effect.suspended(layer))
        yield


def joined(fqn: str, path: str) -> str:
    """The name of something at ``path`` in the module ``fqn``."""
    return ".".join(part for part in (fqn, path) if part)


def holder_of(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what is at a path, and its name there."""
    holder, _, name = path.rpartition(".")
    return layer.get_submodule(holder), name


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that wraps others, so that its elements cannot be edited."""
    with unset_fake_temporarily():  # an edit that is traced looks at the live weight
        return is_traceable_wrapper_subclass(tensor.data)


def editable(layer: nn.Module, path: str) -> nn.Parameter:
    """A parameter whose elements can be edited. Raises UnsupportedModelError if it was quantised since."""
    module, name = holder_of(layer, path)
    parameter = module._parameters.get(name)
    if parameter is None or is_wrapped(parameter):
        raise UnsupportedModelError(
            "a weight that the rewrite changed holds no elements that can be edited any more",
            where=path,
            found=f"{type(module).__name__} without this parameter" if parameter is None else type(parameter).__name__,
            expected="an ordinary parameter",
            do="quantise last: revert, or call the model once in each kind of call, and then quantise it; or transform "
            "without fuse_into and folding, which change weights of the model",
        )
    return parameter


def noise(parameter: nn.Parameter, generator: torch.Generator) -> Held:
    """A parameter with noise: a matrix of it keeps the scale of what it multiplies, a vector of it is half a unit.

    Of a large parameter, elements spread over all of it get it, and so much more.
    """
    x = parameter.detach()
    step = x.numel() // SPREAD | 1 if x.is_contiguous() else 1  # odd: it falls on other columns in each row
    if step == 1:
        return Held(_noisy(x, generator, x.shape, 1.0))
    return noisy_part(x.view(-1)[::step], generator, x.shape, step**0.5)


def noisy_part(part: torch.Tensor, generator: torch.Generator, shape: torch.Size, more: float = 1.0) -> Held:
    """Noise on a view of a parameter, of the scale for a tensor of a shape, times ``more``."""
    return Held(_noisy(part, generator, shape, more), part)


def _noisy(x: torch.Tensor, generator: torch.Generator, shape: torch.Size, more: float) -> torch.Tensor:
    scale = more * (0.5 if len(shape) < 2 else (shape[0] / max(shape.numel(), 1)) ** 0.5)
    kind = x.dtype if x.is_floating_point() or x.is_complex() else torch.float32
    return x + (torch.randn(x.shape, generator=generator) * scale).to(device=x.device, dtype=kind)


def changed_in(
    path: str, state: Tensors, same: Mapping[str, str], change: Callable[[torch.Tensor], torch.Tensor]
) -> Tensors:
    """A state dict with one parameter changed, under all of its names."""
    first = same.get(path, path)
    return {name: change(t.detach()) if same.get(name, name) == first else t for name, t in state.items()}
