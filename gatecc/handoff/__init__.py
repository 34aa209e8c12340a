"""Hand-off: a rewritten model as a stock architecture of transformers, for the engines that people run.

`to_transformers` writes configuration and weights of the class that computes what the model does, reads them back
through transformers and compares; where no class does, it says what does not fit, and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gatecc.capture.compiled import behind
from gatecc.capture.shield import shielded
from gatecc.engine.analyse import Inputs, check_model, evaluation
from gatecc.errors import ArgumentError, HandoffError, MissingPackageError, UnsupportedModelError
from gatecc.handoff.source import Source, read
from gatecc.handoff.target import TARGETS, Target
from gatecc.handoff.unfit import UnfitError
from gatecc.handoff.write import HandedOff as HandedOff
from gatecc.handoff.write import handed_off
from gatecc.ir.discover import discover

# Architectures that are asked for, and that no dense model with usual attention can become.
_APART = {
    "olmoe": "it normalises queries and keys over their full width before the heads are split, and no dense "
    "architecture of transformers does so on the inputs of its layers: OLMo 2, which normalises results too, is "
    "written as flex_olmo",
    "deepseek_v3": "its keys and values come from one normalised latent (MLA), which no attention with k_proj and "
    "v_proj computes: experts that a sigmoid chooses are written as glm4_moe",
}

discover("gatecc.handoff.targets", [str(Path(__file__).parent / "targets")])


@shielded
def to_transformers(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    target: str | None = None,
    example_inputs: Inputs | None = None,
) -> HandedOff:
    """Write a rewritten model of transformers as the architecture that computes the same: an upcycled Llama as Mixtral.

    The first class that fits is taken, or ``target``, its model_type ("mixtral", "qwen2_moe", ...). What was written is
    loaded again by transformers and compared with the model on ``example_inputs`` (token ids that are drawn, if there
    are none), plain, padded and in `generate`, before the folder is there. Weights may be written scaled or beside
    zeros where that is how the class says the same. Balancing, dropout and the like of training are those of the class.

    Raises HandoffError, which says of each class what does not fit; ArgumentError for an unknown target;
    UnsupportedModelError, MissingPackageError.
    """
    model = behind(model)
    check_model(model)
    _check_class(model)
    wanted = _wanted(target)
    with evaluation(model):
        try:
            source = read(model)
        except UnfitError as e:
            raise _nothing_fits(model, [str(e)]) from e
        return _first(source, wanted, Path(folder), example_inputs)


def _first(source: Source, wanted: Sequence[Target], folder: Path, inputs: Inputs | None) -> HandedOff:
    reasons: list[str] = []
    for one in wanted:
        try:
            return handed_off(source, one, folder, inputs)
        except UnfitError as e:
            reasons.append(f"{one.name}: {e}")
    raise _nothing_fits(source.model, reasons)


def _nothing_fits(model: nn.Module, reasons: Sequence[str]) -> HandoffError:
    return HandoffError(
        "no architecture of transformers computes what this model does; nothing was written",
        where=type(model).__name__,
        found="; ".join(reasons),
        expected=f"what one of {', '.join(TARGETS)} computes",
        do="choose options that one of them has, or keep the model as it is: gatecc.save",
    )


def _wanted(target: str | None) -> list[Target]:
    if target is None:
        return [TARGETS[name] for name in sorted(TARGETS)]
    if target in _APART:
        raise HandoffError(
            "no rewritten model is this architecture; nothing was written",
            where=target,
            found=_APART[target],
            expected=f"one of {', '.join(sorted(TARGETS))}",
            do="ask for one of them, or leave target out: the first that fits is taken",
        )
    if target not in TARGETS:
        raise ArgumentError("no such architecture to hand to", found=repr(target), expected=", ".join(sorted(TARGETS)))
    return [TARGETS[target]]


def _check_class(model: Any) -> None:
    try:
        from transformers import PreTrainedModel
    except ImportError as e:
        raise MissingPackageError(
            "models are handed to transformers, which is not installed", found=str(e), do="pip install 'gatecc[hf]'"
        ) from e
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            "only models of transformers can be handed to its architectures",
            found=type(model).__name__,
            expected="a PreTrainedModel that gatecc.transform returned",
        )
