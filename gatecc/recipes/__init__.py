"""Recipes: papers as short lists of rewrites. One family a file; importing this package registers them all."""

from gatecc.recipes import affine_attention as affine_attention  # isort: split

from gatecc.recipes import attention_free as attention_free
from gatecc.recipes import conditional_units as conditional_units
from gatecc.recipes import context_gate as context_gate
from gatecc.recipes import feature_gate as feature_gate
from gatecc.recipes import gam as gam
from gatecc.recipes import gated_attention as gated_attention
from gatecc.recipes import gated_swinrmt as gated_swinrmt
from gatecc.recipes import hybrid as hybrid
from gatecc.recipes import linearize as linearize
from gatecc.recipes import ninformer as ninformer
from gatecc.recipes import pgn as pgn
from gatecc.recipes import residual_gates as residual_gates
from gatecc.recipes import stepnet as stepnet
from gatecc.recipes import timestep_window as timestep_window
from gatecc.recipes import token_head_gates as token_head_gates
from gatecc.recipes import value_gate as value_gate
from gatecc.recipes import vision as vision
from gatecc.recipes import windowed_retention as windowed_retention
from gatecc.recipes.registry import build as build
from gatecc.recipes.registry import recipes as recipes
from gatecc.recipes.registry import resolve as resolve
