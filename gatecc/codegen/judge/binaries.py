"""The launches of a family, compiled for a GPU and held to their budgets."""

from __future__ import annotations

from dataclasses import dataclass

from gatecc.codegen.judge.compiled import Launch, Resources, faults, recorded
from gatecc.codegen.judge.family import DTYPES, Budget, Family
from gatecc.codegen.judge.kept import resources

BUDGETS: tuple[Budget, ...] = ("spills", "vector", "matrix")


@dataclass(frozen=True)
class Binary:
    """What a kernel takes on a target.

    ``faults`` is empty if it holds its budgets; ``exempt``: why it may take more than is usual, where it does.
    """

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
    """Compile one launch, if it was not compiled before."""
    place = (family.name, made.name, size, dtype, target)
    try:
        found = resources(made, target)
    except Exception as error:  # whatever a compiler raises is what a user would see
        return Binary(*place, None, (f"it does not compile: {type(error).__name__}: {str(error)[:200]}",))
    usual = faults(found, target)
    granted = {b: e for b in BUDGETS if (e := family.exemption(made.name, b, dtype, size, target)) is not None}
    wrong = faults(found, target, **{budget: e.most for budget, e in granted.items()})
    why = [e.why for budget, e in granted.items() if len(faults(found, target, **{budget: e.most})) < len(usual)]
    return Binary(*place, found, tuple(wrong), tuple(dict.fromkeys(why)))
