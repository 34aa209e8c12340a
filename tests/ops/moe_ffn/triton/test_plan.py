"""The plan of the GPU kernels: every slot in one block, no block of two experts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatecc.ops.moe_ffn.triton.plan import plan


@given(
    indices=st.lists(st.integers(-2, 6), min_size=1, max_size=70),
    rows=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=60, deadline=None)
def test_every_slot_is_in_one_block(indices: list[int], rows: int) -> None:
    E = 4
    flat = torch.tensor(indices)
    found = plan(flat[:, None], E, rows)
    wanted = [i if 0 <= i < E else E for i in indices]  # what is no expert is an empty slot
    seen: list[int] = []
    for expert, first, count in found.table.tolist():
        assert 0 <= count <= rows
        slots = found.order[first : first + count].tolist()
        assert all(wanted[slot] == expert for slot in slots)
        assert slots == sorted(slots)
        seen += slots
    assert sorted(seen) == list(range(len(indices)))
    assert found.number == len(found.table)
    assert found.experts.tolist() == sorted(wanted)
    assert found.edges.tolist() == [sum(w < e for w in wanted) for e in range(E + 2)]
