"""Read: a LoRA adapter of peft as its factors by the name of the module that they adapt."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn

from gatecc.errors import CheckpointError
from gatecc.ir.gate import GateModule
from gatecc.ir.router import is_router
from gatecc.passes.branch.low_rank import LowRank
from gatecc.recipes.phatgoose import VECTOR

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.weight)?")

# What a configuration may hold beside what is read: it says where the adapter comes from, or how it was trained.
_HARMLESS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config r "
    "target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size eva_config ensure_weight_tying".split()
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base as well


class Factors(NamedTuple):
    """The product scale * b @ a is added to a weight. a: (rank, in), b: (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One adapter: its name, for messages, and its factors by the names of modules of the base model.

    ``vectors`` (C,) by the same names are gate vectors that were trained with it (PHATGOOSE).
    """

    name: str
    factors: Mapping[str, Factors]
    vectors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def rank(self) -> int:
        """The largest rank of its factors."""
        return max(f.a.size(0) for f in self.factors.values())


def read(source: str | os.PathLike[str] | nn.Module) -> list[Adapter]:
    """The adapter in a folder that peft wrote, or all adapters of a PeftModel, in the order in which it got them.

    Of a model with branches of the body ``lora`` it is these, with the gate vectors of `phatgoose` beside them.

    Raises CheckpointError for what is no LoRA of matrices and nothing else: DoRA, trained biases, saved modules, a
    start that changes the base model; the message names it.
    """
    if isinstance(source, nn.Module):
        own = _of_branches(source)
        return [own] if own.factors else _of_model(source)
    folder = Path(source)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            "no adapter of peft is saved here",
            where=str(folder),
            found=f"no {' and no '.join(missing)}",
            expected=f"{CONFIG} and {WEIGHTS}",
            do="peft_model.save_pretrained(folder) writes both",
        )
    config = json.loads((folder / CONFIG).read_text())
    return [_adapter(str(folder), config, load_file(folder / WEIGHTS))]


def _of_branches(model: nn.Module) -> Adapter:
    """The single adapters of a rewritten model."""
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[0]
        if isinstance(module, LowRank):
            factors[name] = Factors(module.a.detach(), module.b.detach(), module.alpha / module.a.size(0))
        elif isinstance(module, GateModule) and path.endswith(f".{VECTOR}") and not is_router(module):
            vectors[name] = module.get_parameter("weight").detach()[0]
    return Adapter(type(model).__name__, factors, {n: v for n, v in vectors.items() if n in factors})


def _of_model(model: Any) -> list[Adapter]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise CheckpointError(
            "this model holds no adapters of peft",
            found=type(model).__name__,
            expected="a PeftModel, or the folder that save_pretrained of one wrote",
        )
    state_of: Any = import_module("peft").get_peft_model_state_dict
    found: Mapping[str, Any] = configs
    return [_adapter(name, config.to_dict(), state_of(model, adapter_name=name)) for name, config in found.items()]


def _adapter(name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    _check(name, config)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise _refusal(name, f"{key} {tuple(tensor.shape)}", "lora_A and lora_B of matrices")
        parts.setdefault(match["module"], {})[match["factor"]] = tensor
    torn = [module for module, part in parts.items() if set(part) != {"A", "B"}]
    if torn or not parts:
        raise _refusal(name, f"{torn[0]} with one factor" if torn else "no factors", "lora_A and lora_B of each module")
    return Adapter(name, {m: Factors(p["A"], p["B"], _scale(config, m, p["A"].size(0))) for m, p in parts.items()})


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = other
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than products that are added to matrices."""
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    if kind != "LORA":
        raise _refusal(name, f"peft_type {kind or 'not given'}", "LORA")
    if config.get("bias", "none") != "none":
        raise _refusal(name, f"bias={config['bias']!r}: biases of the base are in the checkpoint", 'bias="none"')
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _refusal(name, f"init_lora_weights={start!r}: it belongs to a changed base", "a start that leaves it")
    for option, value in config.items():
        if value and option not in _HARMLESS and option not in ("bias", "init_lora_weights"):
            raise _refusal(name, f"{option}={value!r}"[:120], f"{option} not set")


def _refusal(name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "this adapter is no plain LoRA",
        where=name,
        found=found,
        expected=expected,
        do="merge it into the base with peft (merge_and_unload), or train a plain LoRA",
    )
