"""The ``gatecc`` command: inspect, explain, transform, export, heal, recipes, doctor."""

from gatecc.cli.commands import app as app
