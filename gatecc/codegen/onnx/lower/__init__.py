"""What a graph spells out becomes the ONNX node that computes it, before torch.onnx sees the graph. One per file."""

from gatecc.codegen.onnx.lower.lowering import GRAPH_LOWERINGS, GraphLowering, Subject, Target
from gatecc.codegen.onnx.lower.run import FailedLoweringError, lower_graph
from gatecc.ir.discover import discover

__all__ = ["GRAPH_LOWERINGS", "FailedLoweringError", "GraphLowering", "Subject", "Target", "lower_graph"]

discover(__name__, __path__)
