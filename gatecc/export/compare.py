"""compare: an ONNX graph and torch at several sizes; which sizes are really free; and what is an error.

Rounding is no error: where a difference is beyond the tolerance, both are held against the model in float64, and ONNX
Runtime may be about as far from it as torch itself is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from math import prod
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.dims import BATCH, SEQUENCE
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.place import first_line
from gatecc.codegen.onnx.reference import drawn, reference
from gatecc.codegen.onnx.runtime import Session
from gatecc.errors import ExportError, GateccError
from gatecc.export.branches import untaken
from gatecc.export.locate import locate
from gatecc.export.lower import context_of
from gatecc.export.ragged import Padded, padded
from gatecc.scope.family import difference

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2}
_DIFFERS = "the ONNX graph does not compute what the model does"
_LENGTHS = ((1,), (7,), (131, 61, 41))
_TIMES = 4  # sums in another order are off by torch's own distance from float64, in a few of these ...
_MOST = {torch.float32: 1e-2, torch.float16: 1e-1}  # ... up to this: a model that is further off proves nothing

Sizes = dict[str, int]


@dataclass(frozen=True)
class Compared:
    """One comparison with torch. ``error`` is the largest of |torch - onnx| / max(1, max|torch|) over all outputs; of
    an output that is closer to the model in float64 than to torch, the distance from that. ``reference``: whether it is
    ONNX's reference evaluator that ran the graph, in the place of ONNX Runtime. ``padding``: the side on which an
    attention_mask, or what else hides places, hid some of a row; then what a model gives at padding is left out."""

    sizes: Sizes
    error: float
    reference: bool = False
    padding: str = ""


@dataclass
class Outcome:
    """What was compared, the dimensions that are not free after all, and a failure that the example's sizes do not
    have."""

    compared: list[Compared] = field(default_factory=list[Compared])
    fixed: Sizes = field(default_factory=Sizes)
    failure: ExportError | None = None
    at: Sizes = field(default_factory=Sizes)


def compare(call: Call, graph: Graph, path: Path, notes: list[str]) -> Outcome:
    """Run the file in ONNX Runtime at batch 1 and 3 and at a second length, as far as the model itself runs there.

    Raises ExportError if it does not load, or if it differs, or fails, at the example's sizes.
    """
    example = graph.dims.sizes(call.leaves)
    outcome = Outcome()
    sizes = _sizes(call, graph, example, outcome.fixed, notes)
    with closing(Session(path, graph.places, apart=graph.apart)) as session:
        if session.lacking:
            sizes = [_small(sizes)]
            at = ", ".join(f"{name} {size}" for name, size in sizes[0].items()) or "the example's sizes"
            notes.append(f"compared at {at} alone, in ONNX's reference evaluator: {session.lacking}")
        for one in sizes:
            try:
                outcome.compared.append(_at(call, graph, session, one, notes))
            except ExportError as e:
                outcome.failure, outcome.at = e, one
                break
        if outcome.failure is None and not session.lacking:
            outcome.compared += _padded(call, graph, session, path, outcome.compared, notes)
        unforgivable = outcome.failure is not None and not _right(call, graph, session, example)
    if unforgivable:
        raise located(outcome, call, graph, path)
    if outcome.failure is None:
        notes.extend(untaken(call, graph, path, [one.sizes for one in outcome.compared]))
    return outcome


def located(outcome: Outcome, call: Call, graph: Graph, path: Path) -> ExportError:
    """The failure of an outcome; one of numbers names the first node that differs."""
    error = outcome.failure
    assert error is not None
    return error if error.what != _DIFFERS else locate(error, call, graph, path, _resized(call, graph, outcome.at))


def _small(sizes: Sequence[Sizes]) -> Sizes:
    """The least of them at which no size is 1, where many a mistake does not show."""
    return min(sizes, key=lambda s: (1 in s.values(), prod(s.values())))


def _right(call: Call, graph: Graph, session: Session, sizes: Sizes) -> bool:
    try:
        _at(call, graph, session, sizes, [])
    except ExportError:
        return False
    return True


# --- sizes ------------------------------------------------------------------------------------------------------------


def _sizes(call: Call, graph: Graph, example: Sizes, fixed: Sizes, notes: list[str]) -> list[Sizes]:
    """Where to compare. Dimensions that run at no other size than the example's go into ``fixed``."""
    wanted = [{**example, BATCH: size} for size in (1, 3)] if BATCH in example else [example]
    # torch.export asks of many a size that it is not 1, mostly for layouts, which an ONNX graph has not
    batches = [s for s in wanted if _runs(call, graph, s) or (s.get(BATCH) == 1 and not _why_not(call, graph, s))]
    notes.extend(
        f"not compared at batch {s[BATCH]}: the model does not run there{_why_not(call, graph, s)}"
        for s in wanted
        if s not in batches
    )
    if not batches and BATCH in example:
        fixed[BATCH] = example[BATCH]
    second = _second(call, graph, example, fixed)
    if fixed:
        named = ", ".join(f"{name} {size}" for name, size in fixed.items())
        notes.append(f"fixed, for the model runs at no other size that was tried: {named}")
    batches = batches or [example]
    lengths = [{**s, BATCH: b[BATCH]} if BATCH in s else s for s in second for b in batches]
    return [*batches, *lengths, *_extremes(call, graph, batches, [*batches, *lengths], fixed)]


def _extremes(call: Call, graph: Graph, batches: list[Sizes], others: list[Sizes], fixed: Sizes) -> Iterator[Sizes]:
    """Lengths at which forms of attention, scans and states go wrong: one token, fewer than any chunk, an odd number
    beyond the usual chunks, up to what the model is made for. Batches take turns."""
    names = [n for n in batches[0] if n.endswith(SEQUENCE) and n not in fixed]
    longest = context_of(call.flat.m)
    for i, lengths in enumerate(_LENGTHS if names else ()):
        known = [length for length in lengths if longest is None or length <= longest]
        candidates = ({**batches[i % len(batches)], **dict.fromkeys(names, length)} for length in known)
        yield from islice((s for s in candidates if s not in others and _runs(call, graph, s)), 1)


def _second(call: Call, graph: Graph, example: Sizes, fixed: Sizes) -> list[Sizes]:
    """Other lengths: of all dimensions together where that runs, else of those that run by themselves."""
    lengths = [name for name in example if name != BATCH]
    together = _longer(call, graph, example, lengths)
    if together is not None:
        return [together]
    alone: list[Sizes] = []
    for name in lengths if len(lengths) > 1 else ():
        other = _longer(call, graph, example, [name])
        if other is not None:
            alone.append(other)
    free = {name for name in lengths if any(s[name] != example[name] for s in alone)}
    fixed.update({name: example[name] for name in lengths if name not in free})
    return alone


def _longer(call: Call, graph: Graph, example: Sizes, names: Sequence[str]) -> Sizes | None:
    return next((s for s in graph.dims.longer(example, names) if _runs(call, graph, s)), None)


def _runs(call: Call, graph: Graph, sizes: Mapping[str, int]) -> bool:
    leaves = _resized(call, graph, sizes)
    return graph.accepts(leaves) and _computes(call, leaves)


def _computes(call: Call, leaves: Sequence[torch.Tensor]) -> bool:
    return not _refused(call, leaves)


def _why_not(call: Call, graph: Graph, sizes: Mapping[str, int]) -> str:
    """What the model itself raises at these sizes; empty if it runs."""
    return _refused(call, _resized(call, graph, sizes))


def _refused(call: Call, leaves: Sequence[torch.Tensor]) -> str:
    try:
        call.flat(*leaves)
    except GateccError as e:
        return f": {e.code} {e.what}"
    except Exception as e:
        return f": {type(e).__name__}: {first_line(e)}"
    return ""


# --- numbers ----------------------------------------------------------------------------------------------------------


def _padded(
    call: Call, graph: Graph, session: Session, path: Path, compared: Sequence[Compared], notes: list[str]
) -> list[Compared]:
    """Rows of several lengths, padded on the left and on the right, for each input that may be a mask of padding.

    Raises ExportError for the first that differs, with the first node that does: looked for in rows that are padded on
    the right, if these differ as well, where every query sees a key.
    """

    def run(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        return _torch(call, leaves) if _computes(call, leaves) else None

    sizes = next((c.sizes for c in compared if c.sizes.get(BATCH, 1) > 2), None)
    found: list[Compared] = []
    failed: tuple[ExportError, Padded] | None = None
    for each in () if sizes is None else padded(call.inputs, _resized(call, graph, sizes), run):
        try:
            found.append(_at(call, graph, session, sizes or {}, notes, each))
        except ExportError as e:
            failed = (e if failed is None else failed[0], each)
    if failed is not None:
        error, hidden = failed
        raise error if error.what != _DIFFERS else locate(error, call, graph, path, hidden.leaves)
    return found


def _at(
    call: Call, graph: Graph, session: Session, sizes: Sizes, notes: list[str], hidden: Padded | None = None
) -> Compared:
    leaves = _resized(call, graph, sizes) if hidden is None else hidden.leaves
    where = ", ".join(f"{k} {v}" for k, v in sizes.items()) or "the example's sizes"
    where += f", padded on the {hidden.side}" if hidden else ""
    expected, found = _torch(call, leaves), session.run(call.inputs, leaves)
    if hidden is not None:
        expected, found = hidden.tokens(expected), hidden.tokens(found)
    errors = [difference(x, y) if x.dtype == y.dtype else float("inf") for x, y in zip(expected, found, strict=True)]
    limits = [TOLERANCE.get(x.dtype, 0.0) for x in expected]
    if any(not error <= limit for error, limit in zip(errors, limits, strict=True)):
        _judge(call, graph, leaves, (expected, found), errors, where, notes, hidden)
    return Compared(sizes, max(errors, default=0.0), bool(session.lacking), hidden.side if hidden else "")


def _resized(call: Call, graph: Graph, sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    return graph.dims.resized(call.leaves, sizes)


def _torch(call: Call, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [x.cpu() for x in call.flat(*leaves)]


def _judge(
    call: Call,
    graph: Graph,
    leaves: Sequence[torch.Tensor],
    results: tuple[list[torch.Tensor], list[torch.Tensor]],
    errors: list[float],
    where: str,
    notes: list[str],
    hidden: Padded | None,
) -> None:
    """Hold what differs against float64, and put distances from that in ``errors``. Raises ExportError."""
    known = _reference(call, graph, leaves, hidden)
    for i, (name, x, y) in enumerate(zip(call.outputs, *results, strict=True)):
        tolerance = TOLERANCE.get(x.dtype, 0.0)
        if errors[i] <= tolerance:
            continue
        own, distance, allowed, elsewhere = float("nan"), float("nan"), tolerance, ""
        if known is not None and x.dtype == y.dtype and x.shape == y.shape == known.wide[i].shape:
            wide = known.wide[i]
            own = _own(wide, x)
            allowed = allowed_off(own, x.dtype)
            distance = difference(wide, y.double())
            rounding = _own(wide, known.plain[i])
            if distance > allowed or own > max(tolerance, _TIMES * rounding):
                lucky = [_own(wide, z[i]) for z in known.drawn()]
                allowed = allowed_off(own, x.dtype, lucky)
                rounding = max(rounding, *(gap for gap in lucky if gap <= _MOST.get(x.dtype, 0.0)), 0.0)
            if own > max(tolerance, _TIMES * rounding):
                elsewhere = ": the model computes otherwise there than at the sizes that it was captured at"
            elif distance <= allowed:
                notes.append(f"{name} at {where}: {distance:.2g} from float64, of which torch itself is {own:.2g} off")
                errors[i] = distance
                continue
        far = "" if own != own else f"; from float64 torch is {own:.3g} off, ONNX Runtime {distance:.3g}{elsewhere}"
        raise ExportError(
            _DIFFERS,
            where=f"{name} at {where}",
            found=f"{tuple(y.shape)} {y.dtype}, difference {errors[i]:.3g} of max(1, max|{name}|){far}",
            expected=f"{tuple(x.shape)} {x.dtype}, at most {allowed:.3g}",
            do="a model that draws random numbers in eval mode cannot be compared: verify=False writes it",
        )


def allowed_off(own: float, dtype: torch.dtype, drawn: Sequence[float] = ()) -> float:
    """How far from the model in float64 a graph of this dtype may be, of which torch itself is ``own`` off, and draws
    of its rounding are as far as ``drawn``: torch may have been lucky, but proves nothing where it is far off."""
    tolerance, most = TOLERANCE.get(dtype, 0.0), _MOST.get(dtype, 0.0)
    known = max((gap for gap in (own, *drawn) if gap <= most), default=0.0)
    return max(tolerance, min(_TIMES * known, most)) if own <= most else tolerance  # NaN allows nothing more


def _own(wide: torch.Tensor, x: torch.Tensor) -> float:
    """How far torch is from float64, where both are finite: an overflow of torch's allows nothing."""
    both = torch.isfinite(wide) & torch.isfinite(x)
    return difference(wide.masked_fill(~both, 0.0), x.double().masked_fill(~both, 0.0))


@dataclass(frozen=True)
class _Known:
    """The outputs of the captured program, in float64 and in its own precision: rounding is what these differ by; and
    in float64 with rounding drawn."""

    wide: list[torch.Tensor]
    plain: list[torch.Tensor]
    drawn: Callable[[], list[list[torch.Tensor]]]


def _reference(call: Call, graph: Graph, leaves: Sequence[torch.Tensor], hidden: Padded | None) -> _Known | None:
    """None if they cannot be had, or if the model gives other numbers when it is called again."""
    one, other = _torch(call, leaves), _torch(call, leaves)
    if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(one, other, strict=True)):
        return None
    try:
        program = graph.program()
        torch.manual_seed(0)
        results = program.module(check_guards=False)(*leaves)
        plain = [x.cpu() for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)]
        wide = [x.cpu() for x in reference(program, leaves)]
    except Exception:  # a graph that does not run in float64 (quantised, say) leaves the plain tolerance
        return None
    if not len(wide) == len(plain) == len(one):
        return None

    def told(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [x.cpu() for x in outputs] if hidden is None else hidden.tokens([x.cpu() for x in outputs])

    @cache
    def draws() -> list[list[torch.Tensor]]:
        torch.manual_seed(0)
        return [told(outputs) for outputs in drawn(program, leaves)]

    return _Known(told(wide), told(plain), draws)
