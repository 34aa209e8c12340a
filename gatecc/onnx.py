"""Session: a folder of `gatecc.export` with ``decode=True``, run by ONNX Runtime without the model and its code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.onnx.packages import RUNTIME, need
from gatecc.codegen.onnx.place import first_line
from gatecc.decoder.runtime.generate import Generation
from gatecc.errors import ArgumentError, CheckpointError, MissingPackageError
from gatecc.export.carried import size_of
from gatecc.export.decode import DECODE
from gatecc.export.encoded import TYPES, Encoded
from gatecc.export.encoder import ENCODER
from gatecc.export.files import MANIFEST
from gatecc.export.padding import tokens_first

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
State = dict[str, Any]


class Session(Generation):
    """A decoder in ONNX Runtime: prefill, step and generate as those of `gatecc.Decoder`, from files alone.

    ``providers``: of ONNX Runtime, best first; by default CUDA's if the installed build has it, and the CPU's. States
    stay in ONNX Runtime, on its device, from one call to the next; keys and values in one buffer, where a node can. A
    state that you hold is never changed. ``genai`` tells what onnxruntime-genai does with the same folder: ``refused``
    (why it cannot run it), ``padding``, and ``limits``: what it cannot do, or gets wrong without a word.

    Raises MissingPackageError if ONNX Runtime is missing, or both of its builds are there, of which one overwrites the
    other; CheckpointError if the folder holds no decode.onnx, or files that were changed since the export;
    ArgumentError for a provider that this build does not have.
    """

    def __init__(self, folder: str | os.PathLike[str], providers: Sequence[str] | None = None) -> None:
        need(*RUNTIME)
        _one_build()
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        held: dict[str, Any] = self.manifest["decode"]
        self.inputs: dict[str, list[int | str]] = held["inputs"]
        self.outputs: dict[str, list[int | str]] = held["outputs"]
        self.states: list[dict[str, Any]] = held["states"]
        self.padding: str = held["padding"]
        self.context_length: int | None = held["context_length"]
        self.genai: dict[str, Any] = held.get("genai", {})
        self._values: list[str] = held["values"]
        self._mask: bool = held["mask"]
        self._singly: bool = held["singly"]
        self._session = _session(self.folder / DECODE, providers)
        self._device = "cuda" if _CUDA in self._session.get_providers() else "cpu"
        self._types = {i.name: TYPES[i.type] for i in self._session.get_inputs()}
        self._encoder = self._encoded(held.get("encoder"), providers)
        self.state: State | None = None

    def _encoded(self, encoder: Mapping[str, Any] | None, providers: Sequence[str] | None) -> Encoded | None:
        if encoder is None:
            return None
        file = _session(self.folder / ENCODER, providers) if encoder["outputs"] else None
        return Encoded(encoder, file, self._types, self._device)

    def reset(self) -> None:
        """Forget the text so far."""
        self.state = None

    def prefill(self, ids: Tensor, state: State | None = None, **values: Tensor) -> tuple[Tensor, State]:
        """Run T tokens at once, of a new text if no state is given. ids: (B, T) -> logits (B, T, V), the state after
        them.

        ``values``: ``attention_mask`` (B, T), 0 for padding, where the file knows padding; and the model's other inputs
        with a value per token. Of a new text they are also the inputs that are no tokens, those of an encoder, by the
        model's names (its mask is then the encoder's, and that of the tokens ``decoder_attention_mask``); they are
        encoded once. Raises ArgumentError for tokens, values or a state that do not fit.
        """
        context: dict[str, Any] = {}
        if self._encoder is not None:
            values, given = self._encoder.parted(values)
            if state is None:
                context = self._encoder(given, ids)
            else:
                self._encoder.refuse(given)
        self._check(ids, state, values)
        state = self._empty(len(ids), context) if state is None else state
        mask = values.get("attention_mask")
        if self.padding == "right" and mask is not None and not bool(mask.bool().all()):
            logits, self.state = self._ragged(ids, state, mask, values)
        elif self._singly and state["length"] and len(ids) > 1:
            logits, self.state = self._one_by_one(ids, state, values)
        else:
            logits, self.state = self._run(ids, state, values)
        return logits, self.state

    def step(self, ids: Tensor, state: State | None = None, **values: Tensor) -> tuple[Tensor, State]:
        """Run the next token of every sample, of the text so far if no state is given. ids: (B,) or (B, 1) -> logits
        (B, V) or (B, 1, V), the next state.

        More than one token at once is allowed, as in prefill.
        """
        state = self.state if state is None else state
        if state is None:
            raise ArgumentError("there is no text to continue", found="no state", do="call prefill first")
        if ids.dim() == 1:
            logits, state = self.prefill(ids.unsqueeze(1), state, **values)
            return logits[:, 0], state
        return self.prefill(ids, state, **values)

    # --- one call, or several ---

    def _ragged(self, ids: Tensor, state: State, mask: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Prompts of several lengths, padded on either side, as the file takes them: padded on the right."""
        mask = mask.detach().cpu().bool().long()
        lengths, places = mask.sum(1), tokens_first(mask)
        moved = mask.gather(1, places)
        if state["length"] or not bool(lengths.all()) or not torch.equal(moved, moved.sort(1, descending=True).values):
            raise ArgumentError(
                "only a whole prompt may be padded, on one side",
                where="attention_mask",
                found=f"zeros among or behind the tokens, after {state['length']} earlier ones",
                expected="ones for the tokens of each row, beside one another",
            )
        rows = torch.arange(len(ids))[:, None]
        given = {name: x[rows.to(x.device), places.to(x.device)] for name, x in values.items()}
        places = places.to(ids.device)
        logits, after = self._run(ids.gather(1, places), state, {**given, "attention_mask": moved})
        back = places.argsort(1)[..., None].expand_as(logits)
        return logits.gather(1, back), after

    def _one_by_one(self, ids: Tensor, state: State, values: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Several tokens of several samples, for which the file has no one call."""
        parts: list[Tensor] = []
        for at in range(ids.shape[1]):
            logits, state = self._run(ids[:, at : at + 1], state, {k: x[:, at : at + 1] for k, x in values.items()})
            parts.append(logits)
        return torch.cat(parts, 1), state

    def _run(self, ids: Tensor, state: State, values: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        past, new = int(state["length"]), ids.shape[1]
        mask = self._masked(state["mask"], values.get("attention_mask"), new)
        if self.padding == "left" and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ArgumentError(
                "prompts are padded on the left for this file, whose positions count padding",
                where="attention_mask",
                found="zeros behind tokens",
                expected="zeros before the first token of each row alone",
            )
        given = {"input_ids": ids, **{name: self._value(name, values, mask, past, new) for name in self._values}}
        if self._mask:
            given["attention_mask"] = mask
        binding = self._session.io_binding()
        for name, x in given.items():
            if name in self._types:
                binding.bind_cpu_input(name, x.detach().cpu().to(self._types[name]).contiguous().numpy())
        before, written = self._with_room(state, past, past + new)
        for held, x in zip(self.states, before, strict=True):
            binding.bind_ortvalue_input(held["input"], x)
        for name, x in state["context"].items():
            binding.bind_ortvalue_input(name, x)
        binding.bind_output(_LOGITS, "cpu")
        for held, x in zip(self.states, before, strict=True):
            if held["shared"]:
                binding.bind_ortvalue_output(held["output"], x)
            else:
                binding.bind_output(held["output"], self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise ArgumentError(
                "ONNX Runtime cannot run these tokens",
                where=f"input_ids {tuple(ids.shape)} after {past} tokens",
                found=f"{type(e).__name__}: {first_line(e)}",
                do="token ids must be below the size of the vocabulary",
            ) from e
        logits, *outputs = binding.get_outputs()  # which know nothing of the memory that a buffer was made of
        after = [x if held["shared"] else y for held, x, y in zip(self.states, before, outputs, strict=True)]
        written[0] = past + new
        made = {**state, "length": past + new, "mask": mask, "states": after, "written": written}
        return torch.from_numpy(logits.numpy()).to(ids.device), made

    def _empty(self, batch: int, context: Mapping[str, Any]) -> State:
        """The state before the first token."""
        states = [self._filled(held, batch, _FIRST if held["shared"] else 0) for held in self.states]
        mask = torch.ones(batch, 0, dtype=torch.int64)
        return {"length": 0, "batch": batch, "mask": mask, "states": states, "written": [0], "context": context}

    def _filled(self, held: Mapping[str, Any], batch: int, room: int, earlier: Any = None, past: int = 0) -> Any:
        """One tensor of the state with room for some tokens, and the first ``past`` of an earlier one in it."""
        import onnxruntime as ort

        shape = [room if axis == held["grows"] else size_of(size, batch) for axis, size in enumerate(held["shape"])]
        x = torch.full(shape, held["fill"], dtype=getattr(torch, held["dtype"]))
        if past:
            x.narrow(held["grows"], 0, past).copy_(torch.from_numpy(earlier.numpy()).narrow(held["grows"], 0, past))
        return ort.OrtValue.ortvalue_from_numpy(x.numpy(), self._device, 0)

    def _with_room(self, state: State, past: int, length: int) -> tuple[list[Any], list[int]]:
        """The tensors of a state for tokens up to ``length``, and how far the shared buffers among them are written.

        States that follow one another share buffers. One that is not the newest of its buffers, or has no more room,
        gets others first.
        """
        shared = [held for held in self.states if held["shared"]]
        if not shared:
            return state["states"], [length]
        at = self.states.index(shared[0])
        room = int(state["states"][at].shape()[shared[0]["grows"]])
        if length <= room and state["written"][0] == past:
            return state["states"], state["written"]
        room = room if length <= room else max(2 * room, length)
        made = [
            self._filled(held, state["batch"], room, x, past) if held["shared"] else x
            for held, x in zip(self.states, state["states"], strict=True)
        ]
        return made, [past]

    def _masked(self, before: Tensor, given: Tensor | None, new: int) -> Tensor:
        """The mask of all tokens; those that nothing is said of count."""
        after = torch.ones(len(before), new, dtype=torch.int64) if given is None else given.detach().cpu().long()
        return torch.cat([before, after], 1)

    def _value(self, name: str, values: Mapping[str, Tensor], mask: Tensor, past: int, new: int) -> Tensor:
        """What an input is for the new tokens. Positions count the tokens that the mask shows."""
        if name in values:
            return values[name]
        if name == "position_ids":
            return (mask.cumsum(1) - 1).clamp(min=0)[:, past : past + new]
        if name == "token_type_ids":
            return torch.zeros(len(mask), new, dtype=torch.int64)
        raise ArgumentError("a value per token is missing", found="none", expected=name)

    # --- what is given ---

    def _check(self, ids: Tensor, state: State | None, values: Mapping[str, Tensor]) -> None:
        if ids.dim() != 2 or not ids.numel():
            raise ArgumentError("no tokens", found=f"shape {tuple(ids.shape)}", expected="(batch, length)")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ArgumentError("token ids are whole numbers", found=str(ids.dtype), expected="torch.int64")
        self._check_values(ids, values)
        if state is not None and state["batch"] != len(ids):
            raise ArgumentError(
                "the state is of another batch", found=f"{len(ids)} samples", expected=str(state["batch"])
            )
        length = ids.shape[1] + (0 if state is None else int(state["length"]))
        if self.context_length is not None and length > self.context_length:
            raise ArgumentError(
                f"the model has positions for {self.context_length} tokens",
                found=f"{length} tokens",
                expected=f"at most {self.context_length}",
                do="a larger max_position_embeddings in the model's config before the export allows more",
            )

    def _check_values(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        known = [*self._values, *(["attention_mask"] if self.padding != "none" else [])]
        for name, x in values.items():
            if name == "attention_mask" and name not in known and bool(x.bool().all()):
                continue
            if name not in known:
                raise ArgumentError(
                    "the file was exported without this input",
                    found=name,
                    expected=", ".join(known) or "no value per token",
                    do="export from example inputs that hold it: {'input_ids': ids, 'attention_mask': mask}",
                )
            if x.shape[:2] != ids.shape[:2]:
                raise ArgumentError(
                    "a value per token is of another shape", where=name, found=str(tuple(x.shape)),
                    expected=str(tuple(ids.shape)),
                )  # fmt: skip


_LOGITS = "logits"
_FIRST = 64  # tokens that buffers have room for at first


def _one_build() -> None:
    """Raise MissingPackageError if both builds of ONNX Runtime are installed."""
    found: list[str] = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        raise MissingPackageError(
            "both builds of ONNX Runtime are installed, and one has overwritten files of the other",
            found=", ".join(found),
            expected="one of them",
            do="pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want",
        )


def _manifest(folder: Path) -> dict[str, Any]:
    """What the export wrote down. Raises CheckpointError if it is not that of these files."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"the folder holds no {MANIFEST} that can be read",
            where=str(folder),
            found=f"{type(e).__name__}: {e}",
            do="make it with gatecc.export(model, folder, inputs, decode=True)",
        ) from e
    if not manifest.get("decode"):
        raise CheckpointError(
            f"the folder holds no {DECODE}",
            where=str(folder),
            found=", ".join(manifest.get("files", ())),
            do="gatecc.export(model, folder, inputs, decode=True) writes it",
        )
    for name in _read(manifest["files"]):
        _check_file(folder / name, manifest["files"][name])
    return manifest


def _read(files: Collection[str]) -> list[str]:
    """The files that are run."""
    return [name for name in files if name in (DECODE, ENCODER) or name.endswith(".data")]


def _check_file(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError("a file of the export is missing", where=str(path), found=str(e)) from e
    if found != expected:
        raise CheckpointError(
            "a file is not the one that was exported and compared",
            where=str(path),
            found=f"SHA-256 {found[:16]}...",
            expected=f"{expected[:16]}...",
            do="export again; a file that was changed on purpose runs in onnxruntime.InferenceSession",
        )


def _session(path: Path, providers: Sequence[str] | None) -> Any:
    import onnxruntime as ort

    available = ort.get_available_providers()
    wanted = [p for p in (_CUDA, _CPU) if p in available] if providers is None else list(providers)
    unknown = [p for p in wanted if p not in available]
    if unknown:
        raise ArgumentError(
            "this build of ONNX Runtime does not have the provider",
            found=", ".join(unknown),
            expected=", ".join(available),
            do="pip install onnxruntime-gpu in the place of onnxruntime, for CUDA",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=wanted)
