"""Loop: a site over several steps with a state between them."""

from gatecc.passes.loop.loop import Loop as Loop
