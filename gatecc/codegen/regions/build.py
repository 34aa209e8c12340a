"""build: the files of regions, kept in the user's cache under a hash of what they compute, and imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from gatecc.codegen.c.build import folder
from gatecc.codegen.regions.derivative import gradient_of
from gatecc.codegen.regions.file import Derivative, Page, print_page, print_steps
from gatecc.codegen.regions.part import print_kernel
from gatecc.codegen.regions.region import RefusedError, region_of
from gatecc.codegen.regions.steps import steps_of
from gatecc.errors import ArgumentError
from gatecc.ir.files import write_atomic

_PACKAGE = "gatecc_regions_"


class Built(NamedTuple):
    """A region's file, imported: ``operator``, ``launch``, ``reference``, ``kernel``. ``gradient``: the file of its
    gradient, which names its kernels kernel_0 and so on; None without."""

    module: ModuleType
    example: tuple[Tensor, ...]
    gradient: ModuleType | None = None


def build(
    function: Callable[..., Any],
    example: Sequence[Tensor],
    notes: Sequence[str] = (),
    *,
    gradient: bool = True,
    slower: bool = True,
) -> Built:
    """The file of what a function of tensors computes.

    ``example``: tensors of the shapes and dtypes that it will be given, fake ones will do; rows may become more or
    fewer, columns not. ``notes`` stand in the header. With ``gradient`` the operator can be differentiated: by kernels,
    and in ATen what has none. Raises RefusedError with a reason; if it must not be ``slower``, also where the model
    finds that two kernels take less for so many rows as the example has.
    """
    region = region_of(function, example, notes)
    reason = print_kernel(region).slower  # and what has no kernel needs no gradient
    if reason and not slower:
        raise RefusedError(reason)
    if not gradient:
        return Built(load(write(print_page(region))), tuple(example))
    whole, there = gradient_of(region)
    file = write(print_steps(whole, steps_of(whole.graph, whole.notes)))
    module = load(write(print_page(region, Derivative(file, there))))
    return Built(module, tuple(example), load(file))


def write(page: Page) -> str:
    """Keep a file; its name."""
    path = place(page.name)
    if not path.exists():
        write_atomic(path, page.text.encode())
    return page.name


def place(name: str) -> Path:
    """Where the file of a name is."""
    return folder() / "regions" / f"{name}.py"


def load(name: str) -> ModuleType:
    """The module of a file, imported once. Raises ArgumentError for a name that was never written."""
    full = _PACKAGE + name
    if full in sys.modules:
        return sys.modules[full]
    path = place(name)
    spec = importlib.util.spec_from_file_location(full, path) if path.exists() else None
    if spec is None or spec.loader is None:
        raise ArgumentError("there is no file of a region", found=str(path), do="build the region anew")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full]
        raise
    return module
