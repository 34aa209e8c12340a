"""The ``gatecc`` command: inspect, transform, export, heal, recipes, doctor."""

from gatecc.cli.commands import app as app
