"""What every test stands on: one thread, fixed seeds, no network, no examples that differ between runs."""

from __future__ import annotations

import os

# Before torch and transformers are imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles here: its pool is a process that imports torch, and one of it may outlive the tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests import leaving

# isort: split
import gc
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.machine import units

# Derandomised: a failure in CI is the same failure everywhere. No deadline: the first example pays for the tracing.
settings.register_profile(
    "gatecc",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("gatecc")
torch.set_num_threads(1)
# pytest hangs its handlers on every logger that does not propagate. On this one torch takes any handler for a wish to
# have each compilation described in JSON, which costs a third of the time of a capture.
logging.getLogger("torch.__trace").propagate = True


EVERYTHING = os.getenv("GATECC_ZOO") == "all"


def pytest_configure(config: pytest.Config) -> None:
    """A process of pytest-xdist has nothing to do after its tests."""
    config.addinivalue_line("markers", "broad(k): of its variants one in k runs by default, all with GATECC_ZOO=all")
    if hasattr(config, "workerinput"):
        leaving.at_once()


def pytest_report_header() -> str:
    """Which units this machine has of those that kernels are written for; tests of the others say: not run."""
    cpu = f"CPU: {', '.join(units()) or 'none of the vector units that gatecc knows'}; torch {torch.__version__}"
    broad = "all variants of broad tests" if EVERYTHING else "one in k of broad(k) tests; all with GATECC_ZOO=all"
    return f"{cpu}; {broad}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests marked ``broad(k)``, which cross many models or recipes, one variant in k; all where some are named."""
    if EVERYTHING or config.option.keyword or any("::" in str(arg) for arg in config.args):
        return
    seen: Counter[str] = Counter()
    dropped: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("broad")
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % marker.args[0]:
                dropped.append(item)
            seen[name] += 1
    items[:] = [item for item in items if item not in set(dropped)]
    config.hook.pytest_deselected(items=dropped)


def pytest_collection_finish() -> None:
    """What was imported stays: let the garbage collector leave it alone. A tenth of the time of all captures."""
    _settle()
    gc.set_threshold(200_000, 10, 10)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """And so does what torch keeps after a file, in its caches: another tenth, where files before have left much."""
    if nextitem is not None and nextitem.path != item.path:
        _settle()


def _settle() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seeds, dtype and grad mode, whatever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
