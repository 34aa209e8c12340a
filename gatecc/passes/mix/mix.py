"""Mix: put another token mixer in the place of softmax attention, with or without its projections, or of an RNN."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import RNN, Attention, Site, Value
from gatecc.ir.sizes import described_shape, size_names, size_text
from gatecc.passes.axes import arranged
from gatecc.passes.mix.attention_maps import forget, readers
from gatecc.passes.mix.mixers import Mixer, Place
from gatecc.passes.mix.padding import token_mask
from gatecc.passes.mix.rnn import replace_rnn
from gatecc.passes.mix.windows import biases, grid, passed_by, prove_regions, seen
from gatecc.passes.operands import beside, condition, stage, static_sizes
from gatecc.passes.operands import place as where


@dataclass(frozen=True)
class Mix(Rewrite):
    """Replace the core of attention, or a recurrent layer, by ``mixer``; the projections around it keep their weights.

    A mixer that yields ``out`` takes the place of the projections as well. Their weights stay in the state dict, where
    `revert` finds them, but nothing reads them and they get no gradient.

    What a query may see is proved from the mask: a causal site gets a causal mixer, a bidirectional one a mixer in both
    directions, and a site whose mask is not proved is refused. Keys that a padding mask hides stay hidden. A sliding
    window, a bias on the scores with its parameters, soft caps and sinks belong to softmax and go with it; a mixer with
    a softmax part keeps to the smaller of both windows. Masks that differ between the windows of an image stay, for the
    mixers that are made for them. Leave layers as they are with ``Attention[...].but(...)``, for a hybrid.
    ``label`` names the module with new parameters on the owner. In general no identity: heal the model afterwards. A KV
    cache is no state of a mixer, so a call with one is refused.
    """

    name = "mix"

    mixer: Mixer
    label: str = "mixer"

    def effects(self) -> Effects:
        return Effects(
            loses_buffers=True,
            loses_parameters=self.mixer.stage == "out",
            loses_outputs=True,
            loses_cache=True,
            reads_mask=True,
            whole_model=bool(self.mixer.inputs),
            same_for_layers=True,
        )

    def contract(self) -> Contract:
        return changes_function()

    def reads(self) -> Iterable[str]:
        return (self.mixer.stage, *self.mixer.reads)

    def readers(self, site: Site) -> Iterable[str]:
        return readers(site)

    def rewrite(self, site: Site, edit: Editor) -> None:
        if site.kind != self.mixer.site:
            raise SiteRefusedError(
                f"{self.mixer.tag} takes the place of {self.mixer.site}",
                where=where(site),
                found=f"a site of the kind {site.kind}",
                do=f"select {self.mixer.site}[...], or choose another mixer",
            )
        if isinstance(site, RNN):
            replace_rnn(site, self.label, lambda place: self._module(place, edit), edit)
            return
        found = _attention(site)
        visible = _visible(found, self.mixer)
        place = _place(found, visible, self.mixer, edit)
        path = edit.module(self.label, lambda: self._module(place, edit))
        _check_direction(attribute(edit.program.module, path), place, self.mixer, found)
        _check_length(attribute(edit.program.module, path), place, self.mixer, found)
        if self.mixer.windows:
            _same_windows(path, place, edit)
        values = [laid(stage(site, name), found, name, edit) for name in self.mixer.reads]
        values += [_input(name, found, edit) for name in self.mixer.inputs]
        values = [_in_its_dtype(v, attribute(edit.program.module, path), edit) for v in values]
        mask = self._hidden(found, values[0], edit)
        edit.lost |= biases(found, edit.program) | passed_by(found, self.mixer.reads, edit.program)
        mixed = edit.call(path, *values, mask) if mask is not None else edit.call(path, *values)
        target = stage(site, self.mixer.stage)
        mixed = _cast(mixed, target, edit)
        edit.replace(target.node, _back(mixed, target, found, self.mixer, edit))
        forget(found, edit)
        edit.discard(target.node, inside=edit.effects.loses_parameters)

    def _hidden(self, site: Attention, q: fx.Node, edit: Editor) -> fx.Node | None:
        """The mask that the module takes after the stages, if there is one."""
        if not self.mixer.windows:
            return token_mask(site, q, self.mixer.packs, edit)
        if self.mixer.regions:
            prove_regions(site, edit.program)
        return seen(site, q, edit)

    def _module(self, place: Place, edit: Editor) -> nn.Module:
        return beside(self.mixer.module(place), edit)


def _attention(site: Site) -> Attention:
    if not isinstance(site, Attention):
        raise SiteRefusedError("only attention has a token mixer to replace", where=where(site), found=site.kind)
    if site.cross:
        raise SiteRefusedError(
            "queries and keys come from different sequences",
            where=where(site),
            found="cross-attention, or queries that were pooled",
            expected="self-attention",
            do="leave these sites out",
        )
    if not site.heads:
        raise SiteRefusedError("the number of heads is not known", where=where(site), do="leave this site out")
    return site


def _visible(site: Attention, mixer: Mixer) -> bool:
    """Whether the site is causal. SiteRefusedError if that is not proved, or the mixer cannot keep it."""
    if mixer.windows and not site.mask.causal:
        return False
    kind = site.mask.kind
    pattern = "causal" if kind == "sliding_window" or (kind == "packed" and mixer.packs) else kind
    if pattern in mixer.masks and (mixer.pads or not site.mask.padding):
        return pattern == "causal"
    wanted = " or ".join(mixer.masks) + ("" if mixer.pads else " without padding")
    do = "choose another mixer, or leave this site out"
    if site.mask.kind == "unknown":
        do = f"transform with example inputs of which the model makes its mask (lengths, a 2-D padding mask), {do}"
    raise SiteRefusedError(
        f"{mixer.tag} cannot take the place of this attention",
        where=where(site),
        found=f"the mask is {site.mask}" + (f": {site.mask.reason}" if site.mask.reason else ""),
        expected=f"a mask that is proved to be {wanted}",
        do=do,
    )


def _place(site: Attention, causal: bool, mixer: Mixer, edit: Editor) -> Place:
    q, v = stage(site, "q"), stage(site, "v")
    key, value = static_sizes(q)["d"], static_sizes(v)["d"]
    hidden = site.find("hidden")
    if mixer.stage == "out" and hidden is not None:
        _check_width(hidden, stage(site, "out"), site)
    tokens = edit.pin(q.node, q.axes.index("n")) if mixer.fixed_length else static_sizes(q).get("n")
    return Place(
        dim=static_sizes(hidden).get("c", 0) if hidden is not None else 0,
        heads=site.heads,
        kv_heads=site.kv_heads,
        key=key,
        value=value,
        scale=site.scale if site.scale is not None else key**-0.5,
        causal=causal,
        window=site.mask.window,
        tokens=tokens,
        grid=grid(_owner(site, edit), tokens, site) if mixer.windows else (1, 1),
    )


def _same_windows(path: str, place: Place, edit: Editor) -> None:
    """A mixer of windows is made for one size of them. Raises SiteRefusedError for another."""
    made = attribute(edit.program.module, path).place
    if made.grid != place.grid:
        raise SiteRefusedError(
            "the mixer was made for windows of another size",
            where=where(edit.site),
            found=f"{place.grid[0]} x {place.grid[1]} places",
            expected=f"{made.grid[0]} x {made.grid[1]}",
            do="call the model with images of the size that it was transformed with",
        )


def _owner(site: Site, edit: Editor) -> nn.Module:
    return edit.program.module.get_submodule(edit.program.relative_name(site.owner))


def _check_width(hidden: Value, out: Value, site: Attention) -> None:
    """A mixer of hidden that yields out keeps the number of channels."""
    had, wanted = static_sizes(hidden).get("c"), static_sizes(out).get("c")
    if had is None or had != wanted:
        raise SiteRefusedError(
            "the attention changes the number of channels",
            where=where(site),
            found=f"{had} channels in, {wanted} out",
            expected="as many out as in",
            do="leave this site out",
        )


def _check_length(module: Any, place: Place, mixer: Mixer, site: Attention) -> None:
    """Parameters for each token exist for one number of tokens."""
    if mixer.fixed_length and module.place.tokens != place.tokens:
        raise SiteRefusedError(
            f"{mixer.tag} has parameters for another number of tokens",
            where=where(site),
            found=f"{place.tokens} tokens",
            expected=f"{module.place.tokens} tokens",
            do="call the model with sequences of the length that it was transformed with",
        )


def _check_direction(module: Any, place: Place, mixer: Mixer, site: Attention) -> None:
    """A mixer is made for queries that see earlier keys alone, or for all."""
    if module.place.causal != place.causal:
        raise SiteRefusedError(
            f"{mixer.tag} was made for another mask",
            where=where(site),
            found=f"the mask is {site.mask} in this kind of call",
            expected="a causal mask, as in the example inputs" if module.place.causal else "a bidirectional mask",
            do="call the model as in the example inputs, or transform a model of each kind",
        )


def _input(name: str, site: Attention, edit: Editor) -> fx.Node:
    """An input of the model with features of tokens or of pairs of them."""
    q = stage(site, "q")
    node = condition(name, edit.program, q).node
    sizes, tokens = shape(node), shape(q.node)[q.axes.index("n")]
    # Comparing symbols makes them one, which is meant: the sizes of two inputs must go together in every call.
    if len(sizes) != 3 or sizes[1] != tokens or (sizes[2] != tokens and sizes[2] != 2):
        raise SiteRefusedError(
            f"the input {name!r} holds no features of these tokens",
            where=where(site),
            found=f"its shape is ({described_shape(node)}), for {size_text(tokens, size_names(node.graph))} tokens",
            expected="(B, N, N), or (B, N, 2) for coordinates",
            do="name another input, or leave this site out",
        )
    return node


def _in_its_dtype(value: fx.Node, module: nn.Module, edit: Editor) -> fx.Node:
    """A value in the dtype of the mixer's parameters: code inside autocast computes in another one."""
    own = next(module.parameters(), None)
    held: Tensor = value.meta["val"]
    if own is None or held.dtype == own.dtype or not held.is_floating_point():
        return value
    if torch.is_autocast_enabled(held.device.type):
        return value
    return edit.call(torch.ops.aten.to.dtype, value, own.dtype)


def laid(value: Value, site: Attention, name: str, edit: Editor) -> fx.Node:
    """A stage as (B, H, N, D), or (B, N, C) for those without heads."""
    axes = value.axes.renamed("m", "n")
    heads = site.kv_heads if name.startswith(("k", "v")) else site.heads
    if name.endswith("_linear"):
        return edit.call(arranged, value.node, axes.text, "bhnd", heads, name=name)
    wanted = "bnc" if "c" in axes else "bhnd"
    if axes == wanted:
        return value.node
    if sorted(axes.apart.renamed("r", "")) != sorted(wanted):
        raise SiteRefusedError(
            f"{name} is laid out in a way that a mixer does not know",
            where=where(site),
            found=f"axes {axes}",
            expected=f"{wanted} in some order",
        )
    return edit.call(arranged, value.node, axes.text, wanted, heads, name=name)


def _cast(mixed: fx.Node, target: Value, edit: Editor) -> fx.Node:
    """The result in the dtype of what it replaces: under autocast attention gives another one than its operands'."""
    dtype = target.node.meta["val"].dtype
    return mixed if mixed.meta["val"].dtype == dtype else edit.call(torch.ops.aten.to.dtype, mixed, dtype)


def _back(mixed: fx.Node, target: Value, site: Attention, mixer: Mixer, edit: Editor) -> fx.Node:
    """The result in the axes of the value that it replaces."""
    have = "bhnd" if mixer.stage == "heads" else "bnc"
    if target.axes == have:
        return mixed
    groups = site.heads // site.kv_heads if "r" in target.axes else 1
    return edit.call(arranged, mixed, have, target.axes.text, 1, groups, name="mixed")
