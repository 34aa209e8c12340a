"""Mixers, one family per file; importing this package makes all of them known by name."""

from gatecc.passes.mix.mixers.attention_free import AttentionFree as AttentionFree
from gatecc.passes.mix.mixers.base import Mixer as Mixer
from gatecc.passes.mix.mixers.base import Place as Place
from gatecc.passes.mix.mixers.gam import GAM as GAM
from gatecc.passes.mix.mixers.hopfield import Hopfield as Hopfield
from gatecc.passes.mix.mixers.hybrid import Liger as Liger
from gatecc.passes.mix.mixers.hybrid import LoLCATs as LoLCATs
from gatecc.passes.mix.mixers.lina import Lina as Lina
from gatecc.passes.mix.mixers.linear import Linear as Linear
from gatecc.passes.mix.mixers.manhattan import Manhattan as Manhattan
from gatecc.passes.mix.mixers.ninformer import NiNformer as NiNformer
from gatecc.passes.mix.mixers.pgn import PGN as PGN
from gatecc.passes.mix.mixers.spiking import SpikingAttention as SpikingAttention
from gatecc.passes.mix.mixers.spiking import SpikingConv as SpikingConv
from gatecc.passes.mix.mixers.vig import ViG as ViG
