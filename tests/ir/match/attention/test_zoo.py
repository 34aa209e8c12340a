"""match_attention on the zoo: the cores that run are found, owner for owner and in order, and nothing else is.

Every third architecture; GATECC_ZOO=all runs all variants, and so does benchmarks/attention_sites.py.
"""

from __future__ import annotations

import pytest

from gatecc.capture import capture
from gatecc.errors import CaptureError
from gatecc.ir.match.attention.walk import match_attention
from gatecc.ir.site import Attention
from gatecc.pipeline import canonical_form
from tests.graphs import record
from tests.ir.match.attention_math import check
from tests.zoo import Core, Spec, observe, sample

# torch's symbolic sizes do not come to an end on the window partition of an image of unknown size.
STATIC = ("hf/swin-", "hf/swinv2-", "timm/", "torchvision/")
# The model decides by the values of its inputs: no whole graph exists, gatecc falls back to submodules.
UNCAPTURABLE = ("hf/longformer-", "torch/decoder_detected")
KINDS = {"bidirectional": "bidirectional", "causal": "causal"}


CHOSEN = sample(3)


def test_enough_architectures() -> None:
    chosen = [s for _, s in CHOSEN if s.cores]
    assert len({(s.family, s.name) for s in chosen}) >= 50
    assert min(sum(s.impl == impl for s in chosen) for impl in ("sdpa", "eager")) >= 14


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in CHOSEN])
def test_zoo(spec: Spec) -> None:
    case = spec.build()
    truth = observe(case.model, case.args, case.kwargs)
    try:
        program = capture(case.model, case.args, case.kwargs, dynamic="none" if spec.id.startswith(STATIC) else "auto")
    except CaptureError as e:
        if not spec.id.startswith(UNCAPTURABLE):
            raise
        pytest.skip(f"torch.export cannot capture {spec.id} as a whole: {e.found}")
    canonical_form(program)
    sites, refusals = match_attention(program)

    assert [site.owner for site in sites] == list(truth.owners), refusals
    assert len({site.key for site in sites}) == len(sites)
    for site, core in zip(sites, truth.cores, strict=True):
        _agrees(site, core)
    for refusal in refusals:
        assert refusal.code.startswith("GCC1")
        assert refusal.line
        assert refusal.reason
        assert refusal.remedy
    # What looks like attention and is none is refused; routers, gates and classifiers are not mentioned.
    changed = [o for o in truth.others if o.reason != "scores are not a product of two computed tensors"]
    assert len(changed) <= len(refusals) <= len(truth.others)
    tensors = record(program)
    for site in sites:
        check(site, tensors)


def _agrees(site: Attention, core: Core) -> None:
    assert site.spelling == core.spelling
    assert {"q", "k", "v", "heads"} <= set(site.values)
    assert site.heads >= site.kv_heads >= 1
    if core.mask.startswith("sliding:"):
        assert str(site.mask).split("+")[0] == f"sliding_window({core.mask.partition(':')[2]})"
    elif core.mask in KINDS:
        assert site.mask.kind == KINDS[core.mask], site.mask.reason
    else:  # the observed pattern differs between samples: padding, packing, windows of an image
        assert site.mask.padding or site.mask.kind in ("packed", "unknown")
    assert site.mask.kind != "unknown" or site.mask.reason
