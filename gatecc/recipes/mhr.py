"""Multi-head adapter routing: adapters that are mixed by a table of tasks."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.activation import Normalized
from gatecc.ir.gates.scorer import Lookup
from gatecc.ir.gates.source import Cond
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.split_low_rank import SplitLoras
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_ONE = {"sites": "linear[*.0.*.q_proj]", "experts": 3, "rank": 2, "tasks": 2}
_CHECKS = ("identity", "cost", "gradient", "reversible")


@recipe(
    "mhr",
    citation="Multi-Head Adapter Routing for Cross-Task Generalization (2022)",
    cases=[Case(samples.conditioned, _CHECKS, {**_ONE, "splits": 2})],
)
def mhr(
    tasks: int,
    task: str = "task",
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    experts: int = 8,
    splits: int = 4,
    rank: int = 8,
    alpha: float = 16.0,
) -> tuple[Rewrite, ...]:
    """Adapters on each Linear whose factors are mixed by a table: a row per task, in ``splits`` parts of the channels.

    Part s of A and of B is the sum over e of w_(s, e) times that of expert e; w = σ(Z) / (sum of σ(Z) over the experts
    of the part), Z the row of the sample's task. ``task`` is the input of the model that numbers it, 1 to
    ``tasks``; 0 is an unknown task, which takes all experts alike.

    MHR-z trains the tables alone, ``train=("*.weights.weight",)``. MHR-μ uses the mean adapter: call the model with
    task 0 and train the factors, ``train=("*.loras.*",)``. Every B starts at 0.
    """
    lookup = Lookup(tasks + 1, first_unknown=True)
    gate = GateSpec(Cond(task), lookup, "expert", Normalized(splits), init="uniform(0.001)")
    return (Branch(Selector.parse(sites).out, SplitLoras(experts, splits, rank, alpha), gate, label="weights"),)


@recipe(
    "poly",
    citation="Combining Parameter-efficient Modules for Task-level Generalisation (Polytropon, 2022)",
    cases=[Case(samples.conditioned, _CHECKS, _ONE)],
)
def poly(
    tasks: int,
    task: str = "task",
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    experts: int = 8,
    rank: int = 8,
    alpha: float = 16.0,
) -> tuple[Rewrite, ...]:
    """Adapters on each Linear that are mixed by a table with one row per task: `mhr` with one split.

    All channels of a layer share the mixture of a task, where `mhr` has one for each part of them. Adapters start at 0,
    so that the model starts as it was; a task that the table does not know takes their mean.
    """
    return mhr(tasks, task, sites, experts, 1, rank, alpha)
