"""apply: rewrites done on a prepared program, one after the other, each verified before the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gatecc.capture.guards import LaterGuards
from gatecc.errors import CaptureError, GateccError, GraphError
from gatecc.ir.boundary import held, within
from gatecc.ir.edit import Editor
from gatecc.ir.functions import entries
from gatecc.ir.printer import window
from gatecc.ir.program import Program
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import select
from gatecc.ir.site import Site
from gatecc.ir.verify import Before, Suspect, verify
from gatecc.pipeline.prepare import Prepared
from gatecc.pipeline.stage import Observer, step


@dataclass(frozen=True)
class Application:
    """One rewrite and where it is done in a program: (owner relative to the program, ordinal) of each site."""

    rewrite: Rewrite
    sites: tuple[tuple[str, int], ...]


def apply(
    prepared: Prepared,
    rewrites: Sequence[Rewrite | Application],
    observer: Observer | None = None,
    *,
    own: set[str] | None = None,
) -> list[list[Editor]]:
    """Do rewrites in order on a program; the editors of each, one for each of its sites.

    A rewrite is done at the sites that it selects, an application where it says. ``own``: paths of the modules that
    gatecc made earlier, which are found again instead of made; it grows. Raises GraphError, which names the rewrite,
    the site and its line; CaptureError if an application names a site that the graph lacks.
    """
    program = prepared.program
    own = set[str]() if own is None else own
    taken: set[str] = set()
    sizes = LaterGuards(program.placeholders)
    editors: list[list[Editor]] = []
    for wanted in rewrites:
        rewrite = wanted.rewrite if isinstance(wanted, Application) else wanted
        sites = _places(prepared, wanted) if isinstance(wanted, Application) else select(rewrite.site, prepared.sites)
        with step("rewrite", program, observer, rewrite):
            editors.append(_rewrite(rewrite, prepared, sites, own, taken))
    with step("clean", program, observer):
        seen = held(program.boundaries) | entries(program.functions)
        program.graph.eliminate_dead_code(lambda node: node in seen or node.is_impure())
        program.guards += [guard for guard in sizes.found() if guard not in program.guards]
        _check_gone(program, [edit for of_one in editors for edit in of_one])
    return editors


def _places(prepared: Prepared, application: Application) -> list[Site]:
    """The sites that an application names."""
    program, kind = prepared.program, application.rewrite.site.kind
    places = {site: (program.relative_name(site.owner), site.ordinal) for site in prepared.found if site.kind == kind}
    for owner, ordinal in set(application.sites) - set(places.values()):
        raise CaptureError(
            "a rewritten site does not exist in this kind of call",
            where=program.full_name(owner) or "model",
            found=f"no {kind} site #{ordinal} in the graph of this call",
            do="call the model as in the example inputs, or transform it with example inputs of this kind",
        )
    return [site for site, place in places.items() if place in application.sites]


def _rewrite(
    rewrite: Rewrite, prepared: Prepared, sites: Sequence[Site], own: set[str], taken: set[str]
) -> list[Editor]:
    """One rewrite at its sites, verified structurally."""
    program = prepared.program
    before = Before.of(program)
    effects = rewrite.effects()
    replaces = replaced_by(program, sites) if effects.loses_parameters else set[str]()
    editors: list[Editor] = []
    for site in map(prepared.now, sites):
        edit = Editor(program, site, rewrite.name, own, taken, sites=prepared.sites, effects=effects)
        edit.selected = rewrite.site
        try:
            rewrite.rewrite(site, edit)
        except GateccError:
            raise
        except Exception as e:
            place = f"{rewrite} at {site.key} {site.line}".strip()
            found = f"{e}\n{window(edit.site_node)}"
            raise GraphError(f"the rewrite raised {type(e).__name__}", where=place, found=found) from e
        editors.append(edit)
        prepared.note(edit)
    inserted = {node for edit in editors for node in edit.inserted}
    lost = {name for edit in editors for name in (*edit.lost, *edit.gone)}
    hidden = {number for edit in editors for number in edit.hidden} if effects.loses_outputs else set[int]()
    verify(program, before, Suspect(str(rewrite), sites, inserted, effects.loses_buffers, replaces | lost, own, hidden))
    return editors


def replaced_by(program: Program, sites: Sequence[Site]) -> set[str]:
    """What a rewrite may leave unread: the owners of its sites, and weights of theirs that lie elsewhere."""
    weights = [w for site in sites for w in site.weights.values()]
    names = {site.owner for site in sites} | {n for w in weights for n in (w.fqn, w.bias) if n}
    return {program.relative_name(name) for name in names}


def _check_gone(program: Program, editors: Sequence[Editor]) -> None:
    """Raise GraphError if a rewritten graph reads something that its own edits take out of the layer."""
    for editor in editors:
        for path in editor.gone:
            reader = next((n for n in program.graph.find_nodes(op="get_attr") if within(str(n.target), path)), None)
            if reader is None:
                continue
            user = next(iter(reader.users), reader)
            raise GraphError(
                f"the rewrite {editor.rewrite} takes out of the model what the graph still reads",
                where=f"{editor.site.owner} {editor.site.line}".strip(),
                found=f"{program.full_name(str(reader.target))}\n{window(user)}",
                do="replace and discard every value that is computed from it; split a weight with one reader",
            )
