"""Rewrite and Recipe: what is done to a site, and a paper as a list of rewrites.

A rewrite is a frozen dataclass. Its fields are its options in Python, in JSON and on the command line alike; selection,
naming of parameters, verification and reporting belong to the engine.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast, get_args, get_type_hints

from torch import nn

from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.select import Selector
from gatecc.ir.site import Site
from gatecc.ir.weights import Effect

REWRITES: dict[str, type[Rewrite]] = {}


class _Taking(ABCMeta):
    """Makes rewrites whose site may be given as text or as a bare kind: ``"attention[2:].heads"``, ``Attention``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_selector(args[0]), *args[1:])
        elif "site" in kwargs:
            kwargs["site"] = _selector(kwargs["site"])
        return super().__call__(*args, **kwargs)


def _selector(site: Any) -> Selector:
    if isinstance(site, Selector):
        return site
    if isinstance(site, str):
        return Selector.parse(site)
    if isinstance(site, type) and issubclass(site, Site) and site is not Site:
        return site[...]
    raise ArgumentError(
        "this selects no sites",
        found=repr(site)[:80],
        expected='a selector: Attention[...].heads, or as text "attention[...].heads"',
    )


@dataclass(frozen=True)
class Rewrite(metaclass=_Taking):
    """One edit, done at every site that ``site`` selects.

    A subclass is registered under its ``name`` and documented from its docstring. Write ``contract`` and ``rewrite``;
    override ``reads`` if the edit needs more values of a site than the stage that is selected.

    Layers that compute the same share one captured graph. The edit is done on it for each layer, with that layer's
    module, weights and names, so that it may read them; `effects` may promise that it reads nothing of them.
    """

    name: ClassVar[str]

    site: Selector

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "effects" not in vars(cls):  # what a subclass adds may read its layer
            setattr(cls, "effects", _without_promise(cls))  # noqa: B010  # assigned, pyright takes it for a field
        if "name" in vars(cls):
            REWRITES[cls.name] = cls

    def effects(self) -> Effects:
        """What the rewrite gives up of the model, and what it needs."""
        return Effects()

    @abstractmethod
    def contract(self) -> Contract:
        """What the rewrite promises about the model's function."""

    @abstractmethod
    def rewrite(self, site: Site, edit: Editor) -> None:
        """Edit the graph at one site."""

    def install(self, model: nn.Module) -> Sequence[Effect]:
        """The effects on a model, of a rewrite that is done ``in_python``. Raises SiteRefusedError for other models."""
        raise NotImplementedError

    def edit_at(self, model: nn.Module, sites: Sequence[Site]) -> Sequence[Effect]:
        """The effects on the weights of a model, of a rewrite that ``reads_sites``: those that it selects. Raises
        SiteRefusedError for a site whose weights it cannot change."""
        raise NotImplementedError

    def remarks(self, model: nn.Module) -> Iterable[str]:
        """What a report should say of a model after `install`."""
        return ()

    def reads(self) -> Iterable[str]:
        """The values of a site that the edit needs: a site without one of them cannot take the rewrite.

        The scope of the edit is the smallest module that runs all of them.
        """
        return (self.site.stage,)

    def readers(self, site: Site) -> Iterable[str]:
        """Modules that read a value of a site which the edit takes out of the graph: the scope has to run them, too."""
        return ()

    def notes(self, site: Site) -> Iterable[str]:
        """What a report should say of the edit at a site: what was guessed, and how to say it."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Plain data with the rewrite's name under "rewrite"; the inverse of `rewrite_from_json`."""
        return {"rewrite": self.name, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    def __str__(self) -> str:
        return f"{self.name} {self.site}"


def _without_promise(cls: type[Rewrite]) -> Callable[[Rewrite], Effects]:
    def effects(self: Rewrite) -> Effects:
        inherited = cast("Rewrite", super(cls, self))
        return replace(inherited.effects(), same_for_layers=False)

    return effects


def rewrite_from_json(data: dict[str, Any]) -> Rewrite:
    """Rebuild a rewrite from plain data. Raises ArgumentError for an unknown rewrite or option."""
    rest = dict(data)
    name = rest.pop("rewrite", None)
    cls = REWRITES.get(str(name))
    if cls is None:
        raise ArgumentError("unknown rewrite", found=repr(name), expected=", ".join(sorted(REWRITES)))
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(rest) - known):
        raise ArgumentError(f"unknown option of {name}", found=", ".join(unknown), expected=", ".join(sorted(known)))
    return cls(**{key: _typed(hints[key], value) for key, value in rest.items()})


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in cast("tuple[Any, ...]", value)]
    return value


def _typed(hint: Any, value: Any) -> Any:
    hint = next((h for h in get_args(hint) if hasattr(h, "from_json")), hint)  # GateSpec of GateSpec | None
    if hasattr(hint, "from_json") and value is not None:
        return hint.from_json(value)
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Recipe:
    """A named list of rewrites with its source. ``options`` are the arguments that it was built from."""

    name: str
    citation: str
    rewrites: tuple[Rewrite, ...]
    summary: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name


Builder = Callable[..., tuple[Rewrite, ...]]
