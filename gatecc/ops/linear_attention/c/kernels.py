"""CPU kernels of ``gatecc::linear_attention``: the C of one rule and head size, and how tensors are handed to it."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.linear_attention import kernels
from gatecc.ops.linear_attention.c.split import outermost, parts_of, split, split_gradient
from gatecc.ops.linear_attention.kernels import Step
from gatecc.ops.linear_attention.layout import room
from gatecc.ops.linear_attention.problem import Gradients, Problem

HEADERS = Path(__file__).parent / "headers"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST = 512  # channels of a head; beyond it the scratch leaves the caches and the ATen form is as good

_OPERAND = struct.Struct("@Pqqqqiiq")
_TAIL = struct.Struct("@Pqqq5Pffii")
WRITTEN = ("o", "grad_o", "dq", "dk", "dv", "dg", "dbeta")
POINTERS = ("final", "decay", "grad_final", "dstate")
STEP = struct.Struct("@8Pqq4iffi")
_NOTHING = _OPERAND.pack(0, 0, 0, 0, 0, 0, 1, 0)


Part = Literal["forward", "backward", "tiles"]  # tiles: forward, on a CPU's matrix units
CHUNK = 32  # tokens that matrix units take at once
ROOTS: dict[Part, tuple[str, ...]] = {  # the headers of each part that include the others
    "forward": ("forward", "step"),
    "backward": ("backward",),
    "tiles": ("tiles_forward",),
}
EXPORTS = {"forward": ("forward", "step"), "backward": ("backward",), "tiles": ("forward",)}


@dataclass(frozen=True)
class Spec:
    """What a source is written for. Dtypes and the width of gates are found out at run time: a row at a time."""

    part: Part
    gated: bool
    delta: bool
    Dk: int
    Dv: int

    def source(self) -> str:
        """The C of this kernel: its constants, and the headers."""
        sizes = {"GATED": int(self.gated), "DELTA": int(self.delta), "DK": self.Dk, "DV": self.Dv}
        if self.part == "tiles":
            sizes["WHOLE"] = CHUNK
        return "".join(f"#define {name} {value}\n" for name, value in sizes.items()) + _headers(self.part)


@lru_cache
def _headers(part: Part) -> str:
    return amalgamated(HEADERS / f"{root}.h" for root in ROOTS[part])


@lru_cache
def library(spec: Spec) -> ctypes.CDLL | None:
    """The kernels of a spec, built if need be. None without a compiler, or without the units that the part needs."""
    found = load(spec.source())
    if found is None or (spec.part == "tiles" and not found.ready()):
        return None
    for name in EXPORTS[spec.part]:
        function = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return found


class CpuKernels:
    """Serves float32, bfloat16 and float16 on the CPU."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.linear_attention.kernels.Kernels."""
        c = _tiles(problem) or _library(problem, "forward")
        if c is None:
            return None
        parts = parts_of(problem, torch.get_num_threads())
        if parts == 1:
            return _forward(c, problem)
        o, final = _forward(c, split(problem, parts, partial(_summary, c)))
        return o, outermost(final, parts, -1)

    def backward(self, problem: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients | None:
        """See gatecc.ops.linear_attention.kernels.Kernels."""
        c, states = _library(problem, "backward"), _library(problem, "forward")
        if c is None or states is None:
            return None
        grad_o = grad_o if grad_o.dtype in TYPES else grad_o.float()
        parts = parts_of(problem, torch.get_num_threads())
        if parts == 1:
            return _backward(c, problem, grad_o, grad_state)
        summary = partial(_summary, states)
        fine = split(problem, parts, summary)
        *grads, dstate = _backward(c, fine, grad_o, split_gradient(fine, grad_o, grad_state, parts, summary))
        return (*grads, outermost(dstate, parts, 0))  # pyright: ignore[reportReturnType]

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        after: Tensor,
        scale: float,
    ) -> Tensor | None:
        """See gatecc.ops.linear_attention.kernels.Kernels. Written for speed: it is about as long as the kernel."""
        found = _reading(q, k, v, log_decay, beta, state)
        if found is None or not _is_plain(after):
            return None
        return _run_step(found, q, k, v, log_decay, beta, state, after, scale)

    def one_token(self) -> Step:
        """See gatecc.ops.linear_attention.kernels.Kernels. A call like the last one is not looked at again."""
        last: tuple[torch.Size, torch.Size, float | None, float | None, Reading, float, float] | None = None

        def one_token(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            log_decay: Tensor | None,
            beta: Tensor | None,
            state: Tensor,
            scale: float | None = None,
            normalizer: float | None = None,
        ) -> tuple[Tensor, Tensor] | None:
            nonlocal last
            if (
                last is not None
                and q.shape == last[0]
                and state.shape == last[1]
                and scale == last[2]
                and normalizer == last[3]
            ):
                plain = q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and state.is_contiguous()
                plain = plain and (log_decay is None or log_decay.is_contiguous())
                plain = plain and (beta is None or beta.is_contiguous())
                if not plain or q.dtype != torch.float32 or state.dtype != torch.float32:
                    return None
            else:
                found = _reading(q, k, v, log_decay, beta, state)
                if found is None:
                    return None
                factor = q.size(-1) ** -0.5 if scale is None else scale
                last = (q.shape, state.shape, scale, normalizer, found, factor, _inverse(normalizer))
            after = torch.empty_like(state)
            return _run_step(last[4], q, k, v, log_decay, beta, state, after, *last[5:]), after

        return one_token


class Reading(NamedTuple):
    """How the step kernel reads operands of known shapes. ``sizes``: jobs, the width of gates, and how many heads of q
    one head of k, v, the gates and beta serves; ``o``: the shape of the result."""

    function: Callable[[bytes], None]
    sizes: tuple[int, ...]
    o: tuple[int, ...]


def _reading(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> Reading | None:
    """None where the kernel cannot read the operands as they are."""
    B, H, Dk, Dv = state.shape
    token = (1,) if q.dim() == 4 else ()
    width = 0 if log_decay is None else log_decay.size(-1)
    groups = (
        _group(k, B, H, *token, Dk),
        _group(v, B, H, *token, Dv),
        1 if log_decay is None else _group(log_decay, B, H, *token, width) if width in (1, Dk) else 0,
        1 if beta is None else _group(beta, B, H, *token),
    )
    if _group(q, B, H, *token, Dk) != 1 or 0 in groups or not _is_plain(state):
        return None
    function = _stepper(log_decay is not None, beta is not None, Dk, Dv)
    return None if function is None else Reading(function, (B * H, width, *groups), (B, H, *token, Dv))


def _run_step(
    found: Reading,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    after: Tensor,
    scale: float,
    inverse: float = 0.0,
) -> Tensor:
    # The first is half as dear, and of the same shape unless heads of v serve several of q.
    o = torch.empty_like(v) if v.shape == found.o else q.new_empty(found.o)
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), _pointer(log_decay), _pointer(beta))
    outputs = (state.data_ptr(), after.data_ptr(), o.data_ptr())
    found.function(STEP.pack(*pointers, *outputs, *found.sizes, scale, inverse, torch.get_num_threads()))
    return o


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


def _group(x: Tensor, B: int, H: int, *channels: int) -> int:
    """How many of H heads one head of x: (B, H / group, channels) serves; 0 if the kernel cannot read x as it is."""
    shape = x.shape
    if not _is_plain(x):
        return 0
    if shape == (B, H, *channels):
        return 1
    fits = len(shape) == 2 + len(channels) and shape == (B, shape[1], *channels) and shape[1] and not H % shape[1]
    return H // shape[1] if fits else 0


@cache
def _stepper(gated: bool, delta: bool, Dk: int, Dv: int) -> Callable[[bytes], None] | None:
    if not 0 < Dk <= LARGEST or not 0 < Dv <= LARGEST:
        return None
    c = library(Spec("forward", gated, delta, Dk, Dv))
    return None if c is None else c.step


def _forward(c: ctypes.CDLL, p: Problem) -> tuple[Tensor, Tensor]:
    # The kernel rounds to bfloat16 itself; float16 has denormals that are better left to ATen.
    dtype = torch.bfloat16 if p.q.dtype == torch.bfloat16 else torch.float32
    o = room(p.q, p.v.size(3), dtype)
    final = p.new_state()
    _call(c.forward, p, o=o, final=final)
    return o, final


def _summary(c: ctypes.CDLL, p: Problem) -> tuple[Tensor, Tensor]:
    """The final states, (S, H, Dk, E), and the products of all gates, (S, H, Dk); no output is computed."""
    final = p.new_state()
    decay = final.new_empty(final.shape[:3])
    _call(c.forward, p, final=final, decay=decay)
    return final, decay


def _backward(c: ctypes.CDLL, p: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients:
    """Gradients in float32, each lying as its input does; those of heads that serve a group of queries are summed."""
    given = {"dq": p.q, "dk": p.k, "dv": p.v, "dg": p.log_decay, "dbeta": p.beta}
    rooms = {name: None if x is None else room(x, x.size(3), torch.float32, p.q.size(1)) for name, x in given.items()}
    dstate = p.new_state()
    _call(c.backward, p, grad_o=grad_o, grad_final=grad_state, dstate=dstate, **rooms)
    found = (
        None if x is None or g is None else _ungroup(g, x.size(1))
        for x, g in zip(given.values(), rooms.values(), strict=True)
    )
    return (*found, dstate)  # pyright: ignore[reportReturnType]


def _ungroup(grad: Tensor, heads: int) -> Tensor:
    """Gradients of heads that serve a group of queries: (B, H, N, D) -> (B, heads, N, D)."""
    return grad if grad.size(1) == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _tiles(p: Problem) -> ctypes.CDLL | None:
    """The kernels on matrix units, if they serve: numbers are bfloat16 there, rows whole, and chunks should be full."""
    if p.q.dtype != torch.bfloat16 or p.beta is not None or not has_matrix_units():
        return None
    whole = all(x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (p.q, p.k, p.v))
    if not whole or sum(length for *_, length in p.segments) < CHUNK * len(p.segments):
        return None
    return _library(p, "tiles")


@cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies tiles of bfloat16 (AMX)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _library(problem: Problem, part: Part) -> ctypes.CDLL | None:
    Dk, Dv = problem.q.size(3), problem.v.size(3)
    if problem.q.dtype not in TYPES or not 0 < Dk <= LARGEST or not 0 < Dv <= LARGEST:
        return None
    return library(Spec(part, problem.log_decay is not None, problem.beta is not None, Dk, Dv))


def _call(function: Callable[[bytes], None], p: Problem, **given: Tensor | None) -> None:
    """Call a kernel with ``struct problem`` of tokens.h; ``given`` are its fields beyond the problem's own."""
    heads = p.q.size(1)
    decay, beta = (x if x is None or x.dtype in TYPES else x.float() for x in (p.log_decay, p.beta))
    segments = array("q", (number for segment in p.segments for number in segment))
    operands = (_operand(x, heads) for x in (p.q, p.k, p.v, decay, beta, *map(given.get, WRITTEN)))
    pointers = (_pointer(given.get(name)) for name in POINTERS)
    sizes = (segments.buffer_info()[0], len(p.segments), heads, p.q.size(2), _pointer(p.state))
    options = (p.scale, _inverse(p.normalizer), p.reverse, torch.get_num_threads())
    function(b"".join((*operands, _TAIL.pack(*sizes, *pointers, *options))))


def _operand(x: Tensor | None, heads: int) -> bytes:
    if x is None:
        return _NOTHING
    group = heads // x.size(1)
    return _OPERAND.pack(x.data_ptr(), *x.stride(), TYPES[x.dtype], group, x.size(3))


def _inverse(normalizer: float | None) -> float:
    """As the headers have it: 0 for log decays."""
    return 0.0 if normalizer is None else 1 / normalizer


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


kernels.register("cpu", CpuKernels())
