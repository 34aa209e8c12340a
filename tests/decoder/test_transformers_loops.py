"""State space models and delta rules, which transformers spells as loops over tokens, decode by their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatecc
from gatecc.errors import DecoderError
from gatecc.scope.transformers_loops import chunk_delta_rule, chunk_scan, selective_scan, transformers_loops
from tests.decoder.stepping import difference, full, stepped

IDS: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = IDS | {"hidden_size": 16, "num_hidden_layers": 2}
STATE = SMALL | {"state_size": 4}
HEADS = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
DELTA = {f"linear_{name}": 4 for name in ("num_value_heads", "key_head_dim", "value_head_dim")} | {
    "linear_num_key_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mamba": ("MambaConfig", STATE, ["taps", "state"] * 2),
    "mamba2": ("Mamba2Config", STATE | {"num_heads": 4, "head_dim": 8, "n_groups": 2}, ["taps", "state"] * 2),
    "qwen3_next": ("Qwen3NextConfig", HEADS | DELTA | MOE, ["keys", "keys", "taps", "state"]),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        HEADS | DELTA,
        ["keys", "keys", "taps", "state"],
    ),  # its tables are filled in place
}
IDS16 = torch.randint(3, 32, (2, 16))


def build(name: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, MODELS[name][0])(**MODELS[name][1] | options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_full_forward(name: str) -> None:
    model = build(name)
    made = gatecc.decoder(model, {"input_ids": IDS16})
    assert [slot.kind for slot in made.plan.slots] == MODELS[name][2]
    ids = torch.randint(3, 32, (2, 70))  # longer than a chunk
    assert difference(full(model, input_ids=ids, use_cache=False), stepped(made, ids, (40, 1, 1, 3, 25))) <= 1e-5


def test_loops_are_as_they_were_afterwards() -> None:
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    with transformers_loops(build("mamba")):
        assert modeling_mamba.mamba_selective_scan is not before
    assert modeling_mamba.mamba_selective_scan is before


def test_a_loop_that_computes_something_else_stays_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba import modeling_mamba

    loop: Any = modeling_mamba.mamba_selective_scan

    def shifted(hidden_states: Any, dt: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
        return loop(hidden_states, dt, A, B, C + 1.0, **options)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", shifted)
    with pytest.raises(DecoderError, match="one length only"):
        gatecc.decoder(build("mamba", num_hidden_layers=1), {"input_ids": IDS16[:, :8]})


def test_a_call_that_starts_from_a_state_goes_to_the_loop() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    q, k, v, g, beta = (*torch.randn(3, 1, 5, 2, 4), -torch.rand(1, 5, 2), torch.rand(1, 5, 2))
    start = torch.randn(1, 2, 4, 4)
    loop: Any = modeling_qwen3_next.torch_chunk_gated_delta_rule
    expected, _ = loop(q, k, v, g=g, beta=beta, initial_state=start)
    with transformers_loops(build("qwen3_next")):
        said: Any = modeling_qwen3_next.torch_chunk_gated_delta_rule
        assert torch.equal(said(q, k, v, g=g, beta=beta, initial_state=start)[0], expected)


def test_forms_hold_in_bfloat16() -> None:
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2
    from transformers.models.qwen3_next import modeling_qwen3_next

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    scan = (half(2, 3, 9), half(2, 3, 9), -torch.rand(3, 4), half(2, 4, 9), half(2, 4, 9))
    chunks = (half(2, 9, 4, 3), half(2, 9, 4), -torch.rand(4), half(2, 9, 2, 5), half(2, 9, 2, 5), 4)
    delta = (half(2, 9, 2, 5), half(2, 9, 2, 5), half(2, 9, 4, 3), F.logsigmoid(torch.randn(2, 9, 4)), half(2, 9, 4))
    pairs: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (modeling_mamba.mamba_selective_scan, selective_scan, scan, {"delta_softplus": True}),
        (modeling_mamba2.mamba2_chunk_scan, chunk_scan, chunks, {"dt_softplus": True}),
        (modeling_qwen3_next.torch_chunk_gated_delta_rule, chunk_delta_rule, delta, {"use_qk_l2norm_in_kernel": True}),
    ]
    for loop, said, given, options in pairs:
        expected, got = (f(*given, **options) for f in (loop, said))
        expected, got = (x[0] if isinstance(x, tuple) else x for x in (expected, got))
        assert got.dtype == expected.dtype
        assert difference(expected.float(), got.float()) <= 2e-2


def test_a_rewritten_model_is_exported_at_any_length(tmp_path: Path) -> None:
    """Its scopes have been captured with the loop in them; the file has none."""
    pytest.importorskip("onnxruntime")
    gate = gatecc.Gate("activation[...].out", gatecc.GateSpec("self"))
    model = gatecc.transform(build("mamba", num_hidden_layers=1), gate, {"input_ids": IDS16}, verify=False)
    made = gatecc.export(model, tmp_path / "x", {"input_ids": IDS16})
    assert made.inputs == {"input_ids": ["batch", "sequence"]}
    assert {1, 7, 16, 131} <= {c.sizes["sequence"] for c in made.compared}
    assert made.operators["com.microsoft::LinearAttention"] == 1
    assert not made.notes
