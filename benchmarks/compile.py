"""Models compiled by gatecc against the same models compiled by Inductor.

``python benchmarks/compile.py [--check] [--only 'llama*'] [--parts speed,gradients,sizes]``; ``--list`` names them all.

speed: both compiled for inference, run in turn, with Inductor a second time as the control; a model in which nothing is
lowered is the same graph, which is asserted, and is not timed. The first calls are compared too, each compiled from
nothing, and so are the errors against float64. gradients: the errors of the gradients of a compiled step. sizes: the
compilations of six lengths and three batches. A compilation takes 5 to 40 s, so ``--only`` is what one uses.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._inductor.config as inductor
from _compile_models import BARS, CASES, Case
from _table import Row, best_of, main
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gatecc import backend

PARTS = ("speed", "gradients", "sizes")
REPEATS = 9
ERROR = 2.0  # times Inductor's own, against float64
FIRST_CALL = 1.15
GATED = 1.05  # times the time of plain attention
EPSILON = 1e-7  # of float32: errors below are no errors
# The second differs from the first in both: Dynamo takes a size for fixed until it has changed once.
SIZES = [(2 + i % 3, 32 + 16 * ((i + i // 6) % 6)) for i in range(18)]


def measure(only: str, parts: Sequence[str]) -> Iterator[Row]:
    """The rows of the benchmark."""
    inductor.compile_threads = 1
    first_uses()
    speeds: dict[str, list[float]] = {}
    first: list[float] = []
    for case in CASES:
        if fnmatch.fnmatch(case.name, only):
            print(f"{case.name} ...", file=sys.stderr)
            for part in parts:
                for row in MEASURES[part](case):
                    yield row
                    if row.what == case.name:
                        speeds.setdefault(case.kind, []).append(row.figure)
                    if row.what.endswith(": first call"):
                        first.append(row.figure)
    for kind, values in speeds.items():
        yield Row(f"geometric mean, {kind}", mean(values), unit="x")
    values = [v for kind, of in speeds.items() if kind != "linear attention" for v in of]
    everything = [v for of in speeds.values() for v in of]
    if values:
        yield Row("geometric mean without linear attention", mean(values), unit="x")
        yield Row("geometric mean of all", mean(everything), unit="x")
    if first:
        yield Row("first call, geometric mean", mean(first), FIRST_CALL, unit="x")


def speed(case: Case) -> Iterator[Row]:
    """Speed against Inductor, first calls, errors."""
    model, inputs = built(case)
    with torch.no_grad():
        if not lowered(model, inputs):
            yield Row(case.name, 1.0, BARS[case.kind], at_most=False, unit="x (the same graph)")
            return
        plain, plain_s = first_call(model, inputs, "inductor")
        ours, ours_s = first_call(model, inputs, "gatecc")
        a, b, again = best_of(plain, ours, plain, repeats=REPEATS)
        yield Row(case.name, min(a, again) / b, BARS[case.kind], at_most=False, unit="x")
        yield Row(f"{case.name}: control", a / again, unit="x")
        yield Row(f"{case.name}: first call", ours_s / plain_s, unit="x")
        exact = leaves(in_double(model)(**double(inputs)))
        yield Row(f"{case.name}: error", ratio(leaves(ours()), leaves(plain()), exact), ERROR, unit="x Inductor's")
        if case.plain is not None:
            other, other_inputs = built(case, case.plain)
            ungated, _ = first_call(other, other_inputs, "inductor")
            before, after = best_of(ungated, ours, repeats=REPEATS)
            yield Row(f"{case.name}: time against no gate", after / before, GATED, unit="x")


def gradients(case: Case) -> Iterator[Row]:
    """The error of a compiled step's gradients."""
    model, inputs = built(case)
    if not lowered(model, inputs):
        return
    exact = step(in_double(model), double(inputs))
    plain = step(torch.compile(model), inputs)
    torch._dynamo.reset()
    ours = step(torch.compile(model, backend="gatecc"), inputs)
    yield Row(f"{case.name}: error of gradients", ratio(ours, plain, exact), ERROR, unit="x Inductor's")


def sizes(case: Case) -> Iterator[Row]:
    """Compilations over lengths and batches, for models of one sequence of tokens."""
    model, inputs = built(case)
    (name, value), *_ = inputs.items()
    if value.dim() != 2:
        return
    compiled: list[bool] = []

    def counting(graph_module: Any, example: Any) -> Callable[..., Any]:
        compiled.append(True)
        return backend.gatecc(graph_module, example, mode="aot_eager")

    counting.__module__ = backend.__name__
    torch._dynamo.reset()
    function = torch.compile(model, backend=counting)
    with torch.no_grad():
        function(**inputs)
        graphs = len(compiled)  # of one size
        compiled.clear()
        torch._dynamo.reset()
        for batch, length in SIZES:
            function(**{**inputs, name: value.new_ones(batch, length)})
    yield Row(f"{case.name}: compilations of {len(SIZES)} sizes", len(compiled) / graphs, 2)


MEASURES: dict[str, Callable[[Case], Iterator[Row]]] = {"speed": speed, "gradients": gradients, "sizes": sizes}


def built(case: Case, make: Callable[[], tuple[nn.Module, dict[str, Any]]] | None = None) -> Any:
    """The model and its inputs, of one random state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    return (make or case.make)()


def lowered(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether anything is lowered. Every graph in which nothing is must be the very one that came in."""
    changed: list[bool] = []

    def look(graph_module: Any, example: Any) -> Callable[..., Any]:
        result = backend.lower(graph_module, example)
        changed.append(any(outcome.became for outcome in result.outcomes))
        assert changed[-1] == (result.graph is not graph_module), "a graph in which nothing was lowered was changed"
        return graph_module.forward

    look.__module__ = backend.__name__  # loops over experts ask whose backend traces them
    torch.compile(model, backend=look)(**inputs)
    torch._dynamo.reset()
    return any(changed)


def first_call(model: nn.Module, inputs: dict[str, Any], name: str) -> tuple[Callable[[], Any], float]:
    """A compiled model as a function, and the CPU time of its first call, the compiler's included."""
    compiled = torch.compile(model, backend=name)

    def call() -> Any:
        return compiled(**inputs)

    with inductor.patch(force_disable_caches=True):
        start = cpu()
        call()
        return call, cpu() - start


def first_uses() -> None:
    """What each compiler pays once per process (imports, its header), so that no model's first call holds it."""
    # Not in eval mode, where the layer is one operator of torch and Inductor compiles nothing.
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    small = nn.Sequential(layer, nn.Softmax(-1))
    with torch.no_grad():
        for name in ("inductor", "gatecc"):
            first_call(small, {"input": torch.rand(2, 64, 64)}, name)
            torch._dynamo.reset()


def cpu() -> float:
    """CPU time of this process and of those that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def step(function: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The gradients of all parameters."""
    model = getattr(function, "_orig_mod", function)
    model.zero_grad()
    torch.stack([leaf.square().mean() for leaf in leaves(function(**inputs))]).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def leaves(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def in_double(model: nn.Module) -> nn.Module:
    """A copy in float64; experts run in a loop, for the grouped product of torch knows no float64."""
    other = copy.deepcopy(model).double()
    for module in other.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None):
            config._experts_implementation = "eager"
    return other


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs in float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def ratio(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """How many times larger our error is, in the norm over all tensors."""
    errors = [norm([a - e for a, e in zip(of, exact, strict=True)]) for of in (ours, plain)]
    floor = EPSILON * norm(exact)
    return max(errors[0], floor) / max(errors[1], floor)


def norm(tensors: list[torch.Tensor]) -> float:
    """The norm of all elements."""
    return math.sqrt(sum(float(t.norm()) ** 2 for t in tensors))


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", default="*")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--list", action="store_true")
    options, rest = parser.parse_known_args()
    if options.list:
        print(*(f"{case.kind:20} {case.name}" for case in CASES), sep="\n")
    else:
        main("compile", lambda: list(measure(options.only, options.parts.split(","))), rest)
