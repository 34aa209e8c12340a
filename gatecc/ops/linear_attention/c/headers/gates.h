// What a state is multiplied by, of what is given: a log decay, or a logit whose logsigmoid, divided, is the log decay.
#pragma once
#include "../../../../codegen/c/headers/vectors.h"

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// log2(1 + t) for t from 0 to 1, to 5e-8 and what is rounded; exactly 0 at 0. The least largest error of its degree.
INLINE vf log2_above_one(vf t) {
    vf p = t * -9.3091269955e-3f + 5.2058856934e-2f;
    p = p * t - 1.3752111793e-1f;
    p = p * t + 2.4186459184e-1f;
    p = p * t - 3.4730100632e-1f;
    p = p * t + 4.7868368030e-1f;
    p = p * t - 7.2116577625e-1f;
    p = p * t + 1.4426898956f;
    return p * t;
}

// e^(inverse logsigmoid(x)), a root of sigmoid(x): 0 at -inf, 1 at inf, NaN for NaN.
INLINE vf root_of_sigmoid(vf x, float inverse) {
    const vf t = exponential(-magnitude(x)), negative = (vf)((vi)x & (vi)x >> 31);  // x below 0, else 0
    return power2((negative * 1.44269504088896341f - log2_above_one(t)) * inverse);
}

// The derivative of inverse logsigmoid(x): inverse sigmoid(-x).
INLINE vf slope_of_logit(vf x, float inverse) {
    const vf t = exponential(-magnitude(x));
    return either((vi)x >> 31, splat(1.0f), t) / (1.0f + t) * inverse;
}
