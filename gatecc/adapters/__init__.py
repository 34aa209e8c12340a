"""Adapters: LoRA checkpoints of peft become the experts of a bank, and an expert becomes a checkpoint of peft."""

from gatecc.adapters.load import load as load
from gatecc.adapters.read import Adapter as Adapter
from gatecc.adapters.read import Factors as Factors
from gatecc.adapters.read import read as read
from gatecc.adapters.save import save as save
