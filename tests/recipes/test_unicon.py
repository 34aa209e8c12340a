"""UniCon: adapters per stream and attention to the partner."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise


@torch.no_grad()
def test_partners_attend_to_one_another_and_streams_have_their_adapters() -> None:
    plain, ((x,), given) = samples.conditioned()
    given["partner"] = torch.tensor([1, 0])
    recipe = gatecc.recipe("unicon", sites="linear[*.0.*.q_proj]", attention="attention[0]", rank=2)
    model: Any = gatecc.transform(plain, recipe, ((x,), given), verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    attention: Any = model.blocks[0].attn
    joint, bank, scale = attention.joint, attention.q_proj.loras, attention.joint_scale.weight

    def adapted(module: Any, args: Any, y: Tensor) -> Tensor:
        each = [8 * args[0][i] @ bank.a[s].T @ bank.b[s] for i, s in enumerate(given["stream"])]
        return y + torch.stack(each)

    def joined(module: Any, args: Any, y: Tensor) -> Tensor:
        own, other = args[0], args[0][given["partner"]]
        q, k, v = (
            F.linear(t, p.weight).unflatten(-1, (4, 4)).transpose(1, 2)
            for p, t in ((joint.q, own), (joint.k, other), (joint.v, other))
        )
        heads = (q @ k.mT / 2).softmax(-1) @ v
        return y + scale * F.linear(heads.transpose(1, 2).flatten(2), joint.out.weight)

    plain.get_submodule("blocks.0.attn.q_proj").register_forward_hook(adapted)
    plain.get_submodule("blocks.0.attn").register_forward_hook(joined)
    assert torch.allclose(model(x, **given), plain(x, **given), atol=1e-5)

    scale.zero_()  # the streams do not know of one another
    before = model(x, **given)[0]
    other = torch.stack([x[0], torch.randn(6, 16)])
    assert torch.equal(model(other, **given)[0], before)
