"""What two processes do with mixtures of transformers, and with checkpoints and healing of sharded models: see
worker.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gatecc
from gatecc.parallel import expert_parallel, expert_parameters

ARCHITECTURES = ("Mixtral", "GptOss")  # as usual; biases, transposed weights and a clamped activation of both halves
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.randint(2, 29, (4, 6), generator=torch.Generator().manual_seed(3))


def mixture(architecture: str) -> Any:
    """The same on every rank."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SIZES, attn_implementation="eager")
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model


def trained(model: Any, ids: Tensor) -> dict[str, Any]:
    """Logits, and the gradients of the sum of their squares, whole."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in named.items()}
    return {"logits": logits.detach(), "grads": whole}


def stock(rank: int, ranks: int) -> dict[str, Any]:
    """Stock classes, and one that ``fast-experts`` rewrote: each rank has half of the rows."""
    mine = IDS.chunk(ranks)[rank]
    found: dict[str, Any] = {}
    for name in ARCHITECTURES:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(f"stock {name}",))
        spread = expert_parallel(mixture(name), mesh, gradients="sum")
        found[name] = trained(spread, mine)
        found[f"{name} state"] = {
            n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in spread.state_dict().items()
        }
        with torch.no_grad():
            found[f"{name} tokens"] = cast("Any", spread).generate(mine, max_new_tokens=3, do_sample=False)
    fast = gatecc.transform(mixture("Mixtral"), "fast-experts", {"input_ids": IDS, "use_cache": False})
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("stock fast",))
    found["fast-experts"] = trained(expert_parallel(fast, mesh, gradients="sum"), mine)
    return found


def saved(model: nn.Module, experts: DeviceMesh, rest: DeviceMesh, folder: Path) -> None:
    """A checkpoint by torch.distributed.checkpoint, each rank its shards."""
    spread = expert_parallel(copy.deepcopy(model), experts)
    fully_shard(spread, mesh=rest, ignored_params=set(expert_parameters(spread)))
    save({"model": get_model_state_dict(spread)}, checkpoint_id=str(folder))
    dist.barrier()
