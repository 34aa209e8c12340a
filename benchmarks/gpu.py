"""One run on a machine with a GPU: every kernel checked on the device, and timed against what others have.

``python benchmarks/gpu.py [--json FILE] [--seconds 420] [--rehearse]``. The JSON is what ``docs/kernels.md`` shows once
it is kept as ``docs/figures/gpu.json``. What does not fit into the time is left out by name. Without a GPU only
``--rehearse`` runs: kernels in Triton's interpreter, tiny sizes, no figure worth keeping.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatecc
from gatecc.codegen.judge.device import judge_on_device
from gatecc.codegen.judge.family import DTYPES, families
from gatecc.codegen.judge.numbers import Numbers, judge_numbers
from gatecc.ir.files import write_atomic
from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.moe_ffn.operator import moe_ffn

Work = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """One piece of work by several contenders: ``ours`` and others, or the reason why one does not take part."""

    what: str
    contenders: dict[str, Work | str]


@dataclass
class Result:
    """Milliseconds by contender, the median of several runs, and why others have none."""

    what: str
    milliseconds: dict[str, float] = field(default_factory=dict[str, float])
    absent: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Place:
    """Where and how large. ``small``: a rehearsal."""

    device: torch.device
    dtype: torch.dtype
    small: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def pick(self, full: int, rehearsal: int) -> int:
        return rehearsal if self.small else full


# --- correctness ------------------------------------------------------------------------------------------------------


def correctness(place: Place) -> Iterator[Numbers]:
    """Every case of every kernel in every dtype, on the device; in a rehearsal one case each, in the interpreter."""
    for family in families():
        for case in list(family.cases)[: 1 if place.small else None]:
            for dtype in DTYPES if not place.small else ("fp32",):
                try:
                    if place.small:
                        yield judge_numbers(family, case, dtype)
                    else:
                        yield judge_on_device(family, case, dtype, place.device)
                except Exception as e:  # one kernel that does not launch must not hide the others
                    yield Numbers(family.name, case, dtype, (), {}, (f"{type(e).__name__}: {e}"[:500],))


# --- races ------------------------------------------------------------------------------------------------------------


def attention(place: Place) -> Iterator[Race]:
    """Attention with a gate on its heads: compiled by gatecc and by Inductor, against attention without one."""
    B, H, D = place.pick(4, 1), place.pick(16, 2), place.pick(128, 16)
    for N in (2048, 8192) if not place.small else (32,):
        q, k, v, g = (place.randn(B, H, N, D) for _ in range(4))

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def gated(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = g) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True) * g.sigmoid()

        yield Race(
            f"gated attention, B={B} H={H} N={N} D={D}",
            {
                "ours": torch.compile(gated, backend="gatecc", mode=_mode(place)),
                "Inductor": torch.compile(gated, backend=_other(place)),
                "eager": gated,
                "attention without a gate": plain,
            },
        )


def linear(place: Place) -> Iterator[Race]:
    """All rules of linear attention, forward, backward and one token, against fla-core and flash attention."""
    B, H, D, N = place.pick(2, 1), place.pick(16, 1), place.pick(128, 16), place.pick(8192, 40)
    q, k, v = (place.randn(B, H, N, D) for _ in range(3))
    k = F.normalize(k, dim=-1)
    gate, head_gate = (F.logsigmoid(place.randn(B, H, N, width)) / 16 for width in (D, 1))
    beta = place.randn(B, H, N).sigmoid()
    rules: tuple[tuple[str, tuple[Tensor | None, ...], Any], ...] = (
        ("linear", (), ("linear_attn", "chunk_linear_attn", {"normalize": False})),
        ("gated", (gate,), ("gla", "chunk_gla", {})),
        ("one gate per head", (head_gate,), ("simple_gla", "chunk_simple_gla", {})),
        ("delta", (None, beta), ("delta_rule", "chunk_delta_rule", {})),
        ("gated delta", (head_gate, beta), ("gated_delta_rule", "chunk_gated_delta_rule", {})),
    )
    for rule, more, theirs in rules:
        calls: dict[str, Any] = {
            "ours": lambda *x: linear_attention(*x)[0],
            "fla-core": _fla(*theirs),
            "flash SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        tensors = (q, k, v, *more)
        for backward in (False, True):
            what = f"linear attention, {rule}, {'forward and backward' if backward else 'forward'}, "
            yield Race(
                f"{what}B={B} H={H} N={N} D={D}",
                {name: _call(call, name, tensors, backward=backward) for name, call in calls.items()},
            )
    state = torch.zeros(B, H, D, D, device=place.device)
    one = [x[:, :, 0].contiguous() for x in (q, k, v, gate)]

    def step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return linear_attention_step(q, k, v, gate, None, state)

    compiled = torch.compile(step, backend=_other(place))
    yield Race(
        f"linear attention, one token, B={B} H={H} D={D}",
        {
            "ours": _quietly(lambda: step(*one)),
            "ours, compiled": _quietly(lambda: compiled(*one)),
            "fla-core": _fla_step(one, state),
        },
    )


def experts(place: Place) -> Iterator[Race]:
    """Experts against the implementations of transformers on the same weights, forward and with a backward pass."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    d, hidden = place.pick(2048, 32), place.pick(1408, 48)
    for E, k in ((8, 2), (64, 8)) if not place.small else ((4, 2),):
        config = MixtralConfig(hidden_size=d, intermediate_size=hidden, num_local_experts=E)
        module: Any = MixtralExperts(config).to(place.device, place.dtype)
        for p in module.parameters():
            nn.init.normal_(p, std=d**-0.5)
        for T in (1, 64, 4096) if not place.small else (5,):
            x = place.randn(T, d)
            weights, indices = torch.rand(T, E, device=place.device).softmax(-1).topk(k)

            def ours(x: Tensor = x, w: Tensor = weights, i: Tensor = indices, m: Any = module) -> Tensor:
                return moe_ffn(x, w, i, m.gate_up_proj, m.down_proj)

            def theirs(
                name: str, x: Tensor = x, w: Tensor = weights, i: Tensor = indices, m: Any = module, c: Any = config
            ) -> Tensor:
                c._experts_implementation = name
                return m(x, i, w.to(x.dtype))

            runs: dict[str, Work] = {"ours": ours}
            runs |= {name: lambda name=name, run=theirs: run(name) for name in ("eager", "grouped_mm", "batched_mm")}
            yield Race(f"experts, E={E} k={k} T={T} d={d}, forward", {n: _quietly(f) for n, f in runs.items()})
            if T > 64 or place.small:
                learned = {n: lambda f=f, m=module: _differentiated(f(), list(m.parameters())) for n, f in runs.items()}
                yield Race(f"experts, E={E} k={k} T={T} d={d}, forward and backward", dict(learned))


def models(place: Place) -> Iterator[Race]:
    """Three whole models, prefill: gated attention, linear attention, experts; by gatecc, by Inductor, eager."""
    import transformers as hf

    size: dict[str, Any] = {
        "hidden_size": place.pick(1024, 32),
        "intermediate_size": place.pick(2816, 64),
        "num_hidden_layers": place.pick(8, 2),
        "num_attention_heads": place.pick(16, 2),
        "num_key_value_heads": place.pick(8, 2),
        "vocab_size": place.pick(32000, 64),
        "max_position_embeddings": 8192,
    }
    routed: dict[str, Any] = {
        "num_experts": place.pick(32, 4),
        "num_experts_per_tok": 4,
        "moe_intermediate_size": place.pick(704, 32),
        "head_dim": place.pick(64, 16),
    }
    N = place.pick(4096, 24)
    ids = torch.randint(0, size["vocab_size"], (place.pick(2, 1), N), device=place.device)
    example = {"input_ids": ids[:, : min(N, 64)].cpu()}
    for name, config, recipe in (
        ("Llama, gated attention", hf.LlamaConfig(**size), "gated-attention"),
        ("Llama, linear attention", hf.LlamaConfig(**size), "gla"),
        (
            "Qwen3-MoE",
            hf.Qwen3MoeConfig(**size, **routed),
            "",
        ),
    ):
        model: Any = hf.AutoModelForCausalLM.from_config(config).eval()
        if recipe:
            model = gatecc.transform(model, recipe, example)
        model = model.to(place.device, place.dtype)

        def run(f: Any, m: Any = model) -> Work:
            return _quietly(lambda: f(input_ids=ids, use_cache=False).logits)

        yield Race(
            f"{name}, prefill of {N} tokens",
            {
                "ours": run(torch.compile(model, backend="gatecc", mode=_mode(place))),
                "Inductor": run(torch.compile(model, backend=_other(place))),
                "eager": run(model),
            },
        )


SECTIONS = (attention, linear, experts, models)


def _mode(place: Place) -> str | None:
    return "aot_eager" if place.small else None


def _other(place: Place) -> str:
    return "aot_eager" if place.small else "inductor"


def _call(call: Any, name: str, tensors: tuple[Tensor | None, ...], *, backward: bool) -> Work | str:
    """A call with gradients of everything, or without any."""
    if isinstance(call, str):
        return call
    given = tensors[:3] if name == "flash SDPA" else tensors
    if name == "fla-core":
        given = tuple(_with_heads_last(x) for x in given)
    if not backward:
        return _quietly(lambda: call(*given))
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    return lambda: _differentiated(call(*leaves), [x for x in leaves if x is not None])


def _differentiated(y: Tensor, leaves: list[Tensor]) -> object:
    return torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)


def _quietly(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def _fla(module: str, name: str, options: dict[str, Any]) -> Callable[..., Tensor] | str:
    """A chunked form of fla-core."""
    try:
        found = getattr(__import__(f"fla.ops.{module}", fromlist=[name]), name)
    except (ImportError, AttributeError, RuntimeError) as e:
        return f"not there ({e})"

    return lambda *given: found(*(x for x in given if x is not None), **options)[0]


def _with_heads_last(x: Tensor | None) -> Tensor | None:
    """(B, H, N, ...) as fla-core has it, (B, N, H, ...), copied once; a gate per head has no last axis there."""
    if x is None:
        return None
    x = x.transpose(1, 2)
    return (x.squeeze(-1) if x.dim() == 4 and x.size(-1) == 1 else x).contiguous()


def _fla_step(one: list[Tensor], state: Tensor) -> Work | str:
    found = _fla("gla", "fused_recurrent_gla", {"initial_state": state, "output_final_state": True})
    return found if isinstance(found, str) else _quietly(lambda: found(*(x.unsqueeze(1) for x in one)))


# --- the run ----------------------------------------------------------------------------------------------------------


def timed(race: Race, place: Place) -> Result:
    """Each contender in turn. One that fails is absent, with its error."""
    result = Result(race.what)
    for name, work in race.contenders.items():
        if isinstance(work, str):
            result.absent[name] = work
            continue
        try:
            result.milliseconds[name] = _median(work, place)
        except Exception as e:  # out of memory, a kernel of others that this GPU lacks
            result.absent[name] = f"{type(e).__name__}: {e}"[:300]
    return result


def _median(work: Work, place: Place) -> float:
    """Median of up to 20 runs with cold caches, after two that compile; CPU time in a rehearsal."""
    work()
    if place.device.type != "cuda":
        start = time.process_time()
        work()
        return 1e3 * (time.process_time() - start)
    work()
    flush = torch.empty(1 << 28, dtype=torch.int8, device=place.device)  # larger than any L2
    found: list[float] = []
    until = time.monotonic() + 2
    while len(found) < 20 and (len(found) < 3 or time.monotonic() < until):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def main(argv: list[str] | None = None) -> None:
    """Run it; print tables, write the JSON, exit with 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=420, help="after that no race begins")
    parser.add_argument("--only", choices=[s.__name__ for s in SECTIONS], help="one kind of races, after the checks")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, to see that the script runs")
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("there is no GPU: --rehearse tries the script on the CPU")
    until = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.rehearse else "cuda")
    place = Place(device, torch.float32 if options.rehearse else torch.bfloat16, options.rehearse)
    torch.manual_seed(0)
    checks = list(correctness(place))
    results: list[Result] = []
    late: list[str] = []
    for section in SECTIONS:
        if options.only not in (None, section.__name__):
            continue
        try:
            for race in section(place):
                if time.monotonic() >= until:
                    late.append(race.what)
                    break
                results.append(timed(race, place))
                _show(results[-1])
        except Exception as e:  # the figures of the other sections are kept
            results.append(Result(section.__name__, absent={"all": f"{type(e).__name__}: {e}"[:500]}))
    data = _data(place, checks, results, late)
    write_atomic(options.json, json.dumps(data, indent=1) + "\n")
    wrong = [c for c in checks if c.faults]
    for c in wrong:
        print(f"{c.family}, {c.case}, {c.dtype}: {'; '.join(c.faults)}")
    print(f"{len(checks)} checks, {len(wrong)} wrong; left out for want of time: {', '.join(late) or 'nothing'}")
    if wrong:
        sys.exit(1)


def _data(place: Place, checks: list[Numbers], results: list[Result], late: list[str]) -> dict[str, Any]:
    cuda = place.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "none: a rehearsal on the CPU",
        "torch": torch.__version__,
        "dtype": str(place.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "checks": [asdict(check) for check in checks],
        "races": [asdict(r) for r in results],
        "late": late,
    }


def _show(result: Result) -> None:
    table = Table(title=result.what)
    for column in ("contender", "ms", "of ours"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    ours = result.milliseconds.get("ours")
    for name, ms in result.milliseconds.items():
        table.add_row(name, f"{ms:.4g}", "" if not ours else f"{ms / ours:.2f}")
    for name, why in result.absent.items():
        table.add_row(name, "", why)
    Console().print(table)


if __name__ == "__main__":
    main()
