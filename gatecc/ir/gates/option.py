"""Options: named choices with fields, the same in Python, in JSON and as text on the command line.

A *slot* (scorer, activation, ...) is a subclass of Option; a choice of it is a frozen dataclass with a tag:
``Softmax(T=2.0)`` is ``{"type": "softmax", "T": 2.0, ...}`` in JSON and ``softmax(T=2)`` as text.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from gatecc.errors import ArgumentError

# Names that Python's grammar does not read are quoted first: model.layers.0.weight, and keywords such as the stage
# "in".
_NAME = re.compile(r"""("[^"]*"|'[^']*')|(?<![\w.])([A-Za-z_]\w*(?:\.\w+)*)""")
_BARE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_LITERALS = ("True", "False", "None")


@dataclass(frozen=True)
class Option:
    """Base of all slots. Fields are checked against their annotations when an option is made.

    Raises ArgumentError for a field of the wrong type or out of its range; the message says what is accepted.
    """

    slot: ClassVar[str] = "option"
    tag: ClassVar[str] = ""
    choices: ClassVar[dict[str, type[Any]]] = {}
    aliases: ClassVar[dict[str, str]] = {}  # other spellings that papers use, e.g. "1+tanh"

    def __init_subclass__(cls, *, slot: str = "", tag: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if slot:
            cls.slot, cls.choices = slot, {}
        if tag:
            cls.tag = tag
            cls.choices[tag] = cls

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, self._accept(f.name, hints[f.name], getattr(self, f.name)))
        self.check()

    def check(self) -> None:
        """Refuse fields that are out of range. Subclasses override it."""

    def require(self, holds: bool, field: str, expected: str) -> None:
        """Raise ArgumentError unless the condition on a field holds."""
        if not holds:
            raise ArgumentError(
                f"{self.slot} {self.tag}: {field} is out of range",
                found=f"{field}={getattr(self, field)!r}",
                expected=expected,
            )

    def _accept(self, name: str, hint: Any, value: Any) -> Any:
        try:
            return _accept(hint, value)
        except TypeError:
            raise ArgumentError(
                f"{self.slot} {self.tag}: {name} has the wrong type", found=repr(value), expected=_spell(hint)
            ) from None

    # -- text ----------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        shown = [_argument(f, getattr(self, f.name)) for f in fields(self) if _is_set(f, getattr(self, f.name))]
        return f"{self.tag}({', '.join(shown)})" if shown else self.tag

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of str: ``Scorer.parse("lowrank(16)")``. Raises ArgumentError, listing what the slot accepts."""
        return cls.read_node(expression(cls.aliases.get(text.replace(" ", ""), text), cls.slot))

    @classmethod
    def read_node(cls, node: ast.expr) -> Self:
        """An option from a parsed expression: a name, or a call with arguments."""
        name, args, kwargs = call(node)
        name = cls.aliases.get(name, name)
        if name not in cls.choices:
            raise cls.unknown(ast.unparse(node))
        return cls.make(name, args, kwargs)

    @classmethod
    def make(cls, tag: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """The choice named tag with these arguments; raises ArgumentError if they do not fit its fields."""
        choice = cls.choices[tag]
        try:
            return choice(*args, **kwargs)
        except TypeError:
            given = ", ".join([*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])
            raise ArgumentError(
                f"{cls.slot} {tag}: the arguments do not fit", found=f"{tag}({given})", expected=signature(choice)
            ) from None

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values with the tag under "type"."""
        return {"type": self.tag} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of to_json; raises ArgumentError for an unknown type or field."""
        kwargs = dict(data)
        tag = kwargs.pop("type", None)
        if tag not in cls.choices:
            raise cls.unknown(str(tag))
        return cls.make(tag, (), kwargs)

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """An option as it is, or one from its text or JSON; raises ArgumentError for anything else."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, Mapping):
            return cls.from_json(cast("Mapping[str, Any]", value))
        raise cls.unknown(repr(value))

    @classmethod
    def unknown(cls, found: str) -> ArgumentError:
        """The error for something that is no option of this slot."""
        return ArgumentError(
            f"no {cls.slot} has this name", found=found, expected=", ".join(signature(c) for c in cls.choices.values())
        )


def signature(choice: type[Option]) -> str:
    """How a choice is written, with its defaults: ``softmax(T=1.0, scale=1.0, pre_activation=none)``."""
    rows = [f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(choice)]
    return f"{choice.tag}({', '.join(rows)})" if rows else choice.tag


def expression(text: str, what: str) -> ast.expr:
    """Parse text as one expression, without evaluating anything; raises ArgumentError."""
    try:
        return ast.parse(_NAME.sub(_quote, text.strip()), mode="eval").body
    except SyntaxError:
        raise ArgumentError(
            f"cannot read this {what}", found=repr(text), expected="a name, or a name with arguments"
        ) from None


def _quote(match: re.Match[str]) -> str:
    text, name = match.groups()
    if text or name in _LITERALS or not ("." in name or keyword.iskeyword(name)):
        return text or name
    return repr(name)


def call(node: ast.expr) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Split ``name(a, k=b)`` into name, positional and keyword arguments; nested options stay text."""
    if not isinstance(node, ast.Call):
        return str(_literal(node)), (), {}
    kwargs = {k.arg: _literal(k.value) for k in node.keywords if k.arg}
    return str(_literal(node.func)), tuple(_literal(a) for a in node.args), kwargs


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)


def _argument(f: Field[Any], value: Any) -> str:
    text = _text(value)
    return text if f.default is MISSING else f"{f.name}={text}"


def _is_set(f: Field[Any], value: Any) -> bool:
    return f.default is MISSING or value != f.default


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value not in _LITERALS else repr(value)
    return repr(value) if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Option):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(v) for v in cast("tuple[Any, ...]", value)]
    return value


@cache
def _hints(cls: type[Option]) -> dict[str, Any]:
    return get_type_hints(cls)


def _accept(hint: Any, value: Any) -> Any:
    """The value, converted where nothing is lost (1 -> 1.0, text -> option); raises TypeError."""
    origin = get_origin(hint)
    if origin is Literal:
        return _member(get_args(hint), value)
    if origin is tuple:
        return tuple(_accept(get_args(hint)[0], v) for v in value)
    if origin in (Union, types.UnionType):
        return _first(get_args(hint), value)
    if issubclass(hint, Option):
        return hint.coerce(value)
    return _scalar(hint, value)


def _member(accepted: tuple[Any, ...], value: Any) -> Any:
    if value not in accepted:
        raise TypeError
    return value


def _first(hints: tuple[Any, ...], value: Any) -> Any:
    for hint in hints:
        try:
            return _accept(hint, value)
        except TypeError:
            continue
    raise TypeError


def _scalar(hint: type[Any], value: Any) -> Any:
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint and hint is not float:
        return value
    raise TypeError


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_spell(h) for h in get_args(hint))
    return hint.slot if isinstance(hint, type) and issubclass(hint, Option) else getattr(hint, "__name__", str(hint))
