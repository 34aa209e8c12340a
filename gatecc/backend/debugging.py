"""``GATECC_DEBUG=FOLDER``: what is compiled, each in a folder of its own inside of it, numbered in order.

``repro.py`` runs alone: it rebuilds the graph of Dynamo, makes random inputs of the recorded sizes, compiles by gatecc
and compares with the graph run as it is. It is written first, so that it is there if a compilation fails. ``given.py``
and ``lowered.py`` are the graph that came and the one that goes to Inductor, ``outcomes.txt`` what each lowering says,
``times.txt`` what each step took. The programs between the steps stand beside the folder (gatecc.pipeline.debug).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.debug_utils import InputWriter, NNModuleToString

from gatecc.ir.files import write_atomic
from gatecc.passes.lower import Outcome
from gatecc.pipeline import Stage, debug

log = logging.getLogger(__name__)

# From a lowered graph to the sources of the kernels that it calls, by file name. Generators of kernels add functions.
KERNEL_SOURCES: list[Callable[[fx.GraphModule], Mapping[str, str]]] = []

_REPRO = '''"""A graph that gatecc compiled, with random inputs: python repro.py [BACKEND [MODE]]; gatecc by default."""

import math
import sys
from math import inf

import torch
import torch._dynamo
import torch.fx as fx
from torch import device, tensor
from torch._dynamo.debug_utils import InputReader

import gatecc

{imports}

{model}

{inputs}

OPTIONS = {options!r}

if __name__ == "__main__":
    backend = sys.argv[1] if len(sys.argv) > 1 else "gatecc"
    torch.manual_seed(0)
    reader = InputReader(save_dir=None)
    load_args(reader)
    model = Repro()
    how = {{"mode": sys.argv[2]}} if len(sys.argv) > 2 else {{"options": OPTIONS if backend == "gatecc" else None}}
    compiled = torch.compile(model, backend=backend, dynamic={dynamic}, **how)
    with torch.set_grad_enabled({grad}), torch.autocast({device!r}, enabled={autocast}):
        expected = model(*reader.args)
        found = compiled(*reader.args)
    for i, (a, b) in enumerate(zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))):
        if isinstance(a, torch.Tensor):
            print(f"output {{i}}: largest difference {{(a.double() - b.double()).abs().max().item():.3g}}")
'''


@dataclass
class Record:
    """What is written of one graph; an observer of its lowering. Without a ``folder`` nothing is."""

    folder: Path | None
    times: list[str] = field(default_factory=list[str])

    @staticmethod
    def of(graph_module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Record:
        """Begin a record, if GATECC_DEBUG names a folder."""
        record = Record(debug.folder("compile"))
        record.write("given.py", lambda: graph_module.print_readable(print_output=False))
        record.write("repro.py", lambda: repro(graph_module, inputs, options))
        return record

    def __call__(self, stage: Stage) -> None:
        self.times.append(str(stage))

    def lowered(self, graph: fx.GraphModule, outcomes: Sequence[Outcome]) -> None:
        """Write what the graph became, and why."""
        self.write("lowered.py", lambda: graph.print_readable(print_output=False))
        self.write("outcomes.txt", lambda: "\n\n".join(map(_text, outcomes)))
        for sources in KERNEL_SOURCES if self.folder is not None else ():
            for name, text in sources(graph).items():
                self.write(f"kernels/{name}", lambda text=text: text)

    def timed(self, work: Callable[[], Any]) -> Any:
        """Do the work of the compiler behind us, and write all times."""
        clock = time.process_time()
        done = work()
        self.times.append(
            f"the compiler behind gatecc: {time.process_time() - clock:.2f} s of CPU time in this process"
        )
        self.write("times.txt", lambda: "\n".join(self.times))
        return done

    def write(self, name: str, text: Callable[[], str]) -> None:
        """Write one file. What cannot be written stops no compilation."""
        if self.folder is None:
            return
        try:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text() + "\n")
        except Exception as e:
            log.warning("gatecc: %s was not written: %s: %s", name, type(e).__name__, e)


def repro(graph_module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A script that rebuilds a graph of Dynamo, compiles it and compares."""
    from torch._dynamo.debug_utils import extra_imports

    writer = InputWriter(None, stable_hash=True)
    sizes = False
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, torch.Tensor):
            writer.tensor(str(node.target), value)
        else:
            sizes = True
            writer.symint(str(node.target), value)
    device = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    return _REPRO.format(
        imports=extra_imports,
        model=NNModuleToString.convert(graph_module),
        inputs="\n".join(writer.lines()),
        options=dict(options) or None,
        dynamic=True if sizes else None,
        grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled(device),
        device=device,
    )


def _text(outcome: Outcome) -> str:
    head = f"{outcome.lowering}  {outcome.place}  {outcome.line}\n  found   {outcome.found}"
    lines = (("became", outcome.became), ("because", outcome.reason), ("gain", outcome.gain))
    return "\n".join([head, *(f"  {name:8}{text}" for name, text in lines if text)])
