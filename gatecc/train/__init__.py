"""Training what a rewrite inserted, and measuring what it does."""

from gatecc.train import routing, tasks
from gatecc.train.acceptance import Drafts, drafts, fit_acceptance
from gatecc.train.calibration import coactivation
from gatecc.train.callbacks import lightning_callback, trainer_callback
from gatecc.train.channels import ChannelCosts, calibrate_channels, channel_costs
from gatecc.train.confidence import Stop, balance, confidence_traces, pareto, pick_threshold, stops
from gatecc.train.contexts import expert_losses, fit_contexts
from gatecc.train.contrast import TaskContrast
from gatecc.train.directions import mean_difference, probe
from gatecc.train.ensembles import expected_loss, member_losses, sweep, update_centres
from gatecc.train.exit_calibration import Calibration, Operating, calibrate, geometric_shares
from gatecc.train.exits import exit_costs, exit_labels, exit_logits, exits, fit_exemplars, fit_exits
from gatecc.train.heal import Healed, Point, heal
from gatecc.train.labels import gate_bce, topk_mass
from gatecc.train.lora import Adapters, Lora
from gatecc.train.losses import kld, next_token_loss, template_loss, topk_kld
from gatecc.train.maps import Mapped, class_maps, mask_pyramid
from gatecc.train.prefixes import train_counts, train_learners
from gatecc.train.reward import set_reward
from gatecc.train.stage import Transfer, Tune
from gatecc.train.steering import controller_inputs, controller_loss, fit_controller
from gatecc.train.subset import Budget, choose_subset, restrict
from gatecc.train.task_masks import FeatureDrift, task_training
from gatecc.train.thinking import Rollout, Thinking, rollout
from gatecc.train.threshold import ThresholdTracker, move_threshold, threshold_from_costs
from gatecc.train.zoom import TwoScales, fit_zoom

__all__ = [
    "Adapters",
    "Budget",
    "Calibration",
    "ChannelCosts",
    "Drafts",
    "FeatureDrift",
    "Healed",
    "Lora",
    "Mapped",
    "Operating",
    "Point",
    "Rollout",
    "Stop",
    "TaskContrast",
    "Thinking",
    "ThresholdTracker",
    "Transfer",
    "Tune",
    "TwoScales",
    "balance",
    "calibrate",
    "calibrate_channels",
    "channel_costs",
    "choose_subset",
    "class_maps",
    "coactivation",
    "confidence_traces",
    "controller_inputs",
    "controller_loss",
    "drafts",
    "exit_costs",
    "exit_labels",
    "exit_logits",
    "exits",
    "expected_loss",
    "expert_losses",
    "fit_acceptance",
    "fit_contexts",
    "fit_controller",
    "fit_exemplars",
    "fit_exits",
    "fit_zoom",
    "gate_bce",
    "geometric_shares",
    "heal",
    "kld",
    "lightning_callback",
    "mask_pyramid",
    "mean_difference",
    "member_losses",
    "move_threshold",
    "next_token_loss",
    "pareto",
    "pick_threshold",
    "probe",
    "restrict",
    "rollout",
    "routing",
    "set_reward",
    "stops",
    "sweep",
    "task_training",
    "tasks",
    "template_loss",
    "threshold_from_costs",
    "topk_kld",
    "topk_mass",
    "train_counts",
    "train_learners",
    "trainer_callback",
    "update_centres",
]
