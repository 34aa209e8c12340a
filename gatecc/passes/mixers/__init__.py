"""Mixers, one family a file; importing this package makes all of them known by name."""

from gatecc.passes.mixers.attention_free import AttentionFree as AttentionFree
from gatecc.passes.mixers.base import Mixer as Mixer
from gatecc.passes.mixers.base import Place as Place
from gatecc.passes.mixers.gam import GAM as GAM
from gatecc.passes.mixers.hopfield import Hopfield as Hopfield
from gatecc.passes.mixers.hybrid import Liger as Liger
from gatecc.passes.mixers.hybrid import LoLCATs as LoLCATs
from gatecc.passes.mixers.lina import Lina as Lina
from gatecc.passes.mixers.linear import Linear as Linear
from gatecc.passes.mixers.manhattan import Manhattan as Manhattan
from gatecc.passes.mixers.ninformer import NiNformer as NiNformer
from gatecc.passes.mixers.pgn import PGN as PGN
from gatecc.passes.mixers.vig import ViG as ViG
