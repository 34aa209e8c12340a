"""``module:name`` and ``path/to/file.py:name``: how a model is named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from torch import nn

from gatecc.errors import ArgumentError, GateccError
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.recipes import build, resolve

T = TypeVar("T")


def load_model(reference: str, inputs: str | None) -> tuple[nn.Module, Any]:
    """The model and its example inputs.

    ``reference`` names a factory that returns a model or ``(model, example_inputs)``, or a model itself; ``inputs``
    names a factory of example inputs, or the inputs themselves, and wins over those that come with the model.

    Raises ArgumentError that says which part of the reference does not hold.
    """
    made = _make(reference)
    if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2 and isinstance(made[0], nn.Module):
        model, example = cast("tuple[nn.Module, Any]", made)
    else:
        model, example = made, None
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "this is no model",
            where=reference,
            found=type(model).__name__,
            expected="a torch.nn.Module, or (model, example_inputs)",
        )
    if inputs is not None:
        example = _make(inputs)
    if example is None:
        raise ArgumentError(
            "there are no example inputs",
            where=reference,
            do="let the factory return (model, example_inputs), or name them with --inputs module:factory",
        )
    return model, example


def load_batches(reference: str) -> Any:
    """What a reference names: a factory of batches (a DataLoader, a list), or the batches themselves."""
    made = _make(reference)
    if not isinstance(made, Iterable):
        raise ArgumentError("these are no batches", where=reference, found=type(made).__name__, expected="an iterable")
    return cast("Any", made)


def load_recipe(reference: str, options: dict[str, Any]) -> Recipe:
    """A recipe by its name, or one of your own: ``module:name``, ``path/to/file.py:name``.

    It is a Recipe, a rewrite, a list of rewrites, or a function (or a class of rewrites) that makes one of these from
    the options. Raises UnknownRecipeError, ArgumentError.
    """
    if ":" not in reference:
        return build(reference, **options)
    module, _, path = reference.rpartition(":")
    named = _attribute(_import(module, reference), path, reference)
    made = named
    if callable(named) and not isinstance(named, Rewrite):
        made = _called(cast("Callable[..., Any]", named), path, reference, options)
    elif options:
        raise ArgumentError(
            "this recipe takes no options", where=reference, found=", ".join(options), expected="a function that does"
        )
    recipe = resolve(made)
    if isinstance(made, Recipe):
        return recipe
    summary = (inspect.getdoc(named) or "").partition("\n")[0] if callable(named) else recipe.summary
    return replace(recipe, name=path, summary=summary, options=tuple(sorted(options.items())))


def _called(function: Callable[..., Any], path: str, reference: str, options: dict[str, Any]) -> Any:
    try:
        inspect.signature(function).bind(**options)
    except TypeError as e:
        takes = ", ".join(inspect.signature(function).parameters) or "no options"
        raise ArgumentError(
            "the recipe does not take these options", where=reference, found=str(e), expected=takes
        ) from e
    return _guarded(f"{path}() failed", reference, lambda: function(**options))


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """``["heads=4", "granularity=head"]`` as a dict; a value is JSON if it reads as JSON, else text.

    Raises ArgumentError for a setting without ``=``.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ArgumentError("an option needs a value", found=f"--set {setting}", expected="--set field=value")
        options[name] = _value(text)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def _make(reference: str) -> Any:
    """What a reference names; factories are called, modules and data are taken as they are."""
    module, colon, path = reference.rpartition(":")
    if not colon or not module or not path:
        raise ArgumentError(
            "this does not name a model",
            found=reference,
            expected="module:factory or path/to/file.py:factory",
        )
    named = _attribute(_import(module, reference), path, reference)
    if isinstance(named, nn.Module) or not callable(named):
        return named
    return _guarded(f"{path}() failed", reference, cast("Callable[[], Any]", named))


def _import(name: str, reference: str) -> ModuleType:
    if not name.endswith(".py"):
        _search(Path.cwd())
        return _guarded(f"{name} cannot be imported", reference, lambda: importlib.import_module(name))
    file = Path(name)
    if not file.is_file():
        raise ArgumentError("there is no such file", where=reference, found=name)
    return _guarded(f"{name} cannot be imported", reference, lambda: _execute(file))


def _execute(file: Path) -> ModuleType:
    """Import a file under its own name, so that models defined in it can be pickled."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    _search(file.resolve().parent)
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, path: str, reference: str) -> Any:
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            names = ", ".join(name for name in vars(module) if not name.startswith("_"))
            raise ArgumentError(f"{module.__name__} has no {path}", where=reference, expected=f"one of {names}"[:200])
        value = getattr(value, part)
    return value


def _guarded(what: str, reference: str, work: Callable[[], T]) -> T:
    """Errors of the user's own code become ours, with theirs as the cause (``--traceback`` shows both)."""
    try:
        return work()
    except GateccError:
        raise
    except Exception as error:
        raise ArgumentError(
            what, where=reference, found=f"{type(error).__name__}: {error}", do="--traceback shows where"
        ) from error


def _search(folder: Path) -> None:
    """Imports find files in a folder from now on, as they do for ``python file.py``; models may import later."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
