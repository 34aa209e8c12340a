"""Save: one expert of a model's banks, or its single adapters, as a checkpoint that peft loads."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from gatecc.adapters.read import WEIGHTS, Factors
from gatecc.errors import ArgumentError, CheckpointError, MissingPackageError
from gatecc.passes.branch.low_rank import LowRank, LowRanks


def save(model: nn.Module, folder: str | os.PathLike[str], expert: int = 0, *, base: str = "") -> None:
    """Write expert number ``expert`` of every bank of low-rank adapters, in the form of peft.

    ``PeftModel.from_pretrained(plain, folder)`` then computes what the rewritten model does where that expert has the
    weight 1 and the others 0. A branch with one adapter (``lora``) is written as well. Rows that are 0 are left out of
    the rank. ``base`` is entered as the name of the base model.

    Raises ArgumentError for an expert that there is not, CheckpointError where peft has no form for an adapter: beside
    something else than a Linear, or two at one. Raises MissingPackageError without peft.
    """
    try:
        peft: Any = import_module("peft")
    except ImportError as e:
        raise MissingPackageError("peft is not installed", found=str(e), do="pip install 'gatecc[peft]'") from e
    found = _factors(model, expert)
    ranks = {name: max(f.a.size(0), 1) for name, f in found.items()}
    rank = max(ranks.values())
    alphas = {name: f.scale * ranks[name] for name, f in found.items()}
    alpha = max(alphas.values())
    transposed = {not isinstance(model.get_submodule(name), nn.Linear) for name in found}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(found),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        fan_in_fan_out=transposed == {True},
        base_model_name_or_path=base or None,
        inference_mode=True,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(os.fspath(folder))
    state: dict[str, Tensor] = {}
    for name, f in found.items():
        state[f"base_model.model.{name}.lora_A.weight"] = f.a.contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = f.b.contiguous()
    save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def _factors(model: nn.Module, expert: int) -> dict[str, Factors]:
    """The factors of one expert by the module that they adapt."""
    found: dict[str, Factors] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LowRank | LowRanks):
            continue
        name = path.rpartition(".")[0]
        own = _one(module, path, expert)
        weight = model.get_submodule(name)._parameters.get("weight")
        if weight is None or sorted(weight.shape) != sorted((own.b.size(0), own.a.size(1))) or name in found:
            raise CheckpointError(
                "peft has no form for this adapter",
                where=path,
                found="a second one at the same module" if name in found else type(model.get_submodule(name)).__name__,
                expected="one adapter from the input to the output of a Linear",
                do="gatecc.save keeps the whole model, whatever its branches are",
            )
        found[name] = own
    if not found:
        raise CheckpointError(
            "the model holds no low-rank adapters",
            found=type(model).__name__,
            expected="a model with branches of the body lora or loras",
        )
    return found


def _one(module: LowRank | LowRanks, path: str, expert: int) -> Factors:
    if isinstance(module, LowRank):
        a, b = module.a.detach(), module.b.detach()
    elif 0 <= expert < module.a.size(0):
        a, b = module.a.detach()[expert], module.b.detach()[expert].T
    else:
        raise ArgumentError(
            "there is no such expert", where=path, found=str(expert), expected=f"0 to {module.a.size(0) - 1}"
        )
    scale = module.alpha / a.size(0)
    kept = (a.ne(0).any(1) | b.ne(0).any(0)).nonzero().flatten()
    if len(kept) == 0:  # an expert that does nothing here: peft wants a rank of at least 1
        return Factors(a[:1], b[:, :1], scale)
    return Factors(a[kept], b[:, kept], scale)
