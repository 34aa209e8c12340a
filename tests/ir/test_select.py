"""Selectors: what they take, how they read as text and JSON, and what they say when they find nothing."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import fx

from gatecc.errors import ArgumentError, EmptySelectionError
from gatecc.ir.select import Selector, select
from gatecc.ir.site import KINDS, Activation, Linear, Refusal, Site, Value

NODE = fx.Graph().placeholder("x")
OWNERS = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("up", "down")]
SITES: list[Site] = [Linear(owner=owner, values={"out": Value(NODE, "bnc")}) for owner in OWNERS]
SITES.insert(2, Activation(owner="model.act", values={}))


def owners(selector: Selector) -> list[str]:
    return [site.owner for site in select(selector, SITES)]


def of(where: Any) -> Selector:
    return Linear[where]


def a_predicate(site: Site) -> bool:
    return site.owner.endswith("up")


ints = st.integers(-99, 99)
slices = st.builds(slice, st.none() | ints, st.none() | ints, st.none() | ints.filter(bool))
wheres = st.one_of(
    st.just(...), st.text(), ints, slices, st.lists(st.text(), min_size=1, max_size=4), st.lists(ints, min_size=1)
)


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    kind = draw(st.sampled_from(sorted(KINDS)))
    return Selector(kind, draw(wheres), draw(st.sampled_from(KINDS[kind].stages)))


@given(selectors())
@example(Selector("linear", "0"))
@example(Selector("linear", "..."))
@example(Selector("linear", "1:2"))
@example(Selector("linear", ["a,b", '"', "]", "<f>", " x "]))
@example(Selector("linear", ["", "layers.[0-3].*"]))
@example(Selector("merge", ..., "in12"))
def test_text_and_json_round_trip(selector: Selector) -> None:
    assert Selector.parse(str(selector)) == selector
    assert Selector.from_json(json.loads(json.dumps(selector.to_json()))) == selector
    assert hash(Selector.parse(str(selector))) == hash(selector)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("attention", Selector("attention", ..., "heads")),
        ("Attention.q", Selector("attention", ..., "q")),
        ("attention[model.layers.*].heads", Selector("attention", "model.layers.*", "heads")),
        ("linear[0, 2,-1].in", Selector("linear", (0, 2, -1), "in")),
        ("block[2:]", Selector("block", slice(2, None))),
        ("linear[layers.[01].*, head]", Selector("linear", ("layers.[01].*", "head"))),
        ('linear["0"]', Selector("linear", "0")),
    ],
)
def test_reads_what_a_user_types(text: str, meaning: Selector) -> None:
    assert Selector.parse(text) == meaning


@pytest.mark.parametrize("text", ["", "attention[", "attention[]", "atention[...]", "mlp[...].heads", "linear[<f>]"])
def test_unreadable_text_is_an_argument_error(text: str) -> None:
    with pytest.raises(ArgumentError):
        Selector.parse(text)


def test_takes_by_glob_position_slice_and_predicate() -> None:
    assert owners(of(...)) == OWNERS
    assert owners(of("model.layers.1.*")) == OWNERS[2:4]
    assert owners(of(["*.down", "*.0.mlp.up"])) == [OWNERS[0], *OWNERS[1::2]]
    assert owners(of(2)) == [OWNERS[2]]  # among the linears: the activation between does not count
    assert owners(of([-1, 0])) == [OWNERS[0], OWNERS[-1]]  # the order is that of execution
    assert owners(of(slice(4, None))) == OWNERS[4:]
    assert owners(of(a_predicate)) == OWNERS[::2]
    assert owners(of("model.layers.0.mlp.up#0")) == OWNERS[:1]


def test_an_attribute_is_another_stage() -> None:
    assert of(2).in_ == Selector("linear", 2, "in")
    assert Selector("attention", ...).q.stage == "q"
    with pytest.raises(ArgumentError, match=r"no stage 'heads'(.|\n)*one of in, out"):
        _ = of(...).heads
    assert not hasattr(of(...), "heads")


def test_copies_and_pickles() -> None:
    selector = of(slice(1, 3))
    assert copy.deepcopy(selector) == selector
    assert pickle.loads(pickle.dumps(selector)) == selector


@pytest.mark.parametrize("where", [None, 1.5, True, [], [1, "a"], slice("a", None), slice(0, 2, 0), {"a": 1}])
def test_a_senseless_where_is_an_argument_error(where: object) -> None:
    with pytest.raises(ArgumentError, match="does not say which sites"):
        of(where)


def test_a_predicate_cannot_be_saved() -> None:
    with pytest.raises(ArgumentError, match="cannot be saved"):
        of(a_predicate).to_json()


@pytest.mark.parametrize("where", ["encoder.*", ["*.up", "encoder.*"], 6, [0, -7], slice(9, None), lambda _: False])
def test_finding_nothing_is_an_error_that_says_what_exists(where: object) -> None:
    with pytest.raises(EmptySelectionError, match=r"selects no site(.|\n)*6 linear, 1 activation"):
        select(of(where), SITES)


def test_the_error_names_near_owners_and_refusals() -> None:
    with pytest.raises(EmptySelectionError, match=r"linear sites at model\.layers\.\d\.mlp\.(up|down)"):
        select(of("model.layer.1.mlp.up"), SITES)
    refusal = Refusal("GCC101", "attention", "model.a", "x.py:1", "two softmaxes", "call it twice")
    with pytest.raises(EmptySelectionError, match=r"GCC101 model\.a: two softmaxes(.|\n)*do +call it twice"):
        select(Selector("attention", ...), SITES, [refusal])


@pytest.mark.parametrize(
    ("owner", "globs"),
    [
        ("base_model.model.model.layers.1.attn", ("model.layers.1.*", "base_model.model.model.layers.1.*")),
        ("module.layers.1.attn", ("layers.1.attn",)),
        (
            "layers.1.attn",
            ("_orig_mod.layers.1.attn", "layers.1._checkpoint_wrapped_module.attn"),
        ),
        ("layers.1._fsdp_wrapped_module.attn", ("layers.1.attn", "layers.1._fsdp_wrapped_module.attn")),
        ("my_module.layers.1.attn", ("my_module.layers.1.attn",)),
    ],
)
def test_names_that_wrappers_put_between_need_not_be_written(owner: str, globs: tuple[str, ...]) -> None:
    sites: list[Site] = [Linear(owner=owner, values={"out": Value(NODE, "bnc")})]
    for glob in globs:
        assert select(of(glob), sites) == sites
    with pytest.raises(EmptySelectionError):
        select(of("layers.2.attn"), sites)


def test_what_to_do_is_something_that_the_model_has() -> None:
    with pytest.raises(EmptySelectionError, match="no attention site: select activation or linear sites"):
        select(Selector("attention", ...), SITES)
    with pytest.raises(EmptySelectionError, match=r"do +pass a model with layers that gatecc knows"):
        select(Selector("attention", ...), [])


@pytest.mark.parametrize("text", ["self_attn", ["attention[...]"], None])
def test_what_is_no_selector_is_told_how_one_is_written(text: Any) -> None:
    with pytest.raises(ArgumentError, match=r"by owners attention\[encoder"):
        Selector.parse(text)
