"""NoRGa: s + t2 act(t1 s) for the prefix alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.engine.contracts import compare
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.columns import Columns
from tests.graphs import attention, done
from tests.recipes.checks import case, gradients, new_parameters, randomise, reverted

GATES: dict[str, Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": nn.functional.gelu}


@pytest.mark.parametrize("activation", GATES)
def test_the_equation(activation: Any) -> None:
    result = done(attention(True), AttentionEdit("attention[...]", Columns(3, activation)))
    module, v = result.program.module, result.values
    gains = module.get_parameter("att.prefix_gate.gains")
    assert gains.tolist() == [1, 1]
    with torch.no_grad():
        gains.copy_(torch.tensor([0.7, -1.3]))
    keys, values = (module.get_parameter(f"att.prefix.{n}").repeat_interleave(2, 0) for n in ("keys", "values"))
    s = v["qh"] @ keys.mT / 2**0.5
    s = s - 1.3 * GATES[activation](0.7 * s)
    own = v["qh"] @ v["kr"].mT / 2**0.5
    own = own + torch.full(own.shape[-2:], -torch.inf).triu(1)
    heads = torch.cat([s, own], -1).softmax(-1) @ torch.cat([values.expand(len(s), -1, -1, -1), v["vr"]], 2)
    expected = heads.transpose(1, 2).flatten(2) @ module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/vit-sdpa", "hf/gpt2-eager"])
def test_without_the_gate_it_is_prefix_tuning_bitwise(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe("norga", tokens=3), known.inputs, verify=False)
    prefix = gatecc.recipe("prefix-tuning", tokens=3, softmax="joint")
    tuned = gatecc.transform(known.model, prefix, known.inputs, verify=False)
    new = new_parameters(model, known.model)
    randomise(p for n, p in new.items() if not n.endswith("gains"))
    tuned.load_state_dict(model.state_dict(), strict=False)
    gated = model(*known.args, **known.kwargs)
    gradients(model, new, gated)
    for name, p in new.items():
        if name.endswith("gains"):
            p.data.copy_(torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        plain, closed = (m(*known.args, **known.kwargs) for m in (tuned, model))
    assert compare(plain, closed) == 0
    assert compare(plain, gated) > 1e-4
    reverted(model, known.model, known.args, known.kwargs)
