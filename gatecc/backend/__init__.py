"""The torch.compile backend: ``torch.compile(model, backend="gatecc")``.

Dynamo's graph becomes a canonical Program (gatecc.backend.lower), what it spells out becomes the operators that compute
it fastest (gatecc.passes.lower), and the result goes to Inductor. Parameters are inputs of a Dynamo graph: layers that
share a compiled graph keep their own, and nothing is baked in. A graph in which nothing was lowered goes on as it came.
"""

from gatecc.backend.ahead import lowered_program
from gatecc.backend.compile import gatecc
from gatecc.backend.eager_experts import install
from gatecc.backend.explain import explain
from gatecc.backend.lower import Lowered, lower
from gatecc.backend.options import Options

__all__ = ["Lowered", "Options", "explain", "gatecc", "lower", "lowered_program"]

install()
