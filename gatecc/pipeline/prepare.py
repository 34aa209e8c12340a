"""prepare: a captured program becomes canonical, and its sites are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from gatecc.ir.edit import Editor, Replace
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program
from gatecc.ir.settle import settle
from gatecc.ir.site import Refusal, Site
from gatecc.passes.canonicalize import canonicalize
from gatecc.pipeline.stage import Observer, step


@dataclass(eq=False)
class Prepared:
    """A canonical program with its sites, which follow the edits that `apply` does.

    ``found`` are the sites before any edit, ``sites`` the same with the values that they have now.
    """

    program: Program
    found: Sequence[Site]
    refusals: Sequence[Refusal] = ()
    _moved: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    _gone: set[fx.Node] = field(default_factory=set[fx.Node])

    @property
    def sites(self) -> Sequence[Site]:
        """All sites as they are now."""
        return [self.now(site) for site in self.found] if self._moved else self.found

    def now(self, site: Site) -> Site:
        """One site as it is now, without the values that an edit did away with."""
        if not any(value.node in self._moved or value.node in self._gone for value in site.values.values()):
            return site
        values = {name: replace(value, node=self._last(value.node)) for name, value in site.values.items()}
        return replace(site, values={name: value for name, value in values.items() if value.node not in self._gone})

    def note(self, edit: Editor) -> None:
        """Remember what an edit replaced for all readers, and what it erased."""
        self._moved.update({s.old: s.new for s in edit.steps if isinstance(s, Replace) and not s.some})
        self._gone |= edit.erased

    def _last(self, node: fx.Node) -> fx.Node:
        while node in self._moved:
            node = self._moved[node]
        return node


def canonical_form(program: Program, observer: Observer | None = None) -> Program:
    """The program, brought into canonical form in place: for what needs no sites. Raises CaptureError as `prepare`."""
    with step("canonicalize", program, observer):
        canonicalize(program)
        settle(program)
    return program


def prepare(program: Program, observer: Observer | None = None, *, canonical: bool = False) -> Prepared:
    """Bring a program into canonical form, in place, and find its sites.

    ``canonical``: it has that form already. Raises CaptureError if a marker of the capture went into a region that
    stays a graph of its own.
    """
    if not canonical:
        canonical_form(program, observer)
    with step("match", program, observer):
        sites = find_sites(program)
    return Prepared(program, sites.sites, sites.refusals)
