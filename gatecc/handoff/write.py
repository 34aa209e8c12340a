"""Writing: a class of transformers with a model's weights, loaded again and compared before its folder is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatecc.capture.signature import copied, split_inputs
from gatecc.engine.analyse import Inputs
from gatecc.errors import HandoffError
from gatecc.handoff.source import Source
from gatecc.handoff.target import Target
from gatecc.handoff.unfit import UnfitError
from gatecc.handoff.windows import windows

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}  # of logits, relative to max(1, largest); others: 5 percent
_TOKENS, _NEW = 12, 6
_NOT_MADE = (AssertionError, RuntimeError, TypeError, ValueError)  # what configurations and modules raise
_TOO_MANY = 3  # names in a message


@dataclass(frozen=True)
class HandedOff:
    """``architecture``: the class that was written to ``folder``. ``error``: the largest difference of its outputs,
    relative to max(1, largest); ``generates``: whether greedy decoding was compared as well."""

    folder: Path
    architecture: str
    error: float
    generates: bool


def handed_off(source: Source, target: Target, folder: Path, inputs: Inputs | None) -> HandedOff:
    """Write a model as a target, whole or not at all. Raises UnfitError, HandoffError where files cannot be written."""
    options = target.options(source)
    made = _made(source, target, options)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HandoffError("the folder is not empty", where=str(folder), do="give one that is new or empty")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".gatecc-") as temporary, _quiet():
            path = Path(temporary) / "made"
            made.save_pretrained(path)
            cls = type(made)
            del made
            again = cls.from_pretrained(path, dtype=source.model.dtype).to(source.model.device).eval()
            error = _compared(source.model, again, inputs)
            generates = _generated(source.model, again)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(path, folder)
    except OSError as e:
        raise HandoffError("the files cannot be written", where=str(folder), found=str(e)) from e
    return HandedOff(folder, cls.__name__, error, generates)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _made(source: Source, target: Target, options: dict[str, Any]) -> Any:
    """The class with the model's weights. Raises UnfitError where it has others."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    configuration, cls = (getattr(transformers, f"{target.prefix}{name}", None) for name in ("Config", source.name))
    if configuration is None or cls is None:
        raise UnfitError(f"transformers has no {target.prefix}{source.name}")
    try:
        config = configuration(**{**source.shared, **options})
        config.dtype = source.model.dtype
        with torch.device("meta"):
            made = cls(config)
    except (StrictDataclassError, *_NOT_MADE) as e:
        raise UnfitError(f"its class cannot be made with the model's sizes: {str(e).strip().splitlines()[0]}") from e
    _check_windows(windows(source.config), windows(config) if target.windowed else ())
    state = target.state(source)
    _check_names({name: x.shape for name, x in made.state_dict().items()}, {name: x.shape for name, x in state.items()})
    made.load_state_dict({name: x.detach().contiguous() for name, x in state.items()}, strict=True, assign=True)
    made.tie_weights()
    if getattr(source.model, "generation_config", None) is not None and made.can_generate():
        made.generation_config = source.model.generation_config
    return made


def _check_windows(ours: Sequence[int | None], theirs: Sequence[int | None]) -> None:
    if any(ours) if not theirs else tuple(ours) != tuple(theirs):
        said = f"sliding windows of {list(theirs)} tokens" if any(theirs) else "no sliding window"
        raise UnfitError(f"its attention has {said}, the model's layers have {list(ours)}")


def _check_names(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    more, less = (_some(a.keys() - b.keys()) for a, b in ((found, wanted), (wanted, found)))
    if more or less:
        said = [f"it has no {more}"] * bool(more) + [f"the model has no {less}"] * bool(less)
        raise UnfitError(", ".join(said))
    for name, size in wanted.items():
        if size != found[name]:
            raise UnfitError(f"its {name} is {tuple(size)}, the model's {tuple(found[name])}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_TOO_MANY]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _compared(model: Any, again: Any, inputs: Inputs | None) -> float:
    """The largest relative difference of the outputs, plain and with padding. Raises UnfitError."""
    worst = 0.0
    for args, kwargs in [split_inputs(inputs)] if inputs is not None else _drawn(model):
        ours = _output(model, *copied((args, kwargs)))
        try:
            theirs = _output(again, *copied((args, kwargs)))
        except RuntimeError as e:
            raise UnfitError(f"its class does not run with these sizes: {str(e).strip().splitlines()[0]}") from e
        scale = max(1.0, float(ours.abs().max()))
        worst = max(worst, float((ours - theirs).abs().max().nan_to_num(nan=float("inf"))) / scale)
    if not worst <= _TOLERANCE.get(model.dtype, 5e-2):
        raise UnfitError(f"its outputs differ by {worst:.1e}")
    return worst


def _drawn(model: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Two sequences of tokens, and the same with padding on the left of one."""
    ids = _ids(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return [((), {"input_ids": ids}), ((), {"input_ids": ids, "attention_mask": mask})]


def _ids(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, _TOKENS), generator=generator).to(model.device)


def _output(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first output, without the places of padding: what these hold nobody reads."""
    with torch.no_grad():
        out = model(*args, **{"use_cache": False, **kwargs})[0]
    mask = kwargs.get("attention_mask")
    return out[mask.bool()] if isinstance(mask, Tensor) and mask.shape == out.shape[: mask.dim()] else out


def _generated(model: Any, again: Any) -> bool:
    """Whether greedy decoding was compared; that of coarse dtypes meets ties. Raises UnfitError where it differs."""
    if not model.can_generate() or model.dtype not in _TOLERANCE:
        return False
    ids = _ids(model)
    options: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    ours = model.generate(ids, **options)
    try:
        theirs = again.generate(ids, **options)
    except (RuntimeError, ValueError) as e:
        raise UnfitError(f"its class does not generate with these sizes: {str(e).strip().splitlines()[0]}") from e
    if not torch.equal(ours, theirs):
        raise UnfitError("it generates other tokens")
    return True
