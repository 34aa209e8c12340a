"""Every failure that gatecc can report: one class per failure, a stable code, and a remedy in the message.

A message is one sentence about what went wrong, then up to four labelled lines: where, what was found, what was
expected, what to do. The docstring of a class is its manual page (``docs/errors/GCCnnn.md`` is generated from it).
"""

from __future__ import annotations

from typing import ClassVar


class GateccError(Exception):
    """Base of all errors raised by gatecc.

    ``code`` is stable: scripts may test it. ``what`` is the sentence; ``where`` names a module FQN and, where known,
    a source line; ``found``, ``expected`` and ``do`` are filled whenever they are known.
    """

    code: ClassVar[str] = "GCC000"

    def __init__(self, what: str, *, where: str = "", found: str = "", expected: str = "", do: str = "") -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.do = do
        super().__init__(self.render())

    def render(self) -> str:
        """The message as it is shown: first line ``CODE where: what``, then the labelled lines."""
        head = f"{self.code}  {self.where}: {self.what}" if self.where else f"{self.code}  {self.what}"
        rows = (("found", self.found), ("expected", self.expected), ("do", self.do))
        return "\n".join([head, *(f"  {label:<9}{text}" for label, text in rows if text)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from args alone; ours carry keyword fields as well (they cross process borders in DDP).
        return (_rebuild, (type(self), self.what, self.where, self.found, self.expected, self.do))


def _rebuild(kind: type[GateccError], what: str, where: str, found: str, expected: str, do: str) -> GateccError:
    return kind(what, where=where, found=found, expected=expected, do=do)


class ExampleInputsError(GateccError):
    """The model did not run on the example inputs.

    ``example_inputs`` is a tuple (positional arguments), a dict (keyword arguments) or ``(tuple, dict)`` (both).

    Fails: ``gatecc.inspect(model, torch.zeros(2, 16))`` (a bare tensor), or inputs that make ``model(...)`` raise.
    Mended: ``gatecc.inspect(model, (torch.zeros(2, 16),))``.
    """

    code = "GCC001"


class UnknownRecipeError(GateccError):
    """No recipe has this name.

    Fails: ``gatecc.transform(model, "gated-atention", inputs)``.
    Mended: ``gatecc.transform(model, "gated-attention", inputs)``; ``gatecc.recipes()`` lists the names.
    """

    code = "GCC002"


class EmptySelectionError(GateccError):
    """A rewrite selected no site, so the model would come back unchanged.

    Fails: ``Gate(Attention["encoder.*"].heads, ...)`` on a model whose layers are called ``model.layers``.
    Mended: ``Gate(Attention["model.layers.*"].heads, ...)``; ``gatecc.inspect`` lists the sites and the refusals.
    """

    code = "GCC003"


class CaptureError(GateccError):
    """``torch.export`` could not capture a module, on any rung of the ladder.

    The message ends in the cause that torch gives for the lowest rung. Control flow that depends on data is the usual
    reason. Submodules without it can still be captured, and their sites selected.

    Fails: ``if x.sum() > 0: x = -x`` in the forward of a module.
    Mended: ``x = torch.where(x.sum() > 0, -x, x)``, or ``torch.cond`` for larger branches.
    """

    code = "GCC004"


class UnsupportedModelError(GateccError):
    """The model is of a kind that gatecc cannot rewrite: scripted, wrapped, half on the meta device, quantised weights.

    A wrapper (DDP, FSDP, DataParallel, ``fully_shard``, ``fabric.setup``) holds the parameters of the day on which it
    was put on, so those that a transform makes would be in none of its groups: transform first, then wrap.

    Fails: ``gatecc.transform(torch.jit.script(model), ...)``.
    Mended: pass the Python module that the script was made from; load all weights before the transform, or none.
    """

    code = "GCC005"


class CallNotCapturedError(GateccError):
    """A transformed module was called in a way that can neither be captured nor served by the Python path.

    The Python path applies gates at the attention call and at the outputs of submodules. A rewrite of any other value
    cannot be done there, and gatecc never runs the unrewritten model in its place.

    Fails: calling a model whose residual stream is gated with a KV cache object.
    Mended: pass ``use_cache=False``; ``generate`` of a transformers model keeps a state by itself, and
    ``gatecc.decoder`` does for loops of your own.
    """

    code = "GCC006"


class ContractError(GateccError):
    """A rewrite broke the contract that it declares; the model is left unchanged.

    The message names the rewrite (found by replaying them one at a time), the site and the source line, and prints the
    graph around it. What was installed must also act in every mode (gradients on and off, eval and train): a module
    whose weights something reads without calling it is named with the mode.

    Fails: a rewrite of your own that returns ``identity_at_init()`` from ``contract`` and doubles a value.
    Mended: parameters that start where the value is unchanged, or ``changes_function()`` if it is meant.
    """

    code = "GCC007"


class GraphError(GateccError):
    """A rewrite left an ill-formed graph: use before definition, wrong shape, a lost parameter, a changed output.

    The message names the rewrite, the site and the source line, and prints the graph around the guilty node.

    Fails: a rewrite of your own that replaces a value by one that is computed from it later, or has another shape.
    Mended: read what is computed before the value that you replace, and return a tensor of its shape.
    """

    code = "GCC008"


class ArgumentError(GateccError, ValueError):
    """An option has a value outside what it accepts. The message lists what is accepted.

    Fails: ``gatecc.GateSpec("hidden", activation="sigmiod")``.
    Mended: ``gatecc.GateSpec("hidden", activation="sigmoid")``.
    """

    code = "GCC009"


class CheckpointError(GateccError):
    """A checkpoint cannot be written or loaded: a file is damaged, the format unknown, or the base model is another
    one.

    A message about the base model names the parameters, with what the checkpoint holds and what the model has. The base
    model is left unchanged.

    Fails: ``gatecc.load(BertModel(config_of_12_layers), folder)`` for a checkpoint of 6 layers.
    Mended: make the base model from the configuration that the saved model was made from, in its dtype.
    """

    code = "GCC010"


class SiteRefusedError(GateccError):
    """A rewrite cannot be done at a site that was selected for it, though the site exists.

    The site lacks the value that is gated, its mask is not one that the rewrite understands, a weight has other uses,
    or the gate has parameters for another number of tokens than the call has. Nothing was changed. Sites that lack a
    value and were selected by ``...`` only are left out instead: the report lists them as refusals with this code.

    Fails: ``transform(bert, "liger", inputs)``: its attention looks ahead, a window of recent keys does not.
    Mended: ``transform(bert, "gla", inputs)``, which runs in both directions, or ``sites=`` that leaves them out.
    """

    code = "GCC011"


class ExportError(GateccError):
    """The model cannot be written as ONNX, or the graph does not compute what the model does. Nothing was written.

    The graph is checked, loaded in ONNX Runtime and compared with torch at several batch sizes and lengths; the message
    names the sizes and the output that differ, or the operator, its module and its line where it is one that ONNX or
    ONNX Runtime lacks.

    Fails: a model in bfloat16, for which ONNX Runtime has no kernels on a CPU.
    Mended: ``gatecc.export(model.float(), folder, inputs)``.
    """

    code = "GCC012"


class MissingPackageError(GateccError, ImportError):
    """An optional package is not installed.

    Fails: ``gatecc.export(...)`` after ``pip install gatecc``.
    Mended: ``pip install 'gatecc[onnx,ort]'``.
    """

    code = "GCC013"


class DecoderError(GateccError):
    """No decode step can be derived from a model's full-sequence graph, or the derived one computes something else.

    The message names the node that stands in the way, with its module and source line: an operator that mixes positions
    and has no step rule, an attention whose mask does not prove causal, a length that the capture fixed.

    Fails: ``gatecc.decoder(bert, inputs)``: attention in both directions has no decode step.
    Mended: a causal model; where one operator stands in the way, write it with one that has a rule (attention,
    linear attention, recurrent layers, causal convolution, delay, cumulative sum).
    """

    code = "GCC015"


class TrainingError(GateccError):
    """Healing cannot go on: a loss is not finite, or nothing that trains has an effect on it.

    With ``checkpoint=`` the last state before it is in the folder. An adapter without effect is refused after the first
    batch, before anything was trained.

    Fails: ``Tune(steps=100, lr=10.0)``.
    Mended: ``Tune(steps=100, lr=1e-3)``, ``clip=1.0``, or float32 in place of ``autocast``.
    """

    code = "GCC016"


class CheckFailedError(GateccError):
    """A check that the registration of a recipe names does not hold (see docs/checks.md).

    Fails: ``gatecc.checks.run("my-recipe")`` of a recipe that claims ``causality`` and pools over all tokens.
    Mended: a gate that reads its own token, or cases without this check.
    """

    code = "GCC017"


class HandoffError(GateccError):
    """No stock architecture of transformers computes what a rewritten model does. Nothing was written.

    The message says of each architecture what does not fit: a bias or a norm that it lacks, experts in some layers
    only, weights that it divides by their sum, a gate that it does not have, or outputs that differ.

    Fails: ``gatecc.to_transformers(llama_with_gates_on_mlps, folder)``.
    Mended: ``gatecc.to_transformers(gatecc.transform(llama, "upcycle", inputs), folder)``: a Mixtral.
    """

    code = "GCC018"


class MaskFormError(GateccError, RuntimeError):
    """A call's attention mask has another form than the one that a rewrite was made for.

    What took the place of softmax attention does not read a mask key by key: that it is causal (or bidirectional, or a
    window) was proved where the model makes it. A layer that is given its mask as a tensor therefore asserts on every
    call that it has the proved form, with padding and with packed sequences; any other mask is this error, never
    ignored. Calls with a 2-D ``attention_mask``, with ``position_ids`` that restart, or with a 4-D mask of the proved
    form are fine.

    Fails: ``transform(llama, "gla", inputs)(ids, attention_mask=prefix_lm_mask)``: tokens of the prefix see later ones.
    Mended: a causal mask with padding; ``keep=`` leaves layers with softmax attention, which takes any mask.
    """

    code = "GCC180"
