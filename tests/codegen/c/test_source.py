"""Headers as one source: each once, where it is first included."""

from __future__ import annotations

from pathlib import Path

from gatecc.codegen.c.source import amalgamated


def test_each_header_comes_once_and_before_what_reads_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "base.h").write_text("#pragma once\n#include <math.h>\nint base;\n")
    (tmp_path / "left.h").write_text('// Left.\n#pragma once\n#include "inner/base.h"\nint left;\n')
    (tmp_path / "right.h").write_text('#pragma once\n#include "inner/base.h"\n#include "left.h"\nint right;\n')
    made = amalgamated([tmp_path / "right.h", tmp_path / "left.h"])
    assert made == "#include <math.h>\nint base;\n// Left.\nint left;\nint right;\n"
