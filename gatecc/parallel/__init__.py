"""Parallel: experts over many machines, on torch.distributed and nothing of our own."""

from gatecc.parallel.dispatch import AllGather as AllGather
from gatecc.parallel.dispatch import AllReduce as AllReduce
from gatecc.parallel.dispatch import AllToAll as AllToAll
from gatecc.parallel.dispatch import Dispatcher as Dispatcher
from gatecc.parallel.dispatch import Route as Route
from gatecc.parallel.experts import expert_parallel as expert_parallel
from gatecc.parallel.experts import expert_parameters as expert_parameters
from gatecc.parallel.gradients import clip_grad_norm_ as clip_grad_norm_
