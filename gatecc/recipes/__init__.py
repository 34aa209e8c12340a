"""Recipes: papers as short lists of rewrites. One family per file; importing this package registers them all."""

from gatecc.ir.discover import discover
from gatecc.recipes.registry import build as build
from gatecc.recipes.registry import recipes as recipes
from gatecc.recipes.registry import resolve as resolve

discover(__name__, __path__)
