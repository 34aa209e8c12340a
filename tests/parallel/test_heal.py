"""heal in two processes: the steps of one process that accumulates two batches, resumed, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.train.ranks import Ranks
from tests.parallel.worker import healed, healed_experts, upcycled

Found = list[dict[str, Any]]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_two_ranks_take_the_steps_of_one_that_accumulates(ranks: Found) -> None:
    """The first rank's random numbers decide the order, its weights are everyone's."""
    right = healed(accumulate=2)
    for found in ranks:
        got = found["healed whole"]
        assert apart(got["weights"], right["weights"]) <= 1e-6
        assert [p.tokens for p in got["curve"]] == [p.tokens for p in right["curve"]]
        assert [p.loss for p in got["curve"][1:]] == pytest.approx([p.loss for p in right["curve"][1:]], abs=1e-6)
        assert [p.value for p in got["curve"]] == pytest.approx([p.value for p in right["curve"]], abs=1e-5)
    first, second = (found["healed whole"] for found in ranks)
    assert all(torch.equal(second["weights"][n], t) for n, t in first["weights"].items())
    assert not torch.equal(first["random"], second["random"])


def test_a_run_that_was_cut_off_goes_on_bit_by_bit(ranks: Found) -> None:
    for found in ranks:
        whole, on = found["healed whole"], found["healed gone on"]
        assert on["seen"] < whole["seen"]
        assert all(torch.equal(on["weights"][n], t) for n, t in whole["weights"].items())
        assert [p.loss for p in on["curve"][1:]] == [p.loss for p in whole["curve"][1:]]
        assert torch.equal(on["random"], whole["random"])
        assert sum(name == "heal.json" for name in found["written"]) == 1


def test_experts_on_two_ranks_are_healed_as_on_one(ranks: Found, tmp_path: Path) -> None:
    """Their gradients are means already, they are clipped with all others, and kept whole in the checkpoint."""
    first = healed_experts(upcycled(), 2, 2, tmp_path / "one")
    again = healed_experts(upcycled(), 3, 2, tmp_path / "one")
    assert apart(first, again) > 1e-5
    for found in ranks:
        assert apart(found["healed experts"], first) <= 1e-6
        assert apart(found["healed experts again"], again) <= 1e-6
        assert apart(found["healed experts, fsdp"], first) <= 1e-6
        assert apart(found["healed experts again, fsdp"], again) <= 1e-6


def test_torchrun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"(?s)WORLD_SIZE=2.*init_process_group"):
        Ranks()
