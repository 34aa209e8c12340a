"""The ``gatecc`` command: inspect, transform, export, recipes, doctor."""

from gatecc.cli.commands import app as app
