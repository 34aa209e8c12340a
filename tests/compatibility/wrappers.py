"""The wrappers. Each makes the module that a user calls, and by hand a plain module that computes the same."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from tests.compatibility.modes import FUNCTIONAL, Results, scaled
from tests.compatibility.subject import Rewrite, base, canonical, gradients, inputs

Q = "model.layers.1.self_attn.q_proj"


@dataclass
class Setup:
    """``module`` is called under the mode; ``right`` computes the same without the wrapper.

    ``runs``: modes in which the wrapper does the call by itself. ``watched()``: for each call of a hook whether it saw
    what is right; None where there is no hook. ``tolerance`` replaces that of the mode, if it is larger. ``gradients``
    says if they can be compared.
    """

    module: nn.Module
    right: nn.Module
    runs: dict[str, Callable[[], Results]] = field(default_factory=dict[str, Callable[[], Results]])
    watched: Callable[[], list[bool]] | None = None
    tolerance: float = 0.0
    gradients: bool = True


def _plain(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    return Setup(rewrite(base()), _right(rewrite, mode))


def _right(rewrite: Rewrite, mode: str) -> nn.Module:
    return scaled(rewrite.right()) if mode in FUNCTIONAL else rewrite.right()


@contextmanager
def _group() -> Generator[None]:
    """A process group of one, in memory."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _ddp(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    stack.enter_context(_group())
    module = rewrite(base())
    return Setup(DistributedDataParallel(module, find_unused_parameters=True), _right(rewrite, mode))


def _ddp_before(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    stack.enter_context(_group())
    module = rewrite(DistributedDataParallel(base()))
    return Setup(module, _right(rewrite, mode))


def _fsdp(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    stack.enter_context(_group())
    module: Any = rewrite(base())
    right = _right(rewrite, mode)
    mesh = init_device_mesh("cpu", (1,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    return Setup(fully_shard(module, mesh=mesh), right)


def _accelerate(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    AcceleratorState._reset_state(True)  # of a Trainer before
    stack.callback(AcceleratorState._reset_state, True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if mode == "autocast" else "no")
    module = rewrite(base())
    right = _right(rewrite, mode)
    return Setup(accelerator.prepare(module), right)


def _trainer(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    stack.callback(AcceleratorState._reset_state, True)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    module = rewrite(base())
    right = _right(rewrite, mode)
    seen: Results = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            seen.update(gradients(model))

    options: dict[str, Any] = {"compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"}}
    options["autocast"] = {"bf16": True}
    options["checkpointing"] = {"gradient_checkpointing": True}
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        **options.get(mode, {}),
    )
    rows = [{name: x[i] for name, x in inputs().items()} for i in range(2)]
    trainer = Trainer(module, arguments, train_dataset=rows, callbacks=[Gradients()])
    trainer.remove_callback(PrinterCallback)

    def train() -> Results:
        return {"loss": torch.tensor(trainer.train().training_loss), **seen}

    def predict() -> Results:
        found: Any = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
        return {"logits": torch.from_numpy(found.predictions)}

    runs = dict.fromkeys(("grad", "autocast", "compile", "checkpointing"), train)
    return Setup(module, right, {**runs, "no_grad": predict, "inference": predict})


ADAPTED = ("q_proj", "v_proj")


def _lora(model: nn.Module) -> nn.Module:
    """The model with LoRA whose second factor is not zero."""
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(ADAPTED)))
    generator = torch.Generator().manual_seed(2)
    for n, p in adapted.named_parameters():
        if "lora_B" in n:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapted.eval()


def _merge(adapted: nn.Module, plain: nn.Module) -> None:
    """Add s B A of each adapter to the weight that has the same name in a model without adapters."""
    for name, layer in adapted.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = (factors.get_parameter("default.weight") for factors in (layer.lora_A, layer.lora_B))
            weight = plain.get_parameter(name.removeprefix("base_model.model.") + ".weight")
            weight.data += layer.scaling["default"] * b.detach() @ a.detach()


def _peft_before(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    module = rewrite(_lora(base()))
    merged = base()
    source = module
    if mode in FUNCTIONAL:
        merged, source = scaled(merged), scaled(module)
    _merge(source, merged)
    right = rewrite.right()
    values = {canonical(n): p for n, p in source.named_parameters()} | dict(merged.named_parameters())
    for n, p in right.named_parameters():
        p.data.copy_(values[n].data)
    return Setup(module, right)


def _peft_after(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    module = rewrite(base())
    right = _right(rewrite, mode)
    adapted = _lora(module)
    _merge(scaled(adapted) if mode in FUNCTIONAL else adapted, right)
    return Setup(adapted, right)


def _hooks(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    """A forward hook inside a scope: called as often as on a plain model, with what the module takes and gives."""
    module = rewrite(base())
    right = _right(rewrite, mode)
    seen: list[bool] = []

    def hook(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = linear.weight
        if type(output) is not Tensor or mode in ("vmap", "compile", "export"):  # seen by a tracer
            seen.append(True)
            return
        expected = F.linear(args[0], weight.to(args[0].dtype))
        seen.append(torch.allclose(expected.float(), output.float(), atol=0.1 if mode == "autocast" else 1e-4))

    handle = module.get_submodule(Q).register_forward_hook(hook)
    stack.callback(handle.remove)
    return Setup(module, right, watched=lambda: list(seen))


def _quantize_dynamic(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    module = rewrite(base())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})  # pyright: ignore[reportDeprecated]
    right = scaled(module, quantised) if mode in FUNCTIONAL else module  # quantised weights are no parameters
    return Setup(quantised, right, tolerance=0.25, gradients=False)


def _prune(rewrite: Rewrite, mode: str, stack: ExitStack) -> Setup:
    module = rewrite(base())
    right = _right(rewrite, mode)
    prune.l1_unstructured(module.get_submodule(Q), "weight", 0.5)
    mask: Any = module.get_submodule(Q).weight_mask
    right.get_parameter(f"{Q}.weight").data *= mask
    return Setup(module, right)


Make = Callable[[Rewrite, str, ExitStack], Setup]
WRAPPERS: dict[str, Make] = {
    "none": _plain,
    "DDP": _ddp,
    "DDP, before": _ddp_before,
    "FSDP2": _fsdp,
    "accelerate": _accelerate,
    "Trainer": _trainer,
    "peft before": _peft_before,
    "peft after": _peft_after,
    "hooks": _hooks,
    "quantize_dynamic": _quantize_dynamic,
    "prune": _prune,
}
