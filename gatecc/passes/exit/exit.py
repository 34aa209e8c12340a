"""Exit: leave the model early at blocks, for each sample by itself, or in a model of tokens for each token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import META, origin
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Block, Site, Value
from gatecc.ir.sizes import described_shape
from gatecc.passes.exit.head import ExitHead, Pooled, as_logits, goes_on
from gatecc.passes.exit.rule import Confidence, ExitRule, RuleModule
from gatecc.passes.exit.tokens import leave_per_token
from gatecc.passes.operands import own_weight, place, stage
from gatecc.passes.skipping import skip_for_samples


@dataclass(frozen=True)
class Exit(Rewrite):
    """A sample whose logits are sure enough at a block leaves there: the blocks behind it do not run for that sample.

    At each selected block a head yields logits, and a rule reads a score from them. A sample gets the logits of the
    first exit whose score reaches its threshold, else the model's own. Who leaves depends on the sample alone.

    ``head``: "pooled", a linear head on what the block yields, or "tail", the model's own head. ``rule``: "confidence",
    "learned" or "calibrated"; a threshold above 1, the start, lets nobody leave: the model is the original, bitwise.
    `gatecc.train.calibrate` finds thresholds. ``output``: the model's logits (b, c); "" is its output ``logits``, or
    its first.

    Samples that left are taken out of the batch, with their rows of every value that has one for each sample (masks and
    the like), and if nobody is left nothing runs. Under a compiler, in exports and for hooks the form is masked: all
    is computed, and the outputs are chosen. An export at batch 1 skips by an ``If``.

    In a causal model of tokens, whose logits are (b, n, c), each token leaves by itself, and its hidden state stays
    what it was: see `gatecc.passes.exit.tokens`. Its head reads each token: "tail" or "pooled(pool=each)".
    """

    name = "exit"

    head: ExitHead = field(default_factory=Pooled)
    rule: ExitRule = field(default_factory=Confidence)
    output: str = ""
    label: str = "exit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", ExitHead.coerce(self.head))
        object.__setattr__(self, "rule", ExitRule.coerce(self.rule))
        if self.output:
            Selector.parse(self.output)
        if self.site.kind != "block":
            steps = self.site.kind in ("step", "model")
            raise ArgumentError(
                "an exit leaves a model along its depth, at blocks",
                found=str(self.site),
                expected="block[...]",
                do="a step is one call, which ends by itself: gatecc.Loop(..., merge='confident') stops the steps of a "
                "loop, the rule of Decoder.speculate a draft"
                if steps
                else "select the blocks around it",
            )

    def contract(self) -> Contract:
        return identity_at_init() if self.rule.threshold > 1 else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def rewrite(self, site: Site, edit: Editor) -> None:
        logits, here = self._logits(site, edit), stage(site, "out").node
        if logits.axes == "bnc":
            leave_per_token(site, logits, self.head, lambda classes: self._rule(classes, edit), self.label, edit)
            return
        if self.head.reads_tokens:
            raise SiteRefusedError(
                "the head yields logits for each token, and the model one row for each sample",
                where=place(site),
                found=str(self.head),
                expected="logits (b, n, c) of the model, or another head",
                do="take pool='mean', 'max', 'first' or 'last'",
            )
        outer, final = _innermost(logits.node, here, edit)
        built = self.head.build(site, replace(logits, node=final), edit)
        early = as_logits(built.logits, final, edit)
        classes = int(final.meta["val"].shape[-1])
        stays = edit.call(edit.module(self.label, lambda: self._rule(classes, edit)), early, name=self.label)
        chosen = edit.call(goes_on, stays, final, early, name="left_or_not")
        chosen.meta[META] = replace(origin(chosen), owner=site.owner)
        if outer is None:
            edit.replace(final, chosen)
        else:  # inside of the choice of an earlier exit, which stays what the logits are now
            outer.replace_input_with(final, chosen)
        skip_for_samples(chosen, _after(built.onward) - {chosen}, edit, "what follows the exit", _SHOWN)

    def _rule(self, classes: int, edit: Editor) -> RuleModule:
        module, like = self.rule.module(classes), own_weight(edit.site, edit.program)
        module.place = next(i for i, site in enumerate(edit.sites) if site.key == edit.site.key)
        return module if like is None else module.to(like.device)  # it compares in float32

    def _logits(self, site: Site, edit: Editor) -> Value:
        models = [s for s in edit.sites if s.kind == "model"]
        if self.output:
            selector = Selector.parse(self.output)
            found = stage(select(selector, edit.sites)[0], selector.stage)
        elif models:
            found = models[0].find("logits") or stage(models[0], "out")
        else:
            raise SiteRefusedError("the model returns no tensor", where=place(site), do="name the logits: output=...")
        if found.axes.text not in ("bc", "bnc") or not isinstance(site, Block):
            raise SiteRefusedError(
                "samples leave a model that yields a row of logits for each of them or of their tokens",
                where=place(site),
                found=f"({described_shape(found.node)}), axes {found.axes}",
                expected="logits (b, c) or (b, n, c), and a block to leave at",
                do='name them, output="head[0].out"',
            )
        return found


_SHOWN = "leave out what shows the inside (output_hidden_states=False, use_cache=False), or export and train it masked"


def _innermost(logits: fx.Node, here: fx.Node, edit: Editor) -> tuple[fx.Node | None, fx.Node]:
    """The choice of the last exit before ``here`` (None: there is none), and the logits that it takes for who goes on.

    The first exit is outermost, so that what a later one computes is left out for the samples that left before.
    """
    outs = {s.owner: s.values["out"].node for s in edit.sites if isinstance(s, Block) and "out" in s.values}
    outer, final = None, logits
    while origin(final).inserted_by == Exit.name and final.target is torch.ops.aten.where.self:
        if not outs[origin(final).owner] < here:
            break
        outer, final = final, final.args[1]
        assert isinstance(final, fx.Node)
    return outer, final


def _after(values: tuple[fx.Node, ...]) -> set[fx.Node]:
    """The computations that depend on values, sizes aside."""
    found, todo = set[fx.Node](), list(values)
    while todo:
        for user in todo.pop().users:
            if user not in found and user.op == "call_function" and not isinstance(user.meta.get("val"), torch.SymInt):
                found.add(user)
                todo.append(user)
    return found
