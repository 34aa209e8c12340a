from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from gatecc.report.codec import decode, encode


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    size: int | None = None


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...] = ()
    share: float = 0.0
    names: dict[str, int] = field(default_factory=dict[str, int])


def test_round_trip() -> None:
    value = Outer((Inner("a", 3), Inner("b")), float("-inf"), {"x": 1})
    assert encode(value)["share"] == "-inf"
    assert decode(Outer, encode(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        {"inner": [{"kind": "c"}]},
        {"inner": [{"kind": "a", "size": "3"}]},
        {"inner": [{"kind": "a", "size": True}]},
        {"inner": [{}]},
        {"share": "much"},
        {"names": {"x": 1.5}},
        {"other": 1},
        [],
    ],
)
def test_what_does_not_fit_is_an_error(data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode(Outer, data)
