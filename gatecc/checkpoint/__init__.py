"""Checkpoint: a transformed model as its recipe (readable, replayable) and its weights.

A folder holds ``recipe.json`` (every transform step, the tensors of the base model and the new ones, the file names
with their SHA-256) and safetensors files: ``model`` (the whole state dict, tied weights once) or ``new`` (only what the
transforms added), and ``example`` (example inputs, with which the graphs are captured again: made up, unless asked
for). A folder of ``save_pretrained`` gets the recipe as well; its weights stay where that puts them.
"""

from gatecc.checkpoint import pretrained as pretrained
from gatecc.checkpoint.materialise import materialise as materialise
from gatecc.checkpoint.read import load as load
from gatecc.checkpoint.write import save as save
