"""One run on a machine with a GPU: every kernel checked on the device, and timed against what others have.

``python benchmarks/gpu.py [--json FILE] [--seconds 420] [--rehearse]``. The JSON is what ``docs/kernels.md`` shows once
it is kept as ``docs/figures/gpu.json``. What does not fit into the time is left out by name. Without a GPU only
``--rehearse`` runs: kernels in Triton's interpreter, tiny sizes, no figure worth keeping.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_attention import attention
from _races import Place, Race, Result, Work, call, differentiated, mode, other, quietly, show, timed
from torch import Tensor, nn

import gatecc
from gatecc.codegen.judge.device import judge_on_device
from gatecc.codegen.judge.family import families
from gatecc.codegen.judge.numbers import Numbers, judge_numbers
from gatecc.ir.files import write_atomic
from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.moe_ffn.operator import moe_ffn

# --- correctness ------------------------------------------------------------------------------------------------------


def correctness(place: Place) -> Iterator[Numbers]:
    """Every case of every kernel in every dtype, on the device; in a rehearsal one case each, in the interpreter."""
    for family in families():
        for case in list(family.cases)[: 1 if place.small else None]:
            for dtype in family.dtypes[: 1 if place.small else None]:
                try:
                    if place.small:
                        yield judge_numbers(family, case, dtype)
                    else:
                        yield judge_on_device(family, case, dtype, place.device)
                except Exception as e:  # one kernel that does not launch must not hide the others
                    yield Numbers(family.name, case, dtype, (), {}, (f"{type(e).__name__}: {e}"[:500],))


# --- races ------------------------------------------------------------------------------------------------------------


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
                {name: call(f, name, tensors, backward=backward) for name, f in calls.items()},
            )
    state = torch.zeros(B, H, D, D, device=place.device)
    one = [x[:, :, 0].contiguous() for x in (q, k, v, gate)]

    def step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return linear_attention_step(q, k, v, gate, None, state)

    compiled = torch.compile(step, backend=other(place))
    yield Race(
        f"linear attention, one token, B={B} H={H} D={D}",
        {
            "ours": quietly(lambda: step(*one)),
            "ours, compiled": quietly(lambda: compiled(*one)),
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
            yield Race(f"experts, E={E} k={k} T={T} d={d}, forward", {n: quietly(f) for n, f in runs.items()})
            if T > 64 or place.small:
                learned = {n: lambda f=f, m=module: differentiated(f(), list(m.parameters())) for n, f in runs.items()}
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
            return quietly(lambda: f(input_ids=ids, use_cache=False).logits)

        yield Race(
            f"{name}, prefill of {N} tokens",
            {
                "ours": run(torch.compile(model, backend="gatecc", mode=mode(place))),
                "Inductor": run(torch.compile(model, backend=other(place))),
                "eager": run(model),
            },
        )


def regions(place: Place) -> Iterator[Race]:
    """Parts of a graph as generated kernels, against what Inductor makes of them; forward and with a backward pass."""
    from gatecc.codegen.regions.build import build
    from gatecc.codegen.regions.judged import SAMPLES

    rows = place.pick(8192, 37)
    for name, sample in SAMPLES.items():
        tensors = tuple(x.to(place.device) for x in sample.tensors(rows, dtype=place.dtype))
        calls: dict[str, Any] = {
            "ours": build(sample.function, tensors, [f"a race: {name}"]).module.operator,
            "Inductor": torch.compile(sample.function, backend=other(place)),
            "eager": sample.function,
        }
        for backward in (False, True):
            what = f"region, {name}, {'forward and backward' if backward else 'forward'}, {rows} rows"
            firsts = {n: call(_first(f), n, tensors, backward=backward) for n, f in calls.items()}
            yield Race(what, firsts)


def _first(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Its first result, of which gradients are taken."""

    def run(*given: Any) -> Tensor:
        found = function(*given)
        return found if isinstance(found, Tensor) else found[0]

    return run


SECTIONS = (attention, linear, experts, models, regions)


def _fla(module: str, name: str, options: dict[str, Any]) -> Callable[..., Tensor] | str:
    """A chunked form of fla-core."""
    try:
        found = getattr(__import__(f"fla.ops.{module}", fromlist=[name]), name)
    except (ImportError, AttributeError, RuntimeError) as e:
        return f"not there ({e})"

    return lambda *given: found(*(x for x in given if x is not None), **options)[0]


def _fla_step(one: list[Tensor], state: Tensor) -> Work | str:
    found = _fla("gla", "fused_recurrent_gla", {"initial_state": state, "output_final_state": True})
    return found if isinstance(found, str) else quietly(lambda: found(*(x.unsqueeze(1) for x in one)))


# --- the run ----------------------------------------------------------------------------------------------------------


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
                show(results[-1])
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


if __name__ == "__main__":
    main()
