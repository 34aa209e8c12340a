"""Options of the backend: those that are called ``gatecc.*`` are ours, all others are Inductor's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gatecc.errors import ArgumentError
from gatecc.passes.lower import LOWERINGS

PREFIX = "gatecc."
PLAIN = ("aot_eager", "eager")  # modes that run the lowered graph without Inductor


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(options=...)`` may say to gatecc.

    ``freeze``: what lowerings compute of weights alone is computed once, under no_grad, and anew when they change;
    ``lowerings``: the names of those that may run, all by default.
    """

    freeze: bool = False
    lowerings: tuple[str, ...] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Read options as torch.compile hands them over. Raises ArgumentError for one of ours that does not exist,
        or that has another type."""
        ours = {name.removeprefix(PREFIX): value for name, value in given.items() if name.startswith(PREFIX)}
        known = cls.__dataclass_fields__
        if unknown := sorted(set(ours) - set(known)):
            expected = ", ".join(PREFIX + name for name in known)
            raise ArgumentError("unknown option of the backend", found=PREFIX + unknown[0], expected=expected)
        if not isinstance(freeze := ours.get("freeze", False), bool):
            raise ArgumentError("gatecc.freeze is a switch", found=repr(freeze), expected="True or False")
        if (names := ours.get("lowerings")) is not None:
            if isinstance(names, str) or not isinstance(names, Iterable):
                expected = "a list of names: " + ", ".join(LOWERINGS)
                raise ArgumentError("gatecc.lowerings names lowerings", found=repr(names), expected=expected)
            ours["lowerings"] = tuple(names)
            if wrong := sorted(set(ours["lowerings"]) - set(LOWERINGS)):
                raise ArgumentError("unknown lowering", found=wrong[0], expected=", ".join(LOWERINGS))
        return cls(**ours)


def inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a mode and options. Raises ArgumentError for an unknown mode."""
    rest = {name: value for name, value in options.items() if not name.startswith(PREFIX)}
    if mode is None or mode in PLAIN:
        return rest
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ArgumentError("unknown mode", found=repr(mode), expected=", ".join([*known, *PLAIN]))
    return {**known[mode], **rest}
