"""Every kernel that is registered, tried in every dtype and for every target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gatecc.codegen.judge.binaries import Binary, judge_launch, launches
from gatecc.codegen.judge.compiled import TARGETS, kernel_names
from gatecc.codegen.judge.family import DTYPES, Family, families
from gatecc.codegen.judge.numbers import Numbers, judge_numbers
from gatecc.errors import ArgumentError

Finding = Numbers | Binary


def check(
    only: Sequence[str] = (), targets: Sequence[str] = (), dtypes: Sequence[str] = (), *, compiling: bool = True
) -> Iterator[Finding]:
    """Judge what is registered, one finding after the other: first all numbers, then all binaries.

    ``only``: names of families, or of kernels, of which only binaries are judged; ``targets`` and ``dtypes``: of those
    that there are, all without any. Raises ArgumentError for a name that does not exist.
    """
    chosen = list(families())
    names = {family.name for family in chosen} | {k for family in chosen for k in kernel_names(family.module())}
    _known("kernel", only, names)
    _known("target", targets, TARGETS)
    _known("dtype", dtypes, DTYPES)
    for family in chosen:
        if not only or family.name in only:
            yield from _numbers(family, _dtypes(family, dtypes))
    for family in chosen if compiling else ():
        yield from _binaries(family, only, targets or tuple(TARGETS), _dtypes(family, dtypes))


def _dtypes(family: Family, chosen: Sequence[str]) -> tuple[str, ...]:
    return tuple(d for d in family.dtypes if not chosen or d in chosen)


def _numbers(family: Family, dtypes: Sequence[str]) -> Iterator[Finding]:
    met: set[str] = set() if dtypes else set(kernel_names(family.module()))
    for case in family.cases:
        for dtype in dtypes:
            found = judge_numbers(family, case, dtype)
            met |= set(found.traffic)
            yield found
    for kernel in sorted(set(kernel_names(family.module())) - met):
        yield Numbers(family.name, "", "", (), {}, (f"no case runs {kernel}",))


def _binaries(family: Family, only: Sequence[str], targets: Sequence[str], dtypes: Sequence[str]) -> Iterator[Finding]:
    whole = not only or family.name in only
    met: set[str] = set()
    for size in family.sizes:
        for dtype in dtypes:
            for target in targets:
                for made in launches(family, size, dtype, target):
                    if whole or made.name in only:
                        met.add(made.name)
                        yield judge_launch(family, made, size, dtype, target)
    for kernel in sorted(set(kernel_names(family.module())) - met if whole and dtypes else ()):
        yield Binary(family.name, kernel, "", "", "", None, ("no size launches it",))


def _known(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ArgumentError(f"there is no {what} of this name", found=name, expected=", ".join(names))
