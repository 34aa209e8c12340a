"""Wrappers of other libraries around a model or its parts, and the order in which they and a transform go together.

What a wrapper knows of a model it knows from the day it was put on: DDP's reducer and FSDP's groups hold the parameters
of then. A gate that is made later is in none of them, and every rank would train its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatecc.capture.neutral import is_shard
from gatecc.errors import UnsupportedModelError


@dataclass(frozen=True)
class Wrapper:
    """A wrapper by the name that its users know, and what they are to do."""

    name: str
    do: str


def _around(name: str, inner: str = "model.module") -> Wrapper:
    do = f"transform the model inside, then wrap the result: {name}(gatecc.transform({inner}, recipe, inputs))"
    return Wrapper(name, do)


_SHARDED = Wrapper(
    "fully_shard",
    "transform first, then shard: model = gatecc.transform(model, recipe, inputs), then fully_shard on its layers and "
    "on the model",
)
_REPLICATED = Wrapper("replicate", "transform first: replicate(gatecc.transform(model, recipe, inputs))")
_AVERAGE = Wrapper(
    "an average of weights",
    "transform the model that is trained, then average it: AveragedModel(gatecc.transform(model, recipe, inputs)); the "
    "parameters of both are paired in order",
)
_FABRIC = Wrapper("fabric.setup", "transform first: fabric.setup(gatecc.transform(model, recipe, inputs), optimizer)")

# By the name of the class and the start of its module's, so that none of them has to be imported.
_WRAPPERS = {
    ("DistributedDataParallel", "torch.nn.parallel"): _around("DistributedDataParallel"),
    ("DataParallel", "torch.nn.parallel"): _around("DataParallel"),
    ("FullyShardedDataParallel", "torch.distributed"): _around("FullyShardedDataParallel"),
    ("FSDPModule", "torch.distributed"): _SHARDED,
    ("DDP", "torch.distributed._composable"): _REPLICATED,
    ("AveragedModel", "torch.optim.swa_utils"): _AVERAGE,
    ("ModelEma", "timm"): _AVERAGE,
    ("ModelEmaV2", "timm"): _AVERAGE,
    ("ModelEmaV3", "timm"): _AVERAGE,
    ("ReplicateModule", "torch.distributed"): _REPLICATED,
    ("_FabricModule", "lightning"): _FABRIC,
    ("DeepSpeedEngine", "deepspeed"): Wrapper(
        "deepspeed.initialize", "transform first: deepspeed.initialize(model=gatecc.transform(model, recipe, inputs))"
    ),
}
_NAMES = {name for name, _ in _WRAPPERS}


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """The wrapper that a module is, None for every other module. ReplicateModule is an FSDPModule of its own kind."""
    for cls in type(module).__mro__:
        if cls.__name__ in _NAMES:
            for (name, start), wrapper in _WRAPPERS.items():
                if cls.__name__ == name and cls.__module__.startswith(start):
                    return wrapper
    return None


def refuse_wrapped(model: nn.Module) -> None:
    """Raise UnsupportedModelError if the model, or a part of it, is wrapped or holds shards of tensors."""
    for name, module in model.named_modules():
        wrapper = wrapper_of(module)
        if wrapper is not None:
            raise UnsupportedModelError(
                f"{'a submodule' if name else 'the model'} is wrapped already: the wrapper would not know the new "
                "parameters",
                where=name or type(module).__name__,
                found=wrapper.name,
                expected="the model without wrappers",
                do=wrapper.do,
            )
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise UnsupportedModelError(
                "the weights are distributed already",
                where=name,
                found=type(parameter.data).__name__,
                expected="plain tensors",
                do="transform first, then distribute: parallelize_module(gatecc.transform(model, recipe, inputs), ...)",
            )
