"""Sites of a model through export and through the compile backend: `python -m tests.acceptance.backend_sites [WORD]`.

Shows the variants of the zoo whose id has one of the words in it; without any, those of BAR.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gatecc.capture import capture
from gatecc.capture.adapters import adapted
from gatecc.capture.dynamo import dynamo_program, has_nested_graphs
from gatecc.capture.export import dynamic_axes
from gatecc.errors import CaptureError
from gatecc.ir.program import Program
from gatecc.ir.site import Attention, Site
from gatecc.pipeline import canonical_form, prepare
from tests.zoo import Case, variants

FEW = ("hf/gpt2-eager", "torch/mha_weights", "hand/gqa_einsum", "timm/vit-sdpa")  # in every run of the tests
BAR = tuple(
    """
    hf/llama-sdpa hf/llama_padded-eager hf/qwen3-eager hf/gemma2-eager hf/gpt2-eager hf/mpt-eager hf/bloom-eager
    hf/falcon-sdpa hf/opt-sdpa hf/mixtral-sdpa hf/qwen2_moe-eager hf/gpt_oss-eager hf/deepseek_v3-sdpa
    hf/bert_padded-sdpa hf/albert-sdpa hf/xlnet-eager hf/modernbert-sdpa hf/t5-sdpa hf/whisper-sdpa hf/vit-sdpa
    hf/swin-eager timm/vit-sdpa timm/cait-sdpa timm/swinv2 timm/convnext timm/xcit-sdpa torchvision/resnet18
    torch/encoder_causal torch/decoder torch/mha_weights hand/gqa_einsum hand/no_dense_mixture hand/manual_softmax
    hand/alibi hand/sliding hand/padded_causal hand/packed
    """.split()
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Doors:
    """What one model shows through both: a row for each site. ``graphs``: how many Dynamo made."""

    exported: Sequence[Row]
    compiled: Sequence[Row]
    graphs: int

    @property
    def differences(self) -> list[str]:
        """What one door shows and the other does not."""
        sides = [{(row["kind"], row["key"]): row for row in rows} for rows in (self.exported, self.compiled)]
        found: list[str] = []
        for place in dict.fromkeys((*sides[0], *sides[1])):
            one, other = (side.get(place, {}) for side in sides)
            what = [f"{k} {one.get(k)} / {other.get(k)}" for k in one | other if one.get(k) != other.get(k)]
            missing = "backend only" if not one else "export only"
            found += [f"{' '.join(place)}: {'; '.join(what) if one and other else missing}"] if what else []
        return found

    @property
    def equal(self) -> bool:
        return self.graphs == 1 and list(self.exported) == list(self.compiled)


def both_doors(case: Case) -> Doors:
    """Find the sites of one model both ways. Raises CaptureError if torch.export cannot capture it as a whole."""
    with torch.no_grad():
        exported = sites_of(capture(case.model, case.args, case.kwargs))
        programs = compiled_programs(case.model, case.args, case.kwargs)
    rows = [row for program in programs for row in sites_of(program, canonical=True)]
    return Doors(exported, rows, len(programs))


def compiled_programs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Program]:
    """The programs in which the backend looks for what to lower, with the free sizes that an export has."""
    programs: list[Program] = []

    def collect(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not has_nested_graphs(graph_module):
            programs.append(canonical_form(dynamo_program(graph_module, inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    axes = dynamic_axes(model)
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor):
            for axis in axes(x):
                torch._dynamo.maybe_mark_dynamic(x, axis)
    with adapted(model):
        torch.compile(model, backend=collect)(*args, **kwargs)
    return programs


def sites_of(program: Program, *, canonical: bool = False) -> list[Row]:
    """The sites of a program, without their nodes, by kind and key.

    How a mask is built may differ, and with it the note on its proof: transformers asks who is tracing, and leaves a
    mask that hides nothing, or is causal by itself, to the operator. What it hides may not. The names of a model's
    inputs and outputs are those of its call, which Dynamo does not keep.
    """
    rows = [_row(site) for site in prepare(program, canonical=canonical).found if site.is_part]
    return sorted(rows, key=lambda row: (row["kind"], row["key"]))


def _row(site: Site) -> Row:
    stages = {name: str(value.axes) for name, value in site.values.items() if not name.startswith("mask")}
    skipped = ("values", "line", "mask_whole")
    rest = {k: v for k, v in vars(site).items() if not _holds_nodes(v) and k not in skipped}
    if isinstance(site, Attention):
        rest["mask"] = replace(site.mask, reason="")
    return {"kind": site.kind, "key": site.key, "stages": stages, **rest}


def _holds_nodes(value: object) -> bool:
    if isinstance(value, tuple):
        return any(map(_holds_nodes, value))
    return isinstance(value, fx.Node) or any(isinstance(v, fx.Node) for v in getattr(value, "__dict__", {}).values())


def main(words: Sequence[str]) -> int:
    """Print a line for each model; how many are not equal."""
    chosen = [(n, spec) for n, spec in variants() if (any(word in n for word in words) if words else n in BAR)]
    print(f"{'model':<34}{'export':>8}{'backend':>9}  equal")
    failed = 0
    for name, spec in chosen:
        try:
            doors = both_doors(spec.build())
        except CaptureError as e:
            print(f"{name:<34}{'-':>8}{'-':>9}  not captured as a whole: {e.found}"[:120])
            continue
        said = "yes" if doors.equal else f"no, {doors.graphs} graphs"
        print(f"{name:<34}{len(doors.exported):>8}{len(doors.compiled):>9}  {said}", flush=True)
        failed += not doors.equal
        for line in [] if doors.equal else doors.differences:
            print(f"    {line}")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
