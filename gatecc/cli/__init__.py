"""The ``gatecc`` command: inspect, explain, transform, export, heal, cost, recipes, doctor."""

from gatecc.cli.commands import app as app
from gatecc.cli.cost import cost as cost  # enters itself
