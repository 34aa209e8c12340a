"""Arguments: which inputs of an ensemble each of its models is given, by name, found once from the example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gatecc.errors import ArgumentError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Names:
    """The inputs of an ensemble in order, the first ``positional`` of which the example gave without their names."""

    all: tuple[str, ...]
    positional: int

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call by name. Raises ArgumentError for one that the example did not have."""
        if len(args) > len(self.all):
            raise self._unknown(f"{len(args)} positional inputs")
        bound = dict(zip(self.all, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.all:
                raise self._unknown(name)
            if name in bound:
                raise ArgumentError("the ensemble is given an input twice", found=name)
            bound[name] = value
        return bound

    def _unknown(self, found: str) -> ArgumentError:
        return ArgumentError(
            "the ensemble does not know this input",
            found=found,
            expected=", ".join(self.all),
            do="name every input in the example inputs of gatecc.ensemble: they decide which member is given what",
        )


@dataclass(frozen=True)
class Call:
    """How one model of an ensemble is called: its parameters, and the input, feature or member that each is given."""

    arguments: tuple[tuple[str, str], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of what it is given."""
        return tuple(name for _, name in self.arguments)

    def __call__(self, module: nn.Module, values: Mapping[str, Any]) -> Any:
        """The model's own output. An input that this call does not have is left to the model's default."""
        return module(**{parameter: values[name] for parameter, name in self.arguments if name in values})


def names_of(
    members: Mapping[str, nn.Module],
    mappings: Mapping[str, Mapping[str, str | None]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Names:
    """Inputs given by position are called as the first member calls them that is not told otherwise."""
    places = {name: _by_place(module) for name, module in members.items()}
    free = [own for name, own in places.items() if not set(own[: len(args)]) & set(mappings.get(name, ()))]
    own = (free or list(places.values()))[0]
    at = [own[i] if i < len(own) else f"input{i}" for i in range(len(args))]
    if twice := sorted(set(at) & set(kwargs)):
        raise ArgumentError("an input has the name of a positional one", found=", ".join(twice))
    return Names((*at, *kwargs), len(args))


def call_of(
    name: str, module: nn.Module, mapping: Mapping[str, str | None], names: Names, others: Sequence[str]
) -> Call:
    """The call of a model: what ``mapping`` says (parameter to name, None: nothing), else the input of that name or
    place.

    ``others``: the features and members that it may read. Raises ArgumentError for a name that nothing has, or a
    parameter without a default that nobody gives.
    """
    parameters = _parameters(module)
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in _NAMED]
    _check(name, mapping, {p.name for p in named}, any_name, {*names.all, *others})
    found: dict[str, str] = {}
    for place, parameter in enumerate(named):
        wanted = mapping.get(parameter.name, _default(parameter, place, names))
        if wanted is not None:
            found[parameter.name] = wanted
        elif parameter.default is inspect.Parameter.empty:
            raise ArgumentError(
                "a model needs an argument that nobody gives",
                where=name,
                found=f"{type(module).__name__}.forward needs {parameter.name}",
                expected=f"one of the inputs {', '.join(names.all)}",
                do=f'name the input that it is: inputs={{"{name}": {{"{parameter.name}": "..."}}}}',
            )
    found |= {p: n for p, n in mapping.items() if n is not None}
    if not found:
        raise ArgumentError(
            "a model would be called without arguments",
            where=name,
            found=f"{type(module).__name__}.forward({', '.join(map(str, parameters))})",
            expected=f"parameters with names of inputs: {', '.join(names.all)}",
            do=f'say what it is given: inputs={{"{name}": {{"its parameter": "the input"}}}}',
        )
    return Call(tuple(found.items()))


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(module.forward).parameters.values())


def _by_place(module: nn.Module) -> list[str]:
    return [p.name for p in _parameters(module) if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _default(parameter: inspect.Parameter, place: int, names: Names) -> str | None:
    if parameter.name in names.all:
        return parameter.name
    by_place = place < names.positional and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return names.all[place] if by_place else None


def _check(name: str, mapping: Mapping[str, str | None], own: set[str], any_name: bool, known: set[str]) -> None:
    for parameter, value in mapping.items():
        if parameter not in own and not any_name:
            raise ArgumentError(
                "a model has no such parameter", where=name, found=parameter, expected=", ".join(sorted(own))
            )
        if value is not None and value not in known:
            raise ArgumentError(
                "nothing in the ensemble has this name", where=name, found=value, expected=", ".join(sorted(known))
            )
