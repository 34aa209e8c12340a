// The nonlinearities of activations.py, by their place in kernels.py.
#pragma once
#include "../../../../codegen/c/headers/numbers.h"

enum { IDENTITY, RELU, RELU2, RELU6, SILU, GELU, GELU_TANH, QUICK_GELU, TANH, SIGMOID, MISH, SOFTPLUS, HARDSWISH,
       LEAKY_RELU, ELU, SELU, SWIGLU };

struct function {
    int32_t kind;
    float alpha, limit;  // its options in their order: slope, alpha, limit
};

INLINE vf least(vf x, vf y) { return either(x > y, y, x); }   // NaN stays NaN in x
INLINE vf most(vf x, vf y) { return either(x < y, y, x); }
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// The normal distribution at x, to 2e-7 relative on both sides (Numerical Recipes, erfcc).
INLINE vf normal(vf x) {
    const vf z = either(x < 0.0f, -x, x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.5f * z);
    vf p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const vf tail = 0.5f * t * exponential(p - z * z);
    return either(x < 0.0f, tail, 1.0f - tail);
}

typedef float (*scalar)(float);
APART vf each(scalar f, vf x) {
    for (int i = 0; i < LANES; i++) ((float *)&x)[i] = f(((float *)&x)[i]);
    return x;
}
static float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

INLINE vf pointwise(const struct function *f, vf x) {
    switch (f->kind) {
    case RELU: return most(x, splat(0.0f));
    case RELU2: x = most(x, splat(0.0f)); return x * x;
    case RELU6: return least(most(x, splat(0.0f)), splat(6.0f));
    case SILU: return x * sigmoid(x);
    case GELU: return x * normal(x);
    case GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case TANH: return each(tanhf, x);
    case SIGMOID: return sigmoid(x);
    case MISH: {
        const vf e = exponential(least(x, splat(20.0f))), n = e * (e + 2.0f);
        return x * (n / (n + 2.0f));
    }
    case SOFTPLUS: return each(softplus, x);
    case HARDSWISH: return x * least(most(x + 3.0f, splat(0.0f)), splat(6.0f)) / 6.0f;
    case LEAKY_RELU: return either(x > 0.0f, x, x * f->alpha);
    case ELU: return either(x > 0.0f, x, f->alpha * each(expm1f, x));
    case SELU: return 1.0507009873554805f * either(x > 0.0f, x, 1.6732632423543772f * each(expm1f, x));
    default: return x;
    }
}

// The derivative of ``pointwise`` at x.
INLINE vf slope(const struct function *f, vf x) {
    const vf zero = splat(0.0f), one = splat(1.0f);
    switch (f->kind) {
    case RELU: return either(x > zero, one, zero);
    case RELU2: return 2.0f * most(x, zero);
    case RELU6: return either((x > zero) & (x < 6.0f), one, zero);
    case SILU: {
        const vf s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
    case GELU: return normal(x) + x * 0.3989422804014327f * exponential(-0.5f * x * x);
    case GELU_TANH: {
        const vf s = sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
        return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    }
    case QUICK_GELU: {
        const vf s = sigmoid(1.702f * x);
        return s + 1.702f * x * s * (1.0f - s);
    }
    case TANH: {
        const vf y = each(tanhf, x);
        return 1.0f - y * y;
    }
    case SIGMOID: {
        const vf s = sigmoid(x);
        return s * (1.0f - s);
    }
    case MISH: {
        const vf e = exponential(least(x, splat(20.0f))), n = e * (e + 2.0f), t = n / (n + 2.0f);
        return t + x * sigmoid(x) * (1.0f - t * t);
    }
    case SOFTPLUS: return either(x > 20.0f, one, sigmoid(x));
    case HARDSWISH: return either(x < -3.0f, zero, either(x > 3.0f, one, x / 3.0f + 0.5f));
    case LEAKY_RELU: return either(x > zero, one, splat(f->alpha));
    case ELU: return either(x > zero, one, f->alpha * exponential(x));
    case SELU: return 1.0507009873554805f * either(x > zero, one, 1.6732632423543772f * exponential(x));
    default: return one;
    }
}

INLINE vf gated(const struct function *f, vf gate, vf up) {
    if (f->kind == SILU) return gate * up / (1.0f + exponential(-gate));
    if (f->kind != SWIGLU) return pointwise(f, gate) * up;
    gate = least(gate, splat(f->limit));
    up = most(least(up, splat(f->limit)), splat(-f->limit));
    return gate * sigmoid(f->alpha * gate) * (up + 1.0f);
}

// What ``gated`` gives, and its derivatives by gate and up.
INLINE vf gated_slopes(const struct function *f, vf gate, vf up, vf *of_gate, vf *of_up) {
    if (f->kind == SILU) {
        const vf s = sigmoid(gate), y = gate * s;
        *of_gate = up * s * (1.0f + gate * (1.0f - s));
        *of_up = y;
        return y * up;
    }
    if (f->kind != SWIGLU) {
        const vf y = pointwise(f, gate);
        *of_gate = slope(f, gate) * up;
        *of_up = y;
        return y * up;
    }
    const vf zero = splat(0.0f), limit = splat(f->limit);
    const vf g = least(gate, limit), u = most(least(up, limit), -limit);
    const vf s = sigmoid(f->alpha * g);
    *of_gate = either(gate <= f->limit, (u + 1.0f) * s * (1.0f + f->alpha * g * (1.0f - s)), zero);
    *of_up = either((up <= f->limit) & (up >= -f->limit), g * s, zero);
    return g * s * (u + 1.0f);
}
