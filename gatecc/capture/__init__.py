"""A model becomes a Program: torch.export first, the owner submodules where that fails, and a Dynamo graph."""
