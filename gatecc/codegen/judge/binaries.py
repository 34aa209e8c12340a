"""The launches of a family, compiled for a GPU and held to their budgets."""

from __future__ import annotations

from dataclasses import dataclass

from gatecc.codegen.judge.compiled import WIDE, Launch, Resources, compile_launch, faults, recorded
from gatecc.codegen.judge.family import DTYPES, Budget, Family


@dataclass(frozen=True)
class Binary:
    """What a kernel takes on a target. ``faults`` is empty if it holds its budgets; ``exempt``: why some are others."""

    family: str
    kernel: str
    size: str
    dtype: str
    target: str
    resources: Resources | None
    faults: tuple[str, ...]
    exempt: tuple[str, ...] = ()


def launches(family: Family, size: str, dtype: str, target: str) -> list[Launch]:
    """The launches of a size, each that is compiled anew once."""
    with recorded(target, family.module()) as found:
        family.sizes[size](DTYPES[dtype])
    return list({made.specialised: made for made in found}.values())


def judge_launch(family: Family, made: Launch, size: str, dtype: str, target: str) -> Binary:
    """Compile one launch."""
    place = (family.name, made.name, size, dtype, target)
    try:
        found = compile_launch(made, target)
    except Exception as error:  # whatever a compiler raises is what a user would see
        return Binary(*place, None, (f"it does not compile: {type(error).__name__}: {str(error)[:200]}",))
    budgets: dict[Budget, float] = {"spills": 0, "vector": WIDE, "matrix": 1}
    why: list[str] = []
    for budget in budgets:
        granted = family.exemption(made.name, budget, dtype, size, target)
        if granted is not None:
            budgets[budget] = granted.most
            why.append(granted.why)
    wrong = faults(found, target, spills=budgets["spills"], vector=budgets["vector"], matrix=budgets["matrix"])
    return Binary(*place, found, tuple(wrong), tuple(dict.fromkeys(why)))
