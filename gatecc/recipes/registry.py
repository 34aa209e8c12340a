"""The registry of recipes: a recipe is a function from options to rewrites, with a name, a summary and a citation."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from torch import nn

from gatecc.errors import ArgumentError, UnknownRecipeError
from gatecc.ir.contract import Contract
from gatecc.ir.rewrite import Recipe, Rewrite

Builder = Callable[..., tuple[Rewrite, ...]]


Check = Literal["identity", "causality", "cost", "gradient", "export", "state", "reversible"]


@dataclass(frozen=True)
class Case:
    """A model that a recipe is for, and what holds of the recipe there; `gatecc.checks` tries it.

    ``sample`` makes the model and its example inputs, ``options`` are those of the recipe. docs/checks.md says what
    each check means.
    """

    sample: Callable[[], tuple[nn.Module, Any]]
    checks: tuple[Check, ...] = ("identity", "gradient", "reversible")
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class RecipeInfo:
    """What is known of a recipe before it is built."""

    name: str
    cases: tuple[Case, ...]
    citation: str
    summary: str
    doc: str
    builder: Builder

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.builder).parameters.values()}


_KNOWN: dict[str, RecipeInfo] = {}


def recipe(name: str, *, citation: str, cases: Sequence[Case]) -> Callable[[Builder], Builder]:
    """Register a builder under a name, with the cases that it is checked on.

    Its parameters are the recipe's options, its docstring the recipe's page. Raises ArgumentError without a case.
    """
    if not cases:
        raise ArgumentError(
            f"the recipe {name} has no case", expected="cases=[Case(sample, checks)]: a model that it is for"
        )

    def register(builder: Builder) -> Builder:
        doc = inspect.getdoc(builder) or ""
        _KNOWN[name] = RecipeInfo(name, tuple(cases), citation, doc.split("\n\n")[0].replace("\n", " "), doc, builder)
        return builder

    return register


def recipes() -> list[RecipeInfo]:
    """Every recipe, by name."""
    return [_KNOWN[name] for name in sorted(_KNOWN)]


def build(name: str, **options: Any) -> Recipe:
    """A recipe with options. Raises UnknownRecipeError, or ArgumentError for an option that it does not have."""
    info = _KNOWN.get(name)
    if info is None:
        near = difflib.get_close_matches(name, _KNOWN, n=3, cutoff=0.5)
        raise UnknownRecipeError(
            f"no recipe is called {name!r}",
            expected="one of " + ", ".join(sorted(_KNOWN)),
            do=f"did you mean {' or '.join(near)}?" if near else "gatecc.recipes() lists them",
        )
    if unknown := sorted(set(options) - set(info.options)):
        raise ArgumentError(
            f"the recipe {name} has no option {', '.join(unknown)}", expected=", ".join(info.options) or "no options"
        )
    required = [key for key, default in info.options.items() if default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in options]:
        raise ArgumentError(f"the recipe {name} needs the option {', '.join(missing)}", do=info.summary)
    _check_choices(info, options)
    rewrites = info.builder(**options)
    return Recipe(name, info.citation, rewrites, info.summary, tuple(sorted(options.items())))


def _check_choices(info: RecipeInfo, options: dict[str, Any]) -> None:
    """An option of few values is told from those that the recipe takes, not from all that a gate could have."""
    hints = get_type_hints(info.builder)
    for key, value in options.items():
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise ArgumentError(
                f"the recipe {info.name} takes no {key}={value!r}", expected=" or ".join(repr(c) for c in choices)
            )


def resolve(value: str | Recipe | Rewrite | Sequence[Rewrite]) -> Recipe:
    """A recipe from what `transform` accepts."""
    if isinstance(value, Recipe):
        for rewrite in value.rewrites:
            _check_rewrite(rewrite)
        return value
    if isinstance(value, str):
        return build(value)
    rewrites: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,)
    if not rewrites or not all(isinstance(r, Rewrite) for r in rewrites):
        raise ArgumentError(
            "not a recipe",
            found=repr(value)[:80],
            expected="a recipe's name, a Recipe, a rewrite or a list of rewrites",
        )
    for rewrite in rewrites:
        _check_rewrite(rewrite)
    return Recipe("custom", "", rewrites, "; ".join(str(r) for r in rewrites))


def _check_rewrite(rewrite: Rewrite) -> None:
    """What a class of one's own forgets most often."""
    cls = type(rewrite)
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise ArgumentError(
            f"the rewrite {cls.__qualname__} has no name",
            expected="a class attribute, which reports and checkpoints show",
            do=f'name = "{cls.__name__.lower()}" in the class',
        )
    promised = cast("object", rewrite.contract())
    if not isinstance(promised, Contract):
        raise ArgumentError(
            f"contract() of the rewrite {cls.name} says nothing that can be checked",
            found=repr(promised),
            expected="exact(), within(tolerance), identity_at_init() or changes_function() of gatecc.ir.contract",
        )
