"""Route: replace a feed-forward or linear layer, or a whole block, by experts, k of which run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.choices.per_group import PerGroup
from gatecc.ir.gates.choices.prefix import Prefix
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Block, Linear, Site, Value
from gatecc.passes.gating import gate_node, multiply, read_by, reads_afar
from gatecc.passes.operands import own_weight, stage
from gatecc.passes.route.bank import Bank, Piece, half, joined, of_slots, smoothed, whole
from gatecc.passes.route.block import route_block
from gatecc.passes.route.copies import Copies, Drop
from gatecc.passes.route.exactness import Coverage, coverage
from gatecc.passes.route.ffn import FFN, read_ffn, relative
from gatecc.passes.route.linear import read_linear
from gatecc.passes.route.router_nodes import router_nodes
from gatecc.passes.route.shared import Shared, SharedExpert
from gatecc.passes.route.spec import ExpertsSpec

_SHARED_GATE = GateSpec("in", "linear(bias=False)", "token", "sigmoid", init="identity(how=fold)")


def add(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """y <- one + other"""
    return one + other


@dataclass(frozen=True)
class Route(Rewrite):
    """Replace the layer of an MLP or Linear site by ``experts``, of which ``router`` chooses k for each token.

    The experts are filled from the layer's own weights, which then leave the layer (`revert` puts them back). Whether
    the model starts as it was depends on experts and router together; it is tried, promised, verified, and in the
    report. Dropout between the products is left out. A linear layer is taken for a feed-forward one without a
    nonlinearity.

    ``combine``: ``sum`` of the weighted results; ``prefix``: of the first n experts (choice ``prefix``); ``slots``: the
    k-th slot yields the k-th part of the features (choice ``per_group``); ``cat``: a second router ``also`` has experts
    of its own, and each yields half of the features (T2MIR); ``smooth``: to each result w (1 - w) / o is added, the
    uniform share of what the expert is not trusted with (COSMO). ``skip``: one more option, at which nothing runs.

    At a Block the experts are ``copies`` of all of it, attention included, and the choice is one for each sample: the
    router reads ``pool(in)``, or ``cond(NAME)`` with a value per sample: ``y <- sum_e w_e f_e(x) + (1 - sum_e w_e) x``.
    Expert 0 is the block itself; ``copies(1)`` with ``skip`` is the block or nothing (SkipNet, 2018). A block runs on
    the samples that chose it, and not at all if none did; the others keep what entered. Compiled models hold the
    masked form, the same function: every block for all samples. So do calls while modules inside have hooks, and
    training calls of blocks with running statistics. In ONNX a block runs for all samples if one of them chose it. A
    pooled router sees all tokens, so there is no KV cache.

    New modules on the owner: ``router``, and ``label`` with the stacked weights (of a block: those of the copies 1, 2,
    ... under their names).
    """

    name = "route"

    router: RouterSpec
    experts: ExpertsSpec
    combine: Literal["sum", "prefix", "slots", "cat", "smooth"] = "sum"
    also: RouterSpec | None = None
    skip: bool = False
    label: str = "experts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "router", RouterSpec.coerce(self.router))
        object.__setattr__(self, "experts", ExpertsSpec.coerce(self.experts))
        if self.also is not None:
            object.__setattr__(self, "also", RouterSpec.coerce(self.also))
        _check(self)

    @property
    def routers(self) -> tuple[RouterSpec, ...]:
        """All routers."""
        return (self.router,) if self.also is None else (self.router, self.also)

    @property
    def options(self) -> int:
        """How many experts a router chooses from; with ``skip`` the last of them is none."""
        return self.experts.count + self.skip

    def coverage(self, router: RouterSpec) -> Coverage:
        """What fresh experts weigh in all with a router. Raises ArgumentError if they do not go together."""
        if self.combine == "slots":  # each slot yields its features alone
            slots = router.choice.slots(self.options)
            return coverage(router, tuple(e * slots // self.options for e in range(self.options)), self.options)
        return self.experts.coverage(router, self.options)

    def contract(self) -> Contract:
        return changes_function() if self.why_not() else identity_at_init()

    def why_not(self) -> str:
        """Why the model does not start as it was; the empty string if it does."""
        if not self.experts.keeps_function:
            return "the experts do not start as the layer"
        for router in self.routers:
            found = self.coverage(router)
            if not found.exact:
                return (
                    f"the weights of {router.choice} do not add up the same for all tokens, they differ by "
                    f"{found.error:.0%}; those that sum to 1 do (renorm=True), or a router that starts at 0 (init=zero)"
                )
            if self.site.kind == "block" and found.scale != 1:
                return f"the weights of {router.choice} sum to {1 / (found.scale or 1):.3g}, the rest is what entered"
        if self.combine == "smooth" and self.router.choice.slots(self.options) > 1:
            return "smoothing adds to what several experts share"
        return ""

    def effects(self) -> Effects:
        afar = self.site.kind == "block" or any(reads_afar(r.gate) or r.mask for r in self.routers)
        return Effects(
            same_for_layers=not self.experts.reads_names,
            whole_model=afar,
            loses_cache=any(router.mixes_tokens for router in self.routers),
        )

    def reads(self) -> Iterable[str]:
        return ("in", "out", *(name for router in self.routers for name in read_by(router.gate)))

    def notes(self, site: Site) -> Iterable[str]:
        yield from self._of_start(site)
        for router in self.routers:
            yield from (f"{site.key}: {note}" for note in router.notes)

    def _of_start(self, site: Site) -> Iterable[str]:
        why = self.why_not()
        if why:
            yield f"{site.key}: {self.experts} with {self.router.choice} changes the function: {why}"
            return
        found = [self.coverage(router) for router in self.routers]
        error = max(c.error for c in found)
        kind = "exact" if error == 0 else "exact up to rounding"
        layer = "block" if isinstance(site, Block) else "dense layer"
        yield f"{site.key}: starts as the {layer}, {kind}: the weights of its parts are 1 within {error:.1e}"
        few = any(router.choice.slots(self.options) < self.options for router in self.routers)
        if few and any(c.zero for c in found):
            yield (
                f"{site.key}: the router starts at 0, so that all tokens take the same experts until it is trained; "
                "weights that sum to 1 allow a random start"
            )

    def rewrite(self, site: Site, edit: Editor) -> None:
        if isinstance(self.experts, Copies) and isinstance(site, Block):
            route_block(self.router, self.experts, self.options, self.site, self.label, edit)
            return
        ffn = self._layer(site, edit)
        value, out = stage(site, "in"), stage(site, "out")
        parts = [self._bank(number, router, ffn, value, edit) for number, router in enumerate(self.routers)]
        y = parts[0] if len(parts) == 1 else edit.call(joined, *parts, name="joined")
        if isinstance(self.experts, Shared):
            y = edit.call(add, self._shared(ffn, value, out, edit), y, name="with_shared")
        dtype = out.node.meta["val"].dtype
        if y.meta["val"].dtype != dtype:
            y = edit.call(torch.ops.aten.to.dtype, y, dtype)
        edit.replace(out.node, y)
        edit.discard(out.node, inside=True)
        for name in dropped(ffn, edit):
            edit.drop(name)

    def _layer(self, site: Site, edit: Editor) -> FFN:
        if isinstance(site, Linear):
            return read_linear(site, edit.program, directions=self.experts.cuts)
        return read_ffn(site, edit.program)

    def _bank(self, number: int, router: RouterSpec, ffn: FFN, value: Value, edit: Editor) -> fx.Node:
        """One router and its experts."""
        scale = self.coverage(router).scale
        scale = 1.0 if scale is None else scale
        chosen = router.choice.slots(self.options)
        bank = Bank(self.experts, ffn, scale, self._pieces(number, router, ffn), chosen, self.combine == "slots")
        layer_weights = relative(ffn, edit.program)
        like = own_weight(edit.site, edit.program)

        def fill(new: Any, layer: nn.Module) -> None:
            bank.fill(new, ffn.stacked(layer_weights(layer)))

        path = edit.module(self.label, lambda: bank.build(like), fill)
        weights, indices = router_nodes(router, self.options, self.site, value, edit, experts=path)
        if self.skip:  # an empty slot and the option that is no expert are one to the experts
            indices = edit.call(torch.ops.aten.clamp_max.default, indices, self.experts.count, name="routed")
        y = edit.call(path, value.node, weights, indices, name=self.label)
        return edit.call(smoothed, y, weights, name="smoothed") if self.combine == "smooth" else y

    def _pieces(self, number: int, router: RouterSpec, ffn: FFN) -> tuple[Piece, ...]:
        if self.combine == "slots":
            return of_slots(self.experts, ffn, router.choice.slots(self.options))
        return half(self.experts, ffn, number) if self.combine == "cat" else whole(self.experts, ffn)

    def _shared(self, ffn: FFN, value: Value, out: Value, edit: Editor) -> fx.Node:
        """The dense layer as a module of its own, with its gate."""
        assert isinstance(self.experts, Shared)
        gated = self.experts.gated
        layer_weights = relative(ffn, edit.program)
        like = own_weight(edit.site, edit.program)

        def build() -> nn.Module:
            device, dtype = (None, None) if like is None else (like.device, like.dtype)
            return SharedExpert(ffn, device, dtype)

        def fill(new: Any, layer: nn.Module) -> None:
            cast("SharedExpert", new).fill(ffn.stacked(layer_weights(layer)), 2.0 if gated else 1.0)

        y = edit.call(edit.module("shared", build, fill), value.node, name="shared")
        if not gated:
            return y
        gate, _ = gate_node(_SHARED_GATE, self.site, Value(y, out.axes), edit, "shared_gate")
        return edit.call(multiply, y, gate, name="shared_gated")


def _check(route: Route) -> None:
    """Options that do not go together. Raises ArgumentError."""
    if route.site.kind == "block":
        _check_block(route)
    if (route.combine == "cat") != (route.also is not None):
        raise ArgumentError(
            "two routers yield half of the features each, and only two do",
            found=f"combine={route.combine!r}, also={route.also}",
            expected='combine="cat" with a second router in also, or neither',
        )
    choice = route.router.choice
    if (route.combine == "prefix") != isinstance(choice, Prefix) or (route.combine == "prefix" and route.skip):
        raise ArgumentError(
            "the first n experts are added where a router chooses n",
            found=f"combine={route.combine!r} with {choice}, skip={route.skip}",
            expected='combine="prefix" with the choice prefix, where no expert at all is n = 0',
        )
    if route.combine == "slots" and not (isinstance(choice, PerGroup) and choice.k == 1):
        raise ArgumentError(
            "each slot yields features of its own, so that each needs experts of its own",
            found=str(choice),
            expected="per_group(G): one expert of each of G groups",
        )
    plain = isinstance(route.experts, Copies | Drop)
    if route.combine in ("slots", "cat") and not plain:
        raise ArgumentError(
            "experts that yield a part of the features are copies of these rows",
            found=f"{route.experts} with combine={route.combine!r}",
            expected="copies(...) or drop(...)",
        )
    for router in route.routers:
        router.choice.slots(route.options)  # k > E


def _check_block(route: Route) -> None:
    if route.combine != "sum":
        raise ArgumentError(
            "blocks are chosen as a whole", found=f"combine={route.combine!r}", expected='combine="sum"'
        )
    copies = route.experts
    if not isinstance(copies, Copies) or copies.keep < 1 or copies.extra:
        raise ArgumentError(
            "a block has no neurons to divide among experts",
            found=str(copies),
            expected="copies(n), or copies(n, noise=...); copies(1) with skip=True for the block or nothing",
            do="route the MLPs or linear layers inside of it",
        )


def dropped(ffn: FFN, edit: Editor) -> list[str]:
    """What leaves the layer with its dense weights: whole modules where they hold nothing else."""
    names, found = set(ffn.tensors()), dict[str, None]()
    for name in ffn.tensors():
        holder = name.rpartition(".")[0]
        inside = edit.program.inside(holder) and edit.program.relative_name(holder)
        module = edit.program.module.get_submodule(inside) if inside else None
        held = {f"{holder}.{n}" for n, _ in module.named_parameters()} if module is not None else set[str]()
        found[holder if held and held <= names else name] = None
    return list(found)
