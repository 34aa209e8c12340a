"""Every kernel that is registered, tried in every dtype and for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from gatecc.codegen.judge.binaries import Binary
from gatecc.codegen.judge.compiled import TARGETS, kernel_names
from gatecc.codegen.judge.family import DTYPES, Family, families_of, modules
from gatecc.codegen.judge.jobs import Finding, Job, Place, run
from gatecc.codegen.judge.numbers import Numbers
from gatecc.errors import ArgumentError

Told = Callable[[int, int], None]


def check(
    only: Sequence[str] = (),
    targets: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    *,
    compiling: bool = True,
    processes: int = 1,
    told: Told | None = None,
) -> Iterator[Finding]:
    """Judge what is registered, one finding after the other: first all numbers, then all binaries.

    ``only``: names of families, or of kernels, of which only binaries are judged; ``targets`` and ``dtypes``: of those
    that there are, all without any. ``told`` is called with how much of how much is done. Raises ArgumentError for a
    name that does not exist.
    """
    registered = {(module, i): family for module in modules() for i, family in enumerate(families_of(module))}
    kernels = {place: kernel_names(family.module()) for place, family in registered.items()}
    families = {family.name for family in registered.values()}
    _known("kernel", only, families.union(*kernels.values()))
    _known("target", targets, TARGETS)
    _known("dtype", dtypes, DTYPES)
    whole = {place: f for place, f in registered.items() if not only or f.name in only}
    cases = list(_cases(whole, dtypes))
    sizes = list(_sizes(registered, whole, only, targets or tuple(TARGETS), dtypes)) if compiling else []
    ran: set[tuple[Place, str]] = set()
    launched: set[tuple[Place, str]] = set()
    jobs = [*cases, *sizes]
    for done, (job, found) in enumerate(zip(jobs, run(jobs, processes), strict=True), 1):
        for finding in found:
            if isinstance(finding, Binary):
                launched.add((job.family, finding.kernel))
            else:
                ran |= {(job.family, kernel) for kernel in finding.traffic}
            yield finding
        if told is not None:
            told(done, len(jobs))
    for place, family in whole.items():
        for kernel in kernels[place] if _of(family, dtypes) else ():
            if (place, kernel) not in ran:
                yield Numbers(family.name, "", "", (), {}, (f"no case runs {kernel}",))
            if compiling and (place, kernel) not in launched:
                yield Binary(family.name, kernel, "", "", "", None, ("no size launches it",))


def _of(family: Family, dtypes: Sequence[str]) -> tuple[str, ...]:
    """Those dtypes of a family that are chosen."""
    return tuple(d for d in family.dtypes if not dtypes or d in dtypes)


def _cases(families: dict[Place, Family], dtypes: Sequence[str]) -> Iterator[Job]:
    for place, family in families.items():
        for case in family.cases:
            yield from (Job(family=place, dtype=dtype, case=case) for dtype in _of(family, dtypes))


def _sizes(
    families: dict[Place, Family],
    whole: dict[Place, Family],
    only: Sequence[str],
    targets: Sequence[str],
    dtypes: Sequence[str],
) -> Iterator[Job]:
    for place, family in families.items():
        of = () if place in whole else tuple(name for name in kernel_names(family.module()) if name in only)
        for size in family.sizes if place in whole or of else ():
            for dtype in _of(family, dtypes):
                yield from (Job(family=place, dtype=dtype, size=size, target=t, only=of) for t in targets)


def _known(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ArgumentError(f"there is no {what} of this name", found=name, expected=", ".join(names))
