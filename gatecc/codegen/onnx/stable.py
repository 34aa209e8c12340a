"""Stable: operators in forms that ONNX Runtime computes right at the ends of their ranges, in every dtype and opset.

torch.onnx writes ``log(sigmoid(x))``, which is -inf below -18 there, ``log(1 + x)``, ``exp(x) - 1``, and groups of a
large mean normalised in one pass; some operators it writes for float32 alone, or not at all. FORMS says each of them
in other ATen operators. It is the one place for that: a decomposition takes what its operator takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from gatecc.codegen.onnx.scalars import scalar

aten: Any = torch.ops.aten
Form = Callable[..., Any]
_DROPPED = 1e-7
_HALF = (torch.float16, torch.bfloat16)
FORMS: dict[Any, Form] = {}


def _form(*operators: Any) -> Callable[[Form], Form]:
    """Enter a decomposition of these overloads in FORMS."""

    def entered(function: Form) -> Form:
        FORMS.update(dict.fromkeys(operators, function))
        return function

    return entered


def _wide(function: Form) -> Form:
    """In float32 for half precision, as torch's kernels do, and for integers; the result in the dtype that was given.

    A correction for what rounding loses (``(1 + x) - 1``) means nothing where a runtime computes in a wider dtype than
    the graph says.
    """

    def called(*args: Any, **kwargs: Any) -> Tensor:
        given = next(x for x in args if isinstance(x, Tensor)).dtype
        narrow = given in _HALF or not given.is_floating_point
        wide = [x.float() if narrow and isinstance(x, Tensor) else x for x in args]
        result = function(*wide, **kwargs)
        return result.to(given) if given in _HALF else result

    return called


# --- logarithms and exponentials --------------------------------------------------------------------------------------


def _log1p_exp(x: Tensor) -> Tensor:
    """log(1 + exp(x)) for x <= 0 without Softplus, which ONNX Runtime has for float32 alone."""
    return _log1p(torch.exp(x))


@_form(aten.log1p.default)
@_wide
def _log1p(x: Tensor) -> Tensor:
    """What is lost of x in u = 1 + x is what u - 1 lacks of x (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1 + x
    kept = u - 1
    return torch.where(u == 1, x, torch.where(kept == x, torch.log(u), torch.log(u) * (x / kept)))


@_form(aten.expm1.default, aten.special_expm1.default)
@_wide
def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), where nothing cancels."""
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


@_form(aten.softplus.default)
@_wide
def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta
    soft = (scaled.clamp_min(0) + _log1p_exp(-scaled.abs())) / beta
    return torch.where(scaled > threshold, x, soft)


@_form(aten.log_sigmoid.default)
@_wide
def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.clamp_max(x, 0) - _log1p_exp(-x.abs())


@_form(aten.log_sigmoid_forward.default)
def _log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    return _log_sigmoid(x), x.new_zeros(0)  # the second result serves the backward pass


@_form(aten.logaddexp.default)
@_wide
def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """Equal arguments apart: infinity less itself is no number."""
    return torch.where(x == y, x + math.log(2), torch.maximum(x, y) + _log1p_exp(-(x - y).abs()))


@_form(aten.logaddexp2.default)
@_wide
def _logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    soft = _log1p_exp(-(x - y).abs() * math.log(2)) / math.log(2)
    return torch.where(x == y, x + 1, torch.maximum(x, y) + soft)


@_form(aten.logcumsumexp.default)
@_wide
def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    rows = _up_to_each(x, dim, -math.inf)
    return torch.logsumexp(rows, -1).movedim(-1, dim)


@_form(aten.binary_cross_entropy_with_logits.default)
def _cross_entropy_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - positive * _log_sigmoid(x)
    loss = loss if weight is None else loss * weight
    return (loss, loss.mean(), loss.sum())[reduction] if reduction in (1, 2) else loss


# --- what is the same but for its ends, or for rounding ---------------------------------------------------------------


def exact_sigmoid(x: Tensor) -> Tensor:
    """sigmoid with its relative precision down to the smallest numbers; ONNX Runtime's own is 0 below -18."""
    return torch.exp(torch.clamp_max(x, 0)) / (1 + torch.exp(-x.abs()))


@_form(aten.clamp.default)
def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Any:
    """With one bound: Clip would put the largest finite number for infinity at the other side."""
    if low is not None and high is not None:
        return _clamp_max(_clamp_min(x, low), high) if x.dtype == torch.float64 else NotImplemented
    return _clamp_min(x, low) if high is None else _clamp_max(x, high)


@_form(aten.clamp_min.default)
def _clamp_min(x: Tensor, low: float) -> Tensor:
    return torch.maximum(*_promoted(x, low))


@_form(aten.clamp_max.default)
def _clamp_max(x: Tensor, high: float) -> Tensor:
    return torch.minimum(*_promoted(x, high))


def _promoted(x: Tensor, bound: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(x, bound)
    return x.to(dtype), scalar(bound, dtype, x.device)


@_form(aten.add.Tensor, aten.add.Scalar)
def _add(x: Any, y: Any, alpha: float = 1) -> Any:
    """A small epsilon by Sum: onnxscript's optimizer takes Add of a number below 1e-8 for Add of zero, and drops it."""
    if not isinstance(x, Tensor) or not isinstance(y, float) or not 0 < abs(y * alpha) <= _DROPPED:
        return NotImplemented
    x, small = _promoted(x, y * alpha)
    return torch.onnx.ops.symbolic("Sum", [x, small], dtype=x.dtype, shape=x.shape, version=13)


@_form(aten.sub.Tensor, aten.sub.Scalar)
def _sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return _add(x, -y, alpha) if isinstance(y, float) else NotImplemented


@_form(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    """torch's own form is ``sub(number, x)``, of which torch.onnx finds no overload."""
    x = x if alpha == 1 else x * alpha
    return (y if isinstance(y, Tensor) else _promoted(x, y)[1]) - x


@_form(aten.remainder.Tensor, aten.remainder.Scalar)
def _remainder(x: Tensor, y: Any) -> Any:
    """From fmod, which is exact: x - floor(x / y) y is off by y where the quotient is large."""
    if not x.is_floating_point():
        return NotImplemented
    rest = torch.fmod(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@_form(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(x: Tensor, y: Any) -> Any:
    """floor(x / y) is one too many where the quotient is rounded up to a whole number."""
    if not x.is_floating_point():
        return NotImplemented
    quotient = (x - torch.fmod(x, y)) / y
    whole = torch.round(quotient)
    rest = torch.fmod(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), whole - 1, whole)


@_form(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _divide(x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Any:
    return _floor_divide(x, y) if rounding_mode == "floor" else NotImplemented


@_form(aten.group_norm.default)
def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """In two passes: GroupNormalization takes E[x^2] - E[x]^2, which is noise where the mean is large."""
    given = x.dtype
    rows = (x.float() if given in _HALF else x).reshape(x.size(0), groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    rows = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = rows.reshape(x.shape).to(given)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


# --- what ONNX Runtime has for float32 alone --------------------------------------------------------------------------


def _for_float64(*operators: Any) -> Callable[[Form], Form]:
    """Enter a form for float64; other dtypes keep the operator, which is one node of a runtime's own."""

    def entered(function: Form) -> Form:
        def called(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(x, *args, **kwargs) if x.dtype == torch.float64 else NotImplemented

        return _form(*operators)(called)

    return entered


@_for_float64(aten.elu.default)
def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return _elu_of(x, alpha, scale, input_scale)


def _elu_of(x: Tensor, alpha: float, scale: float, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, x * scale, _expm1(x * input_scale) * (alpha * scale))


@_for_float64(aten.selu.default)
def _selu(x: Tensor) -> Tensor:
    return _elu_of(x, 1.6732632423543772, 1.0507009873554805)


@_for_float64(aten.celu.default)
def _celu(x: Tensor, alpha: float = 1) -> Tensor:
    return torch.where(x > 0, x, _expm1(x / alpha) * alpha)


@_for_float64(aten.leaky_relu.default)
def _leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


@_for_float64(aten.hardsigmoid.default)
def _hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


@_for_float64(aten.hardswish.default)
def _hardswish(x: Tensor) -> Tensor:
    return x * ((x + 3).clamp(0, 6) / 6)


@_for_float64(aten.mish.default)
def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(_softplus(x))


@_for_float64(aten.sinh.default)
def _sinh(x: Tensor) -> Tensor:
    small = _expm1(x.abs())
    return torch.sign(x) * (small + small / (small + 1)) / 2


@_for_float64(aten.cosh.default)
def _cosh(x: Tensor) -> Tensor:
    large = torch.exp(x.abs())
    return (large + 1 / large) / 2


@_for_float64(aten.asinh.default)
def _asinh(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.sign(x) * _log1p(size + size * size / (1 + torch.sqrt(size * size + 1)))


# --- what torch.onnx does not write -----------------------------------------------------------------------------------


@_form(aten.hypot.default)
@_wide
def _hypot(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = small / torch.where(large == 0, torch.ones_like(large), large)
    return torch.where(torch.isinf(large), large, large * torch.sqrt(1 + ratio * ratio))


@_form(aten.fmax.default)
def _fmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))


@_form(aten.fmin.default)
def _fmin(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


@_form(aten.signbit.default)
def _signbit(x: Tensor) -> Tensor:
    """Minus zero has it too, and its reciprocal shows it."""
    return (x < 0) | ((x == 0) & (torch.reciprocal(x) < 0)) if x.is_floating_point() else x < 0


@_form(aten.copysign.Tensor)
def _copysign(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(_signbit(y), -x.abs(), x.abs())


@_form(aten.rrelu.default)
def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any) -> Any:
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


@_form(aten.sort.stable)
def _stable_sort(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK takes the first of equal values first, so each sort in ONNX is stable."""
    return aten.sort.default(x, dim, descending)


@_form(aten.argsort.stable)
def _stable_order(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return aten.sort.default(x, dim, descending)[1]


@_form(aten.cumprod.default)
def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return torch.prod(_up_to_each(x, dim, 1), -1).movedim(-1, dim)


@_form(aten.cummax.default)
def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest value up to each place, and where it is; of equal ones the last."""
    moved = x.movedim(dim, -1)
    at = torch.arange(moved.size(-1), device=x.device)
    least = torch.iinfo(x.dtype).min if not x.dtype.is_floating_point else -torch.inf
    values = torch.where(at <= at[:, None], moved.unsqueeze(-2), least).amax(-1)
    places = torch.where((at <= at[:, None]) & (moved.unsqueeze(-2) == values.unsqueeze(-1)), at, -1).amax(-1)
    return values.movedim(-1, dim), places.movedim(-1, dim)


@_form(aten.cummin.default)
def _cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    best, places = _cummax(-x, dim)
    return -best, places


def _up_to_each(x: Tensor, dim: int, other: float) -> Tensor:
    """(..., N, ...) -> (..., N, N): for each place the entries up to it, and ``other`` after it."""
    x = x.movedim(dim, -1)
    places = torch.arange(x.size(-1), device=x.device)
    return torch.where(places <= places[:, None], x.unsqueeze(-2), other)


@_form(aten.cdist.default, aten._cdist_forward.default)
def _cdist(x: Tensor, y: Tensor, p: float = 2.0, *_: Any) -> Tensor:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def _opened(operator: Any) -> Form:
    """The operator as torch itself composes it: what torch.onnx writes for it has another rank than its result."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return called


for _operator in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default):
    FORMS[_operator] = _opened(_operator)
for _operator in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
    FORMS[_operator] = decomposition_table[_operator]
FORMS[aten.nll_loss2d.default] = _opened(aten.nll_loss2d.default)
