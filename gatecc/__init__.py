"""gatecc: a compiler that puts gates, experts and linear attention into PyTorch models."""

import importlib
from typing import TYPE_CHECKING, Any

from gatecc import adapters, checks, diagnose, onnx, state_space, train
from gatecc.checkpoint import load, materialise, save
from gatecc.cost import cost
from gatecc.decoder import Decoder, decoder
from gatecc.engine.analyse import inspect
from gatecc.errors import GateccError
from gatecc.export import export
from gatecc.export.quantize import Quantize
from gatecc.handoff import to_transformers
from gatecc.ir.contract import Contract
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.select import Selector
from gatecc.ir.site import (
    MLP,
    RNN,
    Activation,
    Attention,
    Block,
    Conv,
    Embedding,
    Head,
    Linear,
    Merge,
    Model,
    Residual,
    Step,
)
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.branch.branch import Branch
from gatecc.passes.bypass import Bypass
from gatecc.passes.condition_cache import condition_cache
from gatecc.passes.ensemble.build import ensemble
from gatecc.passes.ensemble.choose import Choose
from gatecc.passes.ensemble.ensemble import Ensemble
from gatecc.passes.exit.exit import Exit
from gatecc.passes.fuse import Fuse
from gatecc.passes.gate import Gate
from gatecc.passes.gate_channels import GateChannels
from gatecc.passes.loop.loop import Loop
from gatecc.passes.loop.step_cache import step_cache
from gatecc.passes.mix.mix import Mix
from gatecc.passes.reweight.reweight import Reweight
from gatecc.recipes.registry import build as recipe
from gatecc.recipes.registry import recipes
from gatecc.report import Report
from gatecc.specialise import specialise
from gatecc.train.routing import aux_losses, routing
from gatecc.transform import last_report, revert, transform

if TYPE_CHECKING:
    from gatecc import backend as backend
    from gatecc.backend.explain import explain

__all__ = [
    "MLP",
    "RNN",
    "Activation",
    "Attention",
    "AttentionEdit",
    "Block",
    "Branch",
    "Bypass",
    "Choose",
    "Contract",
    "Conv",
    "Decoder",
    "Embedding",
    "Ensemble",
    "Exit",
    "Fuse",
    "Gate",
    "GateChannels",
    "GateSpec",
    "GateccError",
    "Head",
    "Linear",
    "Loop",
    "Merge",
    "Mix",
    "Model",
    "Quantize",
    "Recipe",
    "Report",
    "Residual",
    "Reweight",
    "Rewrite",
    "Selector",
    "Step",
    "adapters",
    "aux_losses",
    "checks",
    "condition_cache",
    "cost",
    "decoder",
    "diagnose",
    "ensemble",
    "explain",
    "export",
    "inspect",
    "last_report",
    "load",
    "materialise",
    "onnx",
    "recipe",
    "recipes",
    "revert",
    "routing",
    "save",
    "specialise",
    "state_space",
    "step_cache",
    "to_transformers",
    "train",
    "transform",
]


def __getattr__(name: str) -> Any:
    """What needs Dynamo and Inductor is imported when it is asked for: they take as long as the rest of gatecc."""
    if name == "explain":
        return importlib.import_module("gatecc.backend.explain").explain
    if name == "backend":
        return importlib.import_module("gatecc.backend")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
