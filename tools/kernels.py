"""The tables of docs/kernels.md: what launches of each kernel must move at least, and what parts promise for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.judge.family import DTYPES, Family, families
from gatecc.codegen.triton.parts import PARTS
from gatecc.ops.registry import operators
from tools.binaries import table
from tools.marks import between, marks

FIGURES = Path(__file__).parent.parent / "docs" / "figures" / "gpu.json"  # kept from a run of benchmarks/gpu.py
DTYPE = "bf16"
_Q, _X = (1, 16, 2048, 128), (2048, 1024)
# Calls whose FLOPs the registry knows: shapes in the place of tensors.
CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "linear attention, gated": ("gatecc::linear_attention", (_Q, _Q, _Q, _Q)),
    "linear attention, gated delta": ("gatecc::linear_attention", (_Q, _Q, _Q, _Q, _Q[:3])),
    "attention, a gate per channel": ("gatecc::attention", (_Q, _Q, _Q, _Q)),
    "short convolution of 4 taps": ("gatecc::short_convolution", ((8, 2048, 2048), (2048, 1, 4))),
    "experts, 2 of 8": ("gatecc::moe_ffn", (_X, (2048, 2), (2048, 2), (8, 5632, 1024), (8, 1024, 2816))),
}


def with_estimates(page: str) -> str:
    """The page with its tables made anew."""
    for name, lines in (("estimates", [*_calls(), "", *_kernels()]), ("binaries", table()), ("measured", _measured())):
        page = between(marks(name), page, "\n" + "\n".join(lines) + "\n\n")
    return page


def _measured() -> Iterator[str]:
    """The figures of benchmarks/gpu.py that were kept, if there are any."""
    if not FIGURES.exists():
        yield "No machine with a GPU has run it so far: nothing here was measured on one."
        return
    data = json.loads(FIGURES.read_text(encoding="utf-8"))
    wrong = sum(bool(check["faults"]) for check in data["checks"])
    yield f"{data['device']}, {data['dtype']}, torch {data['torch']}, {data['date']}:"
    yield f"{len(data['checks'])} checks of kernels, {wrong} of them wrong. Milliseconds, the median of several runs."
    yield ""
    yield "| what | ours | others |"
    yield "| --- | --- | --- |"
    for race in data["races"]:
        times = dict(race["milliseconds"])
        ours = f"{times.pop('ours'):.4g}" if "ours" in times else race["absent"].get("ours", "")
        others = [f"{name} {time:.4g}" for name, time in times.items()]
        others += [f"{name}: {why}" for name, why in race["absent"].items() if name != "ours"]
        yield f"| {race['what']} | {ours} | {'; '.join(others)} |"
    if data["late"]:
        yield f"\nLeft out for want of time: {', '.join(data['late'])}."


def _calls() -> Iterator[str]:
    yield from _head("operator, forward", "GFLOP", "MB")
    known = {o.overload.overloadpacket._qualified_op_name: o for o in operators()}
    for name, (operator, shapes) in CALLS.items():
        flops = known[operator].flops
        assert flops is not None
        sizes = [torch.Size(s).numel() for s in shapes]
        moved = 2 * (sum(sizes) + sizes[0])  # 16 bits each, and a result like the first
        yield _row(name, flops(*shapes), moved)


def _kernels() -> Iterator[str]:
    yield from _head("kernel and size", "launches", "MB")
    for family in families():
        if DTYPE in family.dtypes:
            for size in family.sizes:
                yield from _of_size(family, size)


def _of_size(family: Family, size: str) -> Iterator[str]:
    from gatecc.codegen.judge.compiled import recorded

    with recorded("sm_90", family.module()) as launches:
        family.sizes[size](DTYPES[DTYPE])
    for kernel, made in groupby(sorted(launches, key=lambda launch: launch.name), key=lambda launch: launch.name):
        moved = [sum({t.data_ptr() or id(t): _bytes(t) for t in _tensors(m.given.values())}.values()) for m in made]
        name = family.name if kernel == "kernel" else f"{family.name}: {kernel}"
        times = " | ".join(f"{1e6 * sum(moved) / part.bandwidth:.1f}" for part in PARTS.values())
        yield f"| {name}, {size} | {len(moved)} | {sum(moved) / 1e6:.1f} | {times} |"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _head(*names: str) -> Iterator[str]:
    parts = [f"{part.name} ({target})" for target, part in PARTS.items()]
    yield f"| {' | '.join([*names, *parts])} |"
    yield "|" + " --- |" * (len(names) + len(parts))


def _row(name: str, flops: int, moved: int) -> str:
    times = (max(flops / part.half, moved / part.bandwidth) for part in PARTS.values())
    return f"| {name} | {flops / 1e9:.1f} | {moved / 1e6:.1f} | {' | '.join(f'{1e6 * t:.1f}' for t in times)} |"
