"""The architectures that rewritten models are handed to. Each is known by being here."""
