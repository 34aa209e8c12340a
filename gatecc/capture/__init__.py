"""From a live model to Programs: torch.export on the model or its submodules, and what a capture baked in."""

from gatecc.capture.export import capture as capture
