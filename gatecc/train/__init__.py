"""Training what a rewrite inserted."""

from gatecc.train.labels import gate_bce, topk_mass
from gatecc.train.reward import set_reward
from gatecc.train.threshold import ThresholdTracker, move_threshold, threshold_from_costs

__all__ = ["ThresholdTracker", "gate_bce", "move_threshold", "set_reward", "threshold_from_costs", "topk_mass"]
