"""gatecc: a compiler that puts gates, experts and linear attention into PyTorch models."""

from gatecc.analysis import inspect as inspect
from gatecc.checkpoint import load as load
from gatecc.checkpoint import save as save
from gatecc.errors import GateccError as GateccError
from gatecc.ir.contract import Contract as Contract
from gatecc.ir.gate import GateSpec as GateSpec
from gatecc.ir.rewrite import Recipe as Recipe
from gatecc.ir.rewrite import Rewrite as Rewrite
from gatecc.ir.select import Selector as Selector
from gatecc.ir.site import MLP as MLP
from gatecc.ir.site import Activation as Activation
from gatecc.ir.site import Attention as Attention
from gatecc.ir.site import Block as Block
from gatecc.ir.site import Conv as Conv
from gatecc.ir.site import Embedding as Embedding
from gatecc.ir.site import Head as Head
from gatecc.ir.site import Linear as Linear
from gatecc.ir.site import Merge as Merge
from gatecc.ir.site import Residual as Residual
from gatecc.passes.gate import Gate as Gate
from gatecc.recipes.registry import build as recipe
from gatecc.recipes.registry import recipes as recipes
from gatecc.report import Report as Report
from gatecc.transform import last_report as last_report
from gatecc.transform import revert as revert
from gatecc.transform import transform as transform
