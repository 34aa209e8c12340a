"""By what the judge tries the generator: regions of each form, in each dtype, with the kernels of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.compiled import WIDE, kernel_names
from gatecc.codegen.judge.family import DTYPES, Exemption, Family
from gatecc.codegen.regions.build import Built, build

ROWS = 4096  # of the launches that are compiled
WIDTH, INNER = 256, 128


class Sample(NamedTuple):
    """A function of tensors: first those with rows, of so many columns, then others, of these shapes. ``exemptions``:
    of the kernels of its gradient."""

    function: Callable[..., Any]
    rows: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()
    exemptions: tuple[Exemption, ...] = ()

    def tensors(self, rows: int, **options: Any) -> list[Tensor]:
        """Arguments of so many rows: those of rows first."""
        make = partial(torch.empty, **options) if options.get("device") == "meta" else partial(torch.randn, **options)
        return [*(make(rows, width) for width in self.rows), *(make(s) * s[-1] ** -0.5 for s in self.others)]


def _norm(x: Tensor, skip: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = x + skip
    return F.rms_norm(y, (y.size(-1),), scale, 1e-6), y


_UNROLLED = "ptxas unrolls the four steps of its loop and keeps three addresses of the result while the last one runs"
SAMPLES = {
    "gated unit": Sample(lambda gate, up: F.silu(gate) * up, (WIDTH, WIDTH)),
    "residual and norm": Sample(_norm, (WIDTH, WIDTH), ((WIDTH,),)),
    "softmax with a cap": Sample(lambda x: torch.softmax(10 * torch.tanh(x / 10), -1), (WIDTH,)),
    "gated output": Sample(lambda x, o, w: torch.sigmoid(F.linear(x, w)) * o, (INNER, WIDTH), ((WIDTH, INNER),)),
    "GLU": Sample(
        lambda x, w, u, b: F.gelu(F.linear(x, w, b)) * F.linear(x, u),
        (INNER,),
        ((WIDTH, INNER), (WIDTH, INNER), (WIDTH,)),
    ),
    "norm before": Sample(
        lambda x, skip, w, scale, bias: F.gelu(F.linear(F.layer_norm(x + skip, (INNER,), scale, bias), w)),
        (INNER, INNER),
        ((WIDTH, INNER), (INNER,), (INNER,)),
        (Exemption("kernel_2", "spills", 6, _UNROLLED, dtypes=("bf16", "fp16"), targets=("sm_100",)),),
    ),
    "gate of low rank": Sample(
        lambda x, o, a, b: torch.sigmoid(F.linear(F.linear(x, a), b)) * o,
        (INNER, WIDTH),
        ((16, INNER), (WIDTH, 16)),
    ),
    "gate before, norm behind": Sample(
        lambda x, g, skip, w, scale: F.rms_norm(F.linear(x * torch.sigmoid(g), w) + skip, (WIDTH // 2,), scale, 1e-6),
        (INNER, INNER, WIDTH // 2),
        ((WIDTH // 2, INNER), (WIDTH // 2,)),
    ),
}


def _named(found: Any) -> dict[str, Tensor]:
    return {f"y{i}": x for i, x in enumerate(found if isinstance(found, tuple) else (found,))}


def _own(kernel: Any) -> Any:
    return kernel


def family_of(name: str, built: Built, function: Callable[..., Any], example: Callable[..., list[Tensor]]) -> Family:
    """The family of a region's kernel. ``example``: tensors of so many rows; takes options of torch.empty."""
    dtype = next(d for d, kind in DTYPES.items() if kind == built.example[0].dtype)

    def start(kind: torch.dtype) -> object:
        return built.module.launch(*example(ROWS, dtype=kind, device="meta"), wrap=_own)

    return Family(
        name=f"region: {name}",
        launcher=built.module.__name__,
        cases={"37 rows": lambda: {f"x{i}": x for i, x in enumerate(example(37, dtype=torch.float64))}},
        run=lambda given: _named(built.module.launch(*given.values(), wrap=_own)),
        reference=lambda given: _named(function(*given.values())),
        sizes={f"{ROWS} rows": start},
        exemptions=tuple(
            exemption
            for kernel in kernel_names(built.module)
            for exemption in (
                Exemption(kernel, "traffic", 6, "a block of columns reads the rows again, one of rows the matrices"),
                Exemption(kernel, "vector", _widest(built), "rows that are no multiple of 16 bytes begin anywhere"),
            )
        ),
        dtypes=(dtype,),
    )


def _widest(built: Built) -> int:
    """Bytes of the widest access that the sizes allow: rows lie one behind the other, so the next one begins at a
    multiple of its bytes, and no more than that is known of where. Rows of less than 32 columns are no measure: a block
    of 16 by 16 has not 16 bytes for each thread of a warp."""
    sizes = [(x.shape[-1] * x.element_size(), x.element_size()) for x in built.example if x.dim()]
    return max(min(WIDE, size & -size) if size >= 32 * one else one for size, one in sizes)


def _families() -> Iterator[Family]:
    for name, sample in SAMPLES.items():
        for kind in DTYPES.values():
            built = build(sample.function, sample.tensors(37, dtype=kind), [f"a sample of the judge: {name}"])
            yield family_of(name, built, sample.function, sample.tensors)
            if built.gradient is not None and kernel_names(built.gradient):
                family = gradient_family(name, built, sample.function, sample.tensors)
                yield replace(family, exemptions=(*family.exemptions, *sample.exemptions))


def gradient_family(
    name: str, built: Built, function: Callable[..., Any], example: Callable[..., list[Tensor]]
) -> Family:
    """The family of the kernels of a region's gradient. The arguments are those of ``family_of``."""

    def gradients(*given: Tensor) -> Any:
        inputs, grads = given[: len(built.example)], given[len(built.example) :]
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            results = tuple(_named(function(*leaves)).values())
        return torch.autograd.grad(results, leaves, grads)

    def with_grads(rows: int, **options: Any) -> list[Tensor]:
        given = example(rows, **options)
        return [*given, *(torch.randn_like(x) for x in _named(function(*given)).values())]

    def cancelled(given: dict[str, Any]) -> dict[str, float]:
        """Of the gradients of inputs that are one number: these are sums over all rows and columns."""
        inputs, grads = list(given.values())[: len(built.example)], list(given.values())[len(built.example) :]
        found, place = dict[str, float](), 0
        for i, x in enumerate(inputs):
            if x.numel() == 1 and x.is_floating_point():
                spread = [*inputs[:i], x.expand(grads[0].shape), *inputs[i + 1 :]]
                terms = gradients(*(y.contiguous() for y in spread), *grads)[place]
                found[f"y{place}"] = float(terms.abs().sum() / terms.sum().abs())
            place += x.is_floating_point()
        return found

    gradient = Built(built.gradient, built.example)  # pyright: ignore[reportArgumentType]
    return replace(family_of(f"{name}, gradient", gradient, gradients, with_grads), cancelled=cancelled)


def families() -> tuple[Family, ...]:
    """All of them. Their files are written where the cache is now."""
    return tuple(_families())
