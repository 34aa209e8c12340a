"""discover: what a package holds is known by being there: a new file in it needs no entry in any list."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module


def discover(package: str, paths: Iterable[str], *, deep: bool = True) -> None:
    """Import every module of a package, so that what each registers is known.

    ``paths`` is the package's ``__path__``. Not ``deep``: its own modules and packages, not what lies in the latter.
    """
    walk = pkgutil.walk_packages if deep else pkgutil.iter_modules
    for module in walk(paths, prefix=f"{package}."):
        import_module(module.name)
