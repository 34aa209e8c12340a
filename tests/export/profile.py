"""What ONNX Runtime runs of a file, counted by operator, nodes inside of branches among them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort


def profile(path: Path, feeds: Mapping[str, Any], folder: Path) -> tuple[list[Any], Counter[str]]:
    """The outputs for these inputs, and how many nodes of each operator have run."""
    options: Any = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text())
    names = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return outputs, Counter(names)
