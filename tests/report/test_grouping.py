from __future__ import annotations

from gatecc.report.grouping import group


def names(*places: str) -> list[tuple[str, int]]:
    return [(found.place, len(found.rows)) for found in group(places, lambda p: p, lambda _: 0)]


def test_layers_share_a_row() -> None:
    assert names("a.0.b", "a.1.b", "a.2.b", "a.5.b") == [("a.[0-2,5].b", 4)]
    assert names("a.0.b.3", "a.1.b.3") == [("a.[0-1].b.3", 2)]
    assert names("0", "1") == [("[0-1]", 2)]


def test_only_whole_components_are_numbers() -> None:
    assert names("conv1.w", "conv2.w") == [("conv1.w", 1), ("conv2.w", 1)]


def test_ordinals_of_keys_stay_apart() -> None:
    assert names("l.0#0", "l.1#0", "l.0#1", "l.0#0@1") == [("l.[0-1]#0", 2), ("l.0#1", 1), ("l.0#0@1", 1)]


def test_rows_that_differ_are_not_grouped() -> None:
    found = group([("l.0", "a"), ("l.1", "b"), ("l.2", "a")], lambda r: r[0], lambda r: r[1])
    assert [g.place for g in found] == ["l.[0,2]", "l.1"]
