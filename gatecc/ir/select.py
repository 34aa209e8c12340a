"""Selector: which sites a rewrite means, in Python (``Attention["model.layers.*"].heads``), in JSON and as text.

As text, ``kind[where].stage``: ``attention[...].heads``, ``mlp[model.layers.*]``, ``linear[0,2,-1].in``, ``block[2:]``,
``attention[... except 3::4]`` (all but every fourth).
``where`` is ``...`` for all, FQN globs, positions, or a slice of positions; a glob that could be read as something else
stands in double quotes. Brackets and stage may be left out.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, cast

from gatecc.errors import ArgumentError, EmptySelectionError

Where: TypeAlias = (
    "EllipsisType | str | int | slice[Any, Any, Any] | Sequence[str] | Sequence[int] | Callable[[Any], bool]"
)

_TEXT = re.compile(r"(?P<kind>[A-Za-z]+)(?:\[(?P<where>.*)\])?(?:\.(?P<stage>\w+))?", re.DOTALL)
_PART = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,"]+?)\s*(?:,|$)', re.DOTALL)
_EXCEPT = " except "
_WRAPPERS = re.compile(r"(?<!\w)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_INT = re.compile(r"-?\d+")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
_PLAIN_GLOB = re.compile(r"[\w.*?\[\]!#@-]*[A-Za-z_*?\[#@][\w.*?\[\]!#@-]*", re.ASCII)  # a glob that needs no quotes


@dataclass(frozen=True)
class Stages:
    """The values that sites of a kind can expose, and the one that is meant where none is named."""

    names: tuple[str, ...]
    main: str
    numbered: tuple[str, ...] = ()  # "in": in0, in1, ... too; how many there are is the site's
    named: bool = False  # other names too, which the model gives
    is_part: bool = True  # whether the kind is a part of a model


STAGES: dict[str, Stages] = {}  # by kind; the classes of gatecc.ir.site write themselves down here


class UnknownStageError(ArgumentError, AttributeError):
    """A kind of site has no stage of this name; an AttributeError too, so that ``hasattr`` keeps working."""


@dataclass(frozen=True)
class Selector:
    """Sites of one ``kind`` and the ``stage`` (the value) of them that is meant; ``where`` picks among the sites.

    ``where``: ``...`` all; an FQN glob or several (matched against the owner, against the key if the glob has a ``#``);
    a position or several among the sites of the kind, in execution order; a slice of positions; a predicate. Every glob
    and every position must find a site. Another stage is an attribute: ``selector.heads`` (``in_`` for ``in``).

    Raises ArgumentError if the kind, the stage or ``where`` makes no sense.
    """

    kind: str
    where: Where
    stage: str = ""
    besides: Where | None = None  # sites that are left as they are; it need not find any

    def __post_init__(self) -> None:
        if self.kind not in STAGES:
            raise ArgumentError(f"{self.kind!r} is no kind of site", expected="one of " + ", ".join(STAGES))
        object.__setattr__(self, "where", _normal(self.where))
        if self.besides is not None:
            object.__setattr__(self, "besides", _normal(self.besides))
        stages = STAGES[self.kind]
        object.__setattr__(self, "stage", self.stage or stages.main)
        if self.stage in stages.names or stages.named or self.stage.rstrip("0123456789") in stages.numbered:
            return
        raise UnknownStageError(
            f"{self.kind} has no stage {self.stage!r}", expected="one of " + ", ".join(stages.names)
        )

    def __getattr__(self, name: str) -> Selector:
        if name.startswith("_"):  # what copy, pickle and the like probe for
            raise AttributeError(name)
        return replace(self, stage=name.removesuffix("_"))

    def but(self, where: Where) -> Selector:
        """The same without some sites: ``Attention[...].heads.but(slice(3, None, 4))`` leaves every fourth as it is."""
        return replace(self, besides=where)

    def __hash__(self) -> int:  # a slice has no hash before Python 3.12
        return hash(str(self))

    def __str__(self) -> str:
        return f"{self.kind}[{self._places()}].{self.stage}"

    def _places(self) -> str:
        return _format(self.where) + ("" if self.besides is None else f"{_EXCEPT}{_format(self.besides)}")

    @classmethod
    def parse(cls, text: str) -> Selector:
        """The selector that a text means; the inverse of ``str``. Raises ArgumentError."""
        match = _TEXT.fullmatch(text.strip()) if isinstance(cast("object", text), str) else None
        if match is None:
            raise ArgumentError(
                f"{text!r} is no selector",
                expected="kind[where].stage, e.g. attention[2:].heads, or by owners attention[encoder.*].heads",
            )
        return cls(match["kind"].lower(), **_split(match["where"]), stage=match["stage"] or "")

    def to_json(self) -> dict[str, Any]:
        """A JSON object; raises ArgumentError for a predicate, which only Python can hold."""
        if callable(self.where) or callable(self.besides):
            raise ArgumentError(
                f"{self} selects by a Python function, which cannot be saved",
                do="select by FQN globs or positions: gatecc.inspect lists those that the function takes",
            )
        return {"kind": self.kind, "where": self._places(), "stage": self.stage}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Selector:
        """The inverse of to_json. Raises ArgumentError."""
        return cls(data["kind"], **_split(data["where"]), stage=data["stage"])


class Named(Protocol):
    """What a selector looks at among the sites of a kind: a site, or its row in a report."""

    @property
    def owner(self) -> str: ...
    @property
    def key(self) -> str: ...


class OfKind(Named, Protocol):
    """A site."""

    kind: ClassVar[str]


class Refused(Protocol):
    """What a message about an empty selection reads of a refusal."""

    @property
    def code(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def remedy(self) -> str: ...


AnySite = TypeVar("AnySite", bound=OfKind)


def select(selector: Selector, sites: Iterable[AnySite], refusals: Sequence[Refused] = ()) -> list[AnySite]:
    """The sites that ``selector`` means, in the order of ``sites`` (execution order).

    Raises EmptySelectionError if it, or any single glob or position in it, finds none; the message lists what exists.
    """
    everything = list(sites)
    of_kind = [site for site in everything if site.kind == selector.kind]
    wanted = _matches(selector, of_kind)
    for part in _parts(selector.where):
        if not _matches(replace(selector, where=part), of_kind):
            raise _empty(replace(selector, where=part), everything, of_kind, refusals)
    if selector.besides is not None:
        wanted = wanted - _matches(replace(selector, where=selector.besides, besides=None), of_kind)
        if not wanted:
            raise _empty(selector, everything, of_kind, refusals)
    return [site for site in of_kind if id(site) in wanted]


def left_alone(selector: Selector, of_kind: Sequence[Named]) -> bool:
    """Whether there is a site of the kind that ``but`` leaves as it is."""
    if callable(selector.besides):
        return True
    return selector.besides is not None and bool(
        _matches(replace(selector, where=selector.besides, besides=None), of_kind)
    )


def _matches(selector: Selector, of_kind: Sequence[Named]) -> set[int]:
    where = selector.where
    if isinstance(where, EllipsisType):
        return {id(site) for site in of_kind}
    if isinstance(where, slice):
        return {id(site) for site in of_kind[where]}
    if callable(where):
        return {id(site) for site in of_kind if where(site)}
    found: set[int] = set()
    for part in _parts(where):
        if isinstance(part, str):
            found.update(id(site) for site in of_kind if _is_named(site, part))
        elif -len(of_kind) <= part < len(of_kind):
            found.add(id(of_kind[part]))
    return found


def _is_named(site: Named, glob: str) -> bool:
    """Whether a glob means a site, with or without the names that wrappers (DDP, peft, checkpointing) put between."""
    name = site.key if "#" in glob else site.owner
    return fnmatchcase(name, glob) or fnmatchcase(unwrapped(name), unwrapped(glob))


def unwrapped(name: str) -> str:
    """An FQN as it is in the model that was wrapped: without ``base_model.model``, ``module``, ``_orig_mod``, ..."""
    name = _WRAPPERS.sub("", name)
    for prefix in ("base_model.model.", "module."):
        name = name.removeprefix(prefix)
    return name


def _empty(
    selector: Selector, everything: Sequence[OfKind], of_kind: Sequence[Named], refusals: Sequence[Refused]
) -> EmptySelectionError:
    counts = Counter(site.kind for site in everything)
    found = [", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no site of any kind"]
    owners = list(dict.fromkeys(site.owner for site in of_kind))
    near = difflib.get_close_matches(selector.where, owners, n=3, cutoff=0.3) if isinstance(selector.where, str) else []
    if owners:
        found.append(f"{selector.kind} sites at " + ", ".join(near or _ends(owners)))
    refused = [r for r in refusals if r.kind == selector.kind]
    found += [f"{r.code} {r.owner}: {r.reason}" for r in refused[:3]]
    if len(refused) > 3:
        found.append(f"and {len(refused) - 3} more refusals of this kind")
    return EmptySelectionError(
        f"{selector} selects no site",
        found="; ".join(found),
        do=_remedy(selector, everything, of_kind, refused),
    )


def _remedy(
    selector: Selector, everything: Sequence[OfKind], of_kind: Sequence[Named], refused: Sequence[Refused]
) -> str:
    if of_kind:
        return "gatecc.inspect(model, example_inputs) lists the sites: select by their owners or positions"
    fitting = [r.remedy for r in refused if r.remedy]
    if fitting:
        return fitting[0]
    if kinds := sorted({site.kind for site in everything if STAGES[site.kind].is_part}):
        return f"the model has no {selector.kind} site: select {' or '.join(kinds)} sites, if one of these is meant"
    return "pass a model with layers that gatecc knows: attention, linear layers, convolutions, recurrent layers"


def _ends(owners: list[str]) -> list[str]:
    return owners if len(owners) <= 4 else [*owners[:2], "...", owners[-1]]


def _normal(where: Any) -> Where:
    """Lists to tuples, a tuple of one to its element; raises ArgumentError for what is no ``where``."""
    if isinstance(where, (list, tuple)):
        parts = tuple(cast("Sequence[Any]", where))
        if len(parts) == 1:
            return _normal(parts[0])
        if parts and (all(isinstance(p, str) for p in parts) or all(_is_int(p) for p in parts)):
            return cast("Sequence[str] | Sequence[int]", parts)
    elif isinstance(where, slice):
        cut = cast("slice[Any, Any, Any]", where)
        if cut.step != 0 and all(bound is None or _is_int(bound) for bound in (cut.start, cut.stop, cut.step)):
            return cut
    elif isinstance(where, (EllipsisType, str)) or _is_int(where) or callable(where):
        return cast("Where", where)
    raise ArgumentError(
        f"{where!r} does not say which sites",
        expected="..., an FQN glob, a position, a list of either, a slice of positions, or a function of a site",
    )


def _parts(where: Where) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", where) if isinstance(where, tuple) else (where,)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _format(where: Where) -> str:
    if isinstance(where, EllipsisType):
        return "..."
    if isinstance(where, slice):
        bounds = [where.start, where.stop] + [where.step] * (where.step is not None)
        return ":".join("" if bound is None else str(bound) for bound in bounds)
    if callable(where):
        return f"<{getattr(where, '__qualname__', type(where).__name__)}>"
    return ",".join(_format_part(part) for part in _parts(where))


def _format_part(part: str | int) -> str:
    return part if isinstance(part, str) and _PLAIN_GLOB.fullmatch(part) else json.dumps(part)


def _split(text: str | None) -> dict[str, Any]:
    """``where`` and ``besides`` of the text between the brackets."""
    where, found, besides = ("..." if text is None else text).partition(_EXCEPT)
    return {"where": _parse(where), "besides": _parse(besides) if found else None}


def _parse(text: str) -> Where:
    text = text.strip()
    if text == "...":
        return ...
    if bounds := _SLICE.fullmatch(text):
        return slice(*(None if bound is None else int(bound) for bound in bounds.groups()))
    if text.startswith("<"):
        raise ArgumentError(f"{text} is a Python function, which text cannot hold", do="use FQN globs or positions")
    parts: list[Any] = []
    at = 0
    while at < len(text):
        match = _PART.match(text, at)
        if match is None:
            raise ArgumentError(f"{text!r} does not say which sites", found=f"unreadable at {text[at:]!r}")
        parts.append(_parse_part(match[1]))
        at = match.end()
    return _normal(parts)


def _parse_part(text: str) -> str | int:
    if _INT.fullmatch(text):
        return int(text)
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{text} is no quoted glob", found=str(error)) from error
