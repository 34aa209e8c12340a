"""A file of opset 27 is one that was written at 24: nothing has changed its meaning on the way."""

from __future__ import annotations

import onnx
import pytest

from gatecc.codegen.onnx.opset import RAISED, WRITTEN


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < RAISED, reason="this onnx does not know opset 27")
def test_no_operator_says_something_else_since_the_opset_that_is_written() -> None:
    """An operator may take more types, attributes with a default, optional inputs; it keeps all that it had."""
    changed = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain and s.since_version <= RAISED]
    names = {s.name for s in changed if s.since_version > WRITTEN}
    for name in names & {s.name for s in changed if s.since_version <= WRITTEN}:
        before, after = (onnx.defs.get_schema(name, version) for version in (WRITTEN, RAISED))
        for ends in ("inputs", "outputs"):
            old, new = ([e.name for e in getattr(s, ends)] for s in (before, after))
            assert new[: len(old)] == old, name
        for attribute in before.attributes.values():
            kept = after.attributes[attribute.name]
            assert (kept.type, kept.default_value) == (attribute.type, attribute.default_value), name
        added = [a for a in after.attributes.values() if a.name not in before.attributes]
        assert not any(a.required for a in added), name
        assert {t for c in before.type_constraints for t in c.allowed_type_strs} <= {
            t for c in after.type_constraints for t in c.allowed_type_strs
        }, name
