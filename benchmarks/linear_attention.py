"""gatecc::linear_attention on one CPU thread against SDPA, ONNX Runtime's operator, other lengths, and float64.

``python benchmarks/linear_attention.py [--check] [--short]``. B = 1, head size 64, 8 heads (4 at 32768 tokens), gates
logsigmoid / 16. Ratios are of CPU times taken in turn in this run. The bars for bfloat16 were set on a CPU without
matrix units (AMX). Where there are some both sides use them, and SDPA, which is mostly products, gains more by them.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _table import Row, best_of, main
from torch import Tensor

from gatecc.codegen.c import build
from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.linear_attention.c.kernels import STEP, Part, Spec, has_matrix_units, library
from gatecc.ops.linear_attention.registration import bound

D = 64
FORWARD = {torch.float32: {512: 5, 2048: 12, 8192: 40, 32768: 130}, torch.bfloat16: {512: 8, 2048: 15, 8192: 54}}
HARD = {"ratio to SDPA, 512": 7.0, "float32 / bfloat16": 1.5}
LONGEST = 2048 if "--short" in sys.argv else 32768


def inputs(N: int, H: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and log decays."""
    q, k, v, x = (torch.randn(1, H, N, D) for _ in range(4))
    return [t.to(dtype) for t in (q, k, v, F.logsigmoid(x) / 16)]


def forward() -> Iterator[Row]:
    """Forward passes against SDPA."""
    for dtype, bars in FORWARD.items():
        short = str(dtype).removeprefix("torch.")
        for N, bar in bars.items():
            if N > LONGEST:
                continue
            H = 4 if N > 8192 else 8
            q, k, v, g = inputs(N, H, dtype)
            sdpa, ours = best_of(
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                lambda q=q, k=k, v=v, g=g: linear_attention(q, k, v, g),
                repeats={512: 100, 2048: 16, 8192: 3}.get(N, 1),
            )
            if N > 8192:  # SDPA runs once, for it takes seconds; ours several times
                (ours,) = best_of(lambda q=q, k=k, v=v, g=g: linear_attention(q, k, v, g), repeats=12)
            yield Row(f"{short} N={N}: SDPA / ours", sdpa / ours, bar, at_most=False)
            yield Row(f"{short} N={N}", 1e9 * ours / (N * H), unit="ns a token and head")
            if dtype == torch.float32 and N == 512:
                yield Row("hard goal: SDPA / ours, 512", sdpa / ours, HARD["ratio to SDPA, 512"], at_most=False)


def proportions() -> Iterator[Row]:
    """Our forward passes against each other, taken in turn: by dtype and by length."""
    single, half, long = inputs(2048), inputs(2048, dtype=torch.bfloat16), inputs(LONGEST, 4)
    works = [lambda x=x: linear_attention(*x) for x in (single, half, long)]
    one, other, longest = best_of(*works, repeats=20)
    yield Row("hard goal: float32 / bfloat16", one / other, HARD["float32 / bfloat16"], at_most=False)
    if LONGEST > 2048:
        yield Row(f"time a token, {LONGEST} / 2048", (longest / (4 * LONGEST)) / (one / (8 * 2048)), 1.1)


def arithmetic() -> Iterator[Row]:
    """The rate of the forward pass, in multiply-adds of the plain recurrence (3 Dk Dv per token and head), against that
    of a product of 1536 x 1536 matrices, which is about what the CPU can do."""
    a, b, out = (torch.randn(1536, 1536) for _ in range(3))
    for N in (512, 2048, 8192, 32768):
        if N > LONGEST:
            continue
        H = 4 if N > 8192 else 8
        x = inputs(N, H)
        # Each by itself for a while: the product leaves nothing of the others' operands in the caches.
        rounds = [
            (
                best_of(lambda: torch.mm(a, b, out=out), repeats=4)[0],
                best_of(lambda x=x: linear_attention(*x), repeats=max(3, 40960 // N))[0],
            )
            for _ in range(4)
        ]
        product, ours = (min(times) for times in zip(*rounds, strict=True))
        share = 3 * D * D * N * H / ours / (1536**3 / product)
        yield Row(f"float32 N={N}: share of its own arithmetic", share, 0.8, at_most=False)


def backward() -> Iterator[Row]:
    """Forward and backward passes against SDPA's."""
    q, k, v, g = (x.requires_grad_() for x in inputs(2048))
    grad = torch.randn(1, 8, 2048, D)
    sdpa, ours = best_of(
        lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad),
        lambda: torch.autograd.grad(linear_attention(q, k, v, g)[0], (q, k, v, g), grad),
        repeats=12,
    )
    yield Row("forward + backward N=2048: SDPA / ours", sdpa / ours, 10, at_most=False)
    yield Row("forward + backward N=2048", 1e3 * ours, unit="ms")


def onnxruntime_session(N: int) -> Any:
    """A model of the contributed operator alone, on (1, N, 8 * D)."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    node = helper.make_node(
        "LinearAttention", ["q", "k", "v", "s", "g"], ["o", "s2"], domain="com.microsoft", q_num_heads=8,
        kv_num_heads=8, update_rule="gated", scale=D**-0.5,
    )  # fmt: skip
    sizes = {**{name: [1, N, 8 * D] for name in "qkvg"}, "s": [1, 8, D, D], "o": [1, N, 8 * D], "s2": [1, 8, D, D]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()}
    graph = helper.make_graph([node], "g", [values[n] for n in "qkvsg"], [values[n] for n in ("o", "s2")])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def against_onnxruntime() -> Iterator[Row]:
    """The same recurrence by ONNX Runtime's CPU kernel."""
    if importlib.util.find_spec("onnxruntime") is None:
        print("onnxruntime is not installed: its rows are left out")
        return
    for N in (512, 2048):
        q, k, v, g = inputs(N)
        feed = {n: x.transpose(1, 2).flatten(2).contiguous().numpy() for n, x in zip("qkvg", (q, k, v, g), strict=True)}
        feed["s"] = torch.zeros(1, 8, D, D).numpy()
        session = onnxruntime_session(N)
        theirs = torch.from_numpy(session.run(None, feed)[0]).unflatten(2, (8, D)).transpose(1, 2)
        torch.testing.assert_close(theirs, linear_attention(q, k, v, g)[0], atol=1e-4, rtol=1e-4)
        ort_s, ours = best_of(
            lambda s=session, f=feed: s.run(None, f), lambda x=(q, k, v, g): linear_attention(*x), repeats=10
        )
        yield Row(f"float32 N={N}: ONNX Runtime / ours", ort_s / ours, 2.5, at_most=False)


def decoding() -> Iterator[Row]:
    """One token: the kernel alone, and the call from Python."""
    q, k, v, g = (x[:, :, 0].contiguous() for x in inputs(1))
    state, o = torch.zeros(1, 8, D, D), torch.empty(1, 8, D)
    c = library(Spec("forward", True, False, D, D))
    assert c is not None
    pointers = (
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        0,
        state.data_ptr(),
        state.data_ptr(),
        o.data_ptr(),
    )
    packed = STEP.pack(*pointers, 8, D, 1, 1, 1, 1, D**-0.5, 0.0, 1)
    many = range(2000)
    step, operator = bound(), torch.ops.gatecc.linear_attention_step.default
    token = [x.unsqueeze(2) for x in (q, k, v, g)]

    def handed_on() -> None:
        """As a decoder does: each step from the state of the last one, which nobody keeps."""
        held = state
        for _ in many:
            _, held = step(*token, None, held)

    def repeated(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in many:
                work()

        return run

    kernel, call, through, in_decoder = best_of(
        repeated(lambda: c.step(packed)),
        repeated(lambda: linear_attention_step(q, k, v, g, None, state)),
        repeated(lambda: operator(q, k, v, g, None, state)),
        handed_on,
        repeats=20,
    )
    yield Row("decode step, kernel", 1e6 * kernel / len(many), 5, unit="µs")
    yield Row("decode step, call from Python", 1e6 * call / len(many), 15, unit="µs")
    yield Row("decode step, through torch.ops", 1e6 * through / len(many), 15, unit="µs")
    yield Row("decode step, the decoder's bound call", 1e6 * in_decoder / len(many), 8, unit="µs")


def accuracy() -> Iterator[Row]:
    """The worst of all decays and lengths, against float64."""
    x = torch.randn(1, 2, 1000, D)
    rare = torch.rand(x.shape) < 0.1
    kinds = {
        "logsigmoid / 16": F.logsigmoid(x) / 16,
        "-3": torch.full_like(x, -3.0),
        "-12": torch.full_like(x, -12.0),
        "-40 and -0.01": torch.where(rare, -40.0, -0.01),
        "0 and e^-0.01": torch.where(rare, -torch.inf, -0.01),
        "1": torch.zeros_like(x),
    }
    for name, decay in kinds.items():
        worst_o = worst_g = 0.0
        for N in (1, 63, 64, 65, 1000):
            q, k, v, _ = inputs(N, 2)
            single = [t.clone().requires_grad_() for t in (q, k, v, decay[:, :, :N])]
            double = [t.double().requires_grad_() for t in (q, k, v, decay[:, :, :N])]
            (o, _), (truth, _) = linear_attention(*single), linear_attention(*double)
            worst_o = max(worst_o, _relative(o.detach(), truth.detach()))
            weight = torch.randn_like(o)
            found = torch.autograd.grad(o, single, weight)
            exact = torch.autograd.grad(truth, double, weight.double())
            worst_g = max(worst_g, *(_relative(a, b) for a, b in zip(found, exact, strict=True)))
        yield Row(f"error of o, decay {name}", worst_o, 1e-5)
        yield Row(f"error of gradients, decay {name}", worst_g, 1e-4)


def _relative(found: Tensor, truth: Tensor) -> float:
    error = (found.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(nan=float("inf")))


def building() -> Iterator[Row]:
    """A kernel built into an empty cache (CPU time of the compiler), and found there again."""
    kept = os.environ.get("GATECC_CACHE")
    try:
        parts: tuple[Part, ...] = ("forward", "backward", "tiles")
        for part in parts[: 2 + has_matrix_units()]:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["GATECC_CACHE"] = folder
                source = Spec(part, True, part != "tiles", D, D).source()
                yield Row(f"build, {part}", _build_seconds(source), 2, unit="s")
                assert len(list(Path(folder).iterdir())) == 1
                again = statistics.median(_build_seconds(source) for _ in range(5))
                yield Row(f"build, {part}, again", again, 0.02, unit="s")
    finally:
        os.environ.pop("GATECC_CACHE")
        if kept is not None:
            os.environ["GATECC_CACHE"] = kept


def _build_seconds(source: str) -> float:
    def spent() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = spent()
    assert build.load(source) is not None
    return spent() - start


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    torch.manual_seed(0)
    for part in (building, forward, arithmetic, proportions, backward, against_onnxruntime, decoding, accuracy):
        yield from part()


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--short"]
    main("linear_attention", lambda: list(measure()), arguments)
