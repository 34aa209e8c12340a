"""Adapters and computed weights: a gate reads the stream that the projection reads, and gates all that it yields.

What is right is taken from the merged model (W + s B A in one matrix), from the order adapters-then-gates against
gates-then-adapters, and from a gate of 0, which must leave nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gatecc
from gatecc.ir import site as sites
from gatecc.ir.gate import GateSpec
from gatecc.passes.gate import Gate

peft: Any = pytest.importorskip("peft", reason="adapters are peft's")
X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.gate_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def net() -> Any:
    torch.manual_seed(0)
    return Net().eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, **options})


GATES = [*gatecc.recipe("gated-attention").rewrites, *gatecc.recipe("feature-gate").rewrites]
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora with dropout": lambda: lora(use_rslora=True, lora_dropout=0.1),
    "dora": lambda: lora(use_dora=True),
    "lora on q": lambda: lora(target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=PROJECTIONS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=PROJECTIONS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=PROJECTIONS),
    "ia3": lambda: peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=PROJECTIONS[4:]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=PROJECTIONS),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "miss": lambda: peft.MissConfig(r=4, target_modules=PROJECTIONS),
}


def stir(model: nn.Module, seed: int, chosen: Callable[[str], bool]) -> None:
    """Noise on some parameters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if chosen(name):
                p.add_(torch.randn_like(p) * 0.3)


def adapted(method: str) -> Any:
    model = peft.get_peft_model(net(), METHODS[method]()).eval()
    stir(model, 1, lambda name: "base_layer" not in name and "_proj." in name)
    return model


@pytest.fixture(scope="module")
def gates_first() -> Any:
    """Gates on the attention and in the MLP of a model that has no adapters."""
    return gatecc.transform(net(), GATES, (X,))


@pytest.mark.broad(2)
@pytest.mark.parametrize("method", METHODS)
def test_gates_on_adapted_models_are_those_of_the_merged_model(method: str, gates_first: Any) -> None:
    model = adapted(method)
    before = model(X)
    known = {name for name, _ in model.named_parameters()}
    gated: Any = gatecc.transform(model, GATES, (X,))
    new = [name.rpartition(".")[0] for name, _ in gated.named_parameters() if name not in known]
    assert {name.split(".")[2] for name in new} == {"attention", "mlp"}
    assert torch.allclose(gated(X), before, atol=1e-6)
    for part in ("attention", "mlp"):  # each gate acts by itself
        still = gated(X)
        stir(gated, 2, lambda name, part=part: name not in known and part in name)
        assert not torch.allclose(gated(X), still, atol=1e-3)
    wide = copy.deepcopy(gated).double()  # outputs of a hundred are 1e-4 apart in float32, by rounding
    exact = wide(X.double())
    assert torch.allclose(wide.merge_and_unload()(X.double()), exact, atol=1e-10)
    # The other order: adapters put onto the gated model.
    later = peft.get_peft_model(copy.deepcopy(gates_first), METHODS[method]()).eval()
    later.load_state_dict(gated.state_dict())
    assert torch.allclose(later.double()(X.double()), exact, atol=1e-10)


@pytest.mark.broad(2)
@pytest.mark.parametrize("method", ["lora", "dora", "boft", "ia3", "oft", "loha"])
def test_a_gate_of_zero_on_the_output_leaves_nothing_of_an_adapter(method: str) -> None:
    model = adapted(method)
    known = {name for name, _ in model.named_parameters()}
    reads = {"attention": "hidden", "mlp": "in"}
    gates = [
        Gate(sites.KINDS[kind][...].out, GateSpec(source, "linear", "channel", "sigmoid"))
        for kind, source in reads.items()
    ]
    gated: Any = gatecc.transform(model, gates, (X,))
    with torch.no_grad():
        for name, p in gated.named_parameters():
            if name not in known:
                p.fill_(-40.0 if name.endswith("bias") else 0.0)  # sigmoid(-40) = 0
    for kind in reads:
        inner = gated.get_submodule(f"base_model.model.{kind}")
        assert float(inner(X).detach().abs().max()) < 1e-6


def test_adapters_of_a_gated_model_train_and_several_may_be_active() -> None:
    model = peft.get_peft_model(gatecc.transform(net(), "gated-attention", (X,)), lora(lora_dropout=0.1))
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    stir(model, 1, lambda name: "lora_B" in name)
    model.train()
    model(X).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    model.eval()
    both = model(X)
    model.base_model.set_adapter(["default"])
    assert not torch.allclose(model(X), both, atol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(model.merge_and_unload()(X), both, atol=1e-5)


def test_learned_prompts_stand_before_a_model_of_gated_layers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=0, **sizes)).eval()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ids = {"input_ids": torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(0))}
    prompted: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    known = {name for name, _ in prompted.named_parameters()}
    gated: Any = gatecc.transform(prompted, "gated-attention", ((), ids))
    assert torch.allclose(gated(**ids).logits, prompted(**ids).logits, atol=1e-6)
    stir(gated, 2, lambda name: name not in known)
    later: Any = peft.get_peft_model(gatecc.transform(base, "gated-attention", ((), ids)), config).eval()
    later.load_state_dict(gated.state_dict())
    assert torch.allclose(later(**ids).logits, gated(**ids).logits, atol=1e-6)


def test_merging_takes_no_scope_of_the_whole_model_away() -> None:
    """peft takes its own modules off the model when adapters are merged, with whatever is on them."""
    model = adapted("lora on q")
    known = {name for name, _ in model.named_parameters()}
    gated: Any = gatecc.transform(model, "gated-attention", (X,), scope="model")
    stir(gated, 2, lambda name: name not in known)
    expected = gated(X)
    assert not torch.allclose(expected, model(X), atol=1e-3)
    assert torch.allclose(gated.merge_and_unload()(X), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("first", ["gate", "norm"])
def test_computed_weights_are_projections(norm: Callable[[nn.Module], nn.Module], first: str) -> None:
    reference, model = net(), net()
    norm(reference.attention.q_proj)
    if first == "norm":
        norm(model.attention.q_proj)
    gated: Any = gatecc.transform(model, "gated-attention", (X,))
    if first == "gate":
        norm(gated.attention.q_proj)
    gated.load_state_dict(reference.state_dict(), strict=False)
    assert torch.allclose(gated.eval()(X), reference.eval()(X), atol=1e-6)
    # In training, spectral_norm updates its vectors without gradients: both models must do the same.
    for each in (reference, gated):
        each.train()(X).square().sum().backward()
    one, other = (dict(each.named_buffers()) for each in (reference, gated))
    assert all(torch.allclose(one[name], other[name]) for name in one)
    grads = [dict(each.named_parameters())["attention.q_proj.bias"].grad for each in (reference, gated)]
    assert torch.allclose(grads[0], grads[1], atol=1e-5)


def test_what_would_edit_the_matrix_of_an_adapted_projection_is_refused() -> None:
    model = adapted("lora")
    with pytest.raises(gatecc.GateccError, match="cannot be fused"):
        gatecc.transform(model, gatecc.recipe("gated-attention", fuse_into="q_proj", init="zero"), (X,))
