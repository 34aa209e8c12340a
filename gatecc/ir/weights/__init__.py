"""Weights: what rewrites do to the modules and parameters of a layer, one effect per file."""

from gatecc.ir.weights.aside import aside_state as aside_state
from gatecc.ir.weights.aside import load_aside as load_aside
from gatecc.ir.weights.aside import modules_of as modules_of
from gatecc.ir.weights.drop import Drop as Drop
from gatecc.ir.weights.effect import Effect as Effect
from gatecc.ir.weights.effect import Tensors as Tensors
from gatecc.ir.weights.effect import Values as Values
from gatecc.ir.weights.effect import editable as editable
from gatecc.ir.weights.effect import effect_from_json as effect_from_json
from gatecc.ir.weights.effect import is_wrapped as is_wrapped
from gatecc.ir.weights.effect import joined as joined
from gatecc.ir.weights.effect import noise as noise
from gatecc.ir.weights.effect import suspended as suspended
from gatecc.ir.weights.new_module import Build as Build
from gatecc.ir.weights.new_module import Fill as Fill
from gatecc.ir.weights.new_module import NewModule as NewModule
from gatecc.ir.weights.scale_weight import ScaleWeight as ScaleWeight
from gatecc.ir.weights.shift_rows import ShiftRows as ShiftRows
from gatecc.ir.weights.split import Split as Split
from gatecc.ir.weights.widen_weight import WidenColumns as WidenColumns
from gatecc.ir.weights.widen_weight import WidenWeight as WidenWeight
