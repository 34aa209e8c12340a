"""Loops over tokens in transformers' own code, replaced by ``gatecc::linear_attention`` during a capture.

transformers spells state space models and delta rules as Python loops over tokens or chunks, which fix the length of a
graph. All of them are linear attention: Mamba has one head per channel, with values of width 1 and a decay per state
(Gu & Dao 2023), Mamba-2 one decay per head (Dao & Gu 2024), gated delta nets the gated delta rule (Yang et al. 2025).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.ops.linear_attention import linear_attention

Loop = Callable[..., Any]
_ALLOWED = 1e-4  # of the largest output: chunked forms in float32 differ by 1e-6


@contextmanager
def transformers_loops(model: nn.Module) -> Generator[list[str]]:
    """Let the loops that the modules of ``model`` call be one operator each; the names of those that are.

    A loop is known by its name in a module of transformers; it is replaced once both have given the same numbers on
    random inputs, and only for calls that start from no state. What is not known stays as it is.
    """
    names = {kind.__module__ for m in model.modules() for kind in type(m).__mro__}
    loops: list[str] = []
    with ExitStack() as stack:
        for name in sorted(names):
            if name.startswith("transformers.") and name in sys.modules:
                loops += stack.enter_context(_replaced(sys.modules[name]))
        yield loops


@contextmanager
def _replaced(holder: Any) -> Generator[list[str]]:
    """The known loops of one Python module replaced."""
    found = {name: getattr(holder, name) for name in _LOOPS if callable(getattr(holder, name, None))}
    equal = [name for name, loop in found.items() if _equal(loop, name)]
    try:
        for name in equal:
            setattr(holder, name, _operator(found[name], name))
        yield equal
    finally:
        for name, loop in found.items():
            setattr(holder, name, loop)


def _operator(loop: Loop, name: str) -> Loop:
    """A function in the place of ``loop``; calls with arguments that the operator's form does not know go to it."""
    known = inspect.signature(_LOOPS[name][0]).parameters
    signature = inspect.signature(loop)

    @functools.wraps(loop)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given |= {key: value for key, value in given.pop("kwargs", {}).items() if key in _PACKED}  # it ignores others
        if any(value is not None for key, value in given.items() if key not in known and key not in _SAFE):
            return loop(*args, **kwargs)
        return _LOOPS[name][0](**{key: value for key, value in given.items() if key in known})

    return called


@functools.cache
def _equal(loop: Loop, name: str) -> bool:
    """Whether a loop computes what the operator does, on random inputs longer than a chunk."""
    said, example = _LOOPS[name]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = example()
        try:
            expected, got = loop(**given), said(**given)
        except (TypeError, ValueError, RuntimeError):
            return False
    pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    return all(x.shape == y.shape and x.dtype == y.dtype and _close(x, y) for x, y in pairs)


def _close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).abs().max() <= _ALLOWED * x.abs().max())


# --- the forms of the operator --------------------------------------------------------------------------------------


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Mamba. hidden_states, dt, z: (B, C, N); A: (C, S); B, C: (B, S, N); D, delta_bias: (C,) -> (B, C, N).

    Each channel is a head with a state of S x 1; its decay is exp(A dt).
    """
    given = hidden_states.dtype
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    queries, keys = (x.mT.unsqueeze(1).float() for x in (C, B))  # (B, 1, N, S)
    queries = queries.expand(-1, hidden_states.size(1), -1, -1)
    values = (dt.float() * hidden_states.float()).unsqueeze(-1)
    decay = A.float()[:, None] * dt.float().unsqueeze(-1)  # (B, C, N, S)
    o, state = linear_attention(queries, keys, values, decay, scale=1.0)
    o = o.squeeze(-1).to(given)
    o = o if D is None else o + hidden_states * D[:, None]
    o = o if z is None else o * F.silu(z)
    return (o, state.squeeze(-1)) if return_last_state else o


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """Mamba-2. hidden_states: (B, N, H, P); dt: (B, N, H); A, D, dt_bias: (H,); B, C: (B, N, G, S) -> (B, N, H, P)."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit).float()
    x, heads = hidden_states.float(), hidden_states.size(2)
    queries = _repeated(C.float().transpose(1, 2), heads)
    keys, values = B.float().transpose(1, 2), (x * dt[..., None]).transpose(1, 2)
    decay = (A.float() * dt).transpose(1, 2).unsqueeze(-1)  # (B, H, N, 1)
    o, state = linear_attention(queries, keys, values, decay, scale=1.0)
    o = o.transpose(1, 2)
    o = (o if D is None else o + D[..., None] * x).contiguous()
    return (o, state.mT) if return_final_states else o


def chunk_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> Any:
    """Gated delta net. query, key: (B, N, Hk, Dk); value: (B, N, H, Dv); g, beta: (B, N, H) -> (B, N, H, Dv)."""
    given = query.dtype
    query, key, value, g, beta = (x.float().transpose(1, 2) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    o, state = linear_attention(_repeated(query, value.size(1)), key, value, g.unsqueeze(-1), beta)
    return o.transpose(1, 2).to(given).contiguous(), state if output_final_state else None


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """x: (B, G, N, D) -> (B, H, N, D), each for its group of heads."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)


# --- examples to compare them on ------------------------------------------------------------------------------------


def _scan_example() -> dict[str, Any]:
    x, dt, z = (torch.randn(2, 3, 70) for _ in range(3))
    keys, queries = torch.randn(2, 4, 70), torch.randn(2, 4, 70)
    rates, skip, bias = -torch.rand(3, 4) * 4, torch.randn(3), torch.randn(3)
    options: dict[str, Any] = {"delta_bias": bias, "delta_softplus": True, "return_last_state": True}
    return {"hidden_states": x, "dt": dt, "A": rates, "B": keys, "C": queries, "D": skip, "z": z, **options}


def _chunk_example() -> dict[str, Any]:
    x, dt, rates = torch.randn(2, 70, 4, 3), torch.randn(2, 70, 4), -torch.rand(4) * 4
    keys, queries, skip, bias = torch.randn(2, 70, 2, 5), torch.randn(2, 70, 2, 5), torch.randn(4), torch.randn(4)
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.01, 1.0), "return_final_states": True}
    mixed = {"hidden_states": x, "dt": dt, "A": rates, "B": keys, "C": queries, "D": skip, "dt_bias": bias}
    return {**mixed, "chunk_size": 16, **options}


def _delta_example() -> dict[str, Any]:
    query, key, value = torch.randn(2, 70, 2, 5), torch.randn(2, 70, 2, 5), torch.randn(2, 70, 4, 3)
    options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    g, beta = F.logsigmoid(torch.randn(2, 70, 4)), torch.rand(2, 70, 4)
    return {"query": query, "key": key, "value": value, "g": g, "beta": beta, **options}


_LOOPS: dict[str, tuple[Loop, Callable[[], dict[str, Any]]]] = {
    "mamba_selective_scan": (selective_scan, _scan_example),
    "mamba2_chunk_scan": (chunk_scan, _chunk_example),
    "torch_chunk_gated_delta_rule": (chunk_delta_rule, _delta_example),
}
_SAFE = frozenset(("use_mambapy", "use_associative_scan"))  # other ways to the same numbers
_PACKED = frozenset(("cu_seqlens", "seq_idx"))
