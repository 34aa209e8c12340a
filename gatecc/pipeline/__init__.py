"""A Program through the compiler: `prepare` (canonicalize, find the sites), then `apply` (rewrite, verify).

Nobody else chains these steps. An observer is told of each of them: reports, timings, ``GATECC_DEBUG`` and the golden
cases are observers.
"""

from gatecc.pipeline.apply import Application as Application
from gatecc.pipeline.apply import apply as apply
from gatecc.pipeline.prepare import Prepared as Prepared
from gatecc.pipeline.prepare import canonical_form as canonical_form
from gatecc.pipeline.prepare import prepare as prepare
from gatecc.pipeline.stage import Observer as Observer
from gatecc.pipeline.stage import Stage as Stage
from gatecc.pipeline.stage import Times as Times
