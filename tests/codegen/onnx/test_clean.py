"""Names of values: by order, whatever torch traced before."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from gatecc.codegen.onnx.clean import clean
from gatecc.codegen.onnx.dims import Dims

# Two products and a branch; the numbers are those of a trace. An input and an initializer bear names of the pattern.
GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
graph (float[2] mul, bool yes) => (float[2] y) <float[2] mul_1 = {{1.0, 2.0}}> {{
    mul_{a} = Mul (mul, mul_1)
    mul_{b} = Mul (mul_{a}, mul_1)
    branch_{a} = If (yes) <
        then_branch = one () => (float[2] add_{a}) {{ add_{a} = Add (mul_{b}, mul_{a}) }},
        else_branch = two () => (float[2] add_{b}) {{ add_{b} = Identity (mul_{b}) }}
    >
    branch_2_{a} = Abs (branch_{a})
    branch_2 = Abs (branch_2_{a})
    branch_3 = Abs (branch_2)
    y = Neg (branch_3)
}}
"""


def _cleaned(a: int, b: int) -> onnx.ModelProto:
    model = ir.from_proto(onnx.parser.parse_model(GRAPH.format(a=a, b=b)))
    clean(model, Dims.of([], [], []))
    return ir.to_proto(model)


@pytest.mark.parametrize(("a", "b"), [(79, 95), (5, 2), (10, 3)])
def test_numbers_of_a_trace_are_not_in_the_file(a: int, b: int) -> None:
    made = _cleaned(a, b)
    onnx.checker.check_model(made, full_check=True)
    assert made.SerializeToString(deterministic=True) == _cleaned(69, 85).SerializeToString(deterministic=True)
    inside = [name for node in made.graph.node for name in node.output]
    assert inside == ["mul_2", "mul_3", "branch", "branch_2", "branch_1", "branch_3", "y"]
