// From scores to weights: cap, bias, what is not seen, and the sums of before rescaled to the largest score so far.
#pragma once
#include "pack.h"

#define LN2 0.693147180559945309f

// tanh to 3e-7 relative: e^2x - 1 over e^2x + 1, the first without cancellation.
INLINE vf hyperbolic_tangent(vf x) {
    const vf y = between(splat(-10.0f), x, splat(10.0f)) * (2.0f * LOG2E);
    const vf shifted = y + 12582912.0f, rest = y - (shifted - 12582912.0f);  // the nearest integer
    const vf power = (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
    vf p = rest * 1.52527338e-5f + 1.54035304e-4f;  // (2^rest - 1) / rest
    p = p * rest + 1.33335581e-3f;
    p = p * rest + 9.61812911e-3f;
    p = p * rest + 5.55041087e-2f;
    p = p * rest + 2.40226507e-1f;
    p = p * rest + 6.93147181e-1f;
    const vf minus = power * (p * rest) + (power - 1.0f);
    return minus / (minus + 2.0f);
}

static const float ORDER[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// -inf at the keys that are not in a range, key being the first of the vector.
INLINE vf hidden_outside(vf s, int64_t key, struct range r) {
    const vf at = load(ORDER), low = splat((float)(r.from - key)), high = splat((float)(r.to - key));
    return either((at >= low) & (at < high), s, splat(-INFINITY));
}

// A score and its bias, in powers of two. The least finite numbers, which hide a key where there is another one, stay
// finite: 3e38 * log2(e) is not.
INLINE vf biased(const struct layout *bias, const void *row, vf s, int64_t key, int64_t n) {
    if (bias->kind != BOOLEANS) {
        const vf x = floats_at(bias, row, key, n), low = splat(-2.3e38f);
        return s + either((x < low) & (x > -INFINITY), low, x) * LOG2E;
    }
    const uint8_t *const seen = row;
    if (!bias->step) return *seen ? s : splat(-INFINITY);
    typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    bytes x = {0};
    if (n >= LANES) x = *(const bytes *)(seen + key);
    else memcpy(&x, seen + key, (size_t)n);
    return either(__builtin_convertvector(x, vi) != 0, s, splat(-INFINITY));
}

// The largest of a vector and its sum: halves are folded onto each other.
INLINE vf most_of(vf x, vf y) { return either(x < y, y, x); }
#if LANES == 16
#define FOLD(x, f) \
    x = f(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = f(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = f(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = f(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#elif LANES == 8
#define FOLD(x, f) \
    x = f(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    x = f(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5)); \
    x = f(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6))
#else
#define FOLD(x, f) \
    x = f(x, SHUFFLE(x, x, 2, 3, 0, 1)); \
    x = f(x, SHUFFLE(x, x, 1, 0, 3, 2))
#endif
INLINE float largest_of(vf x) {
    FOLD(x, most_of);
    return x[0];
}
INLINE vf plus(vf x, vf y) { return x + y; }
INLINE float sum_of(vf x) {
    FOLD(x, plus);
    return x[0];
}

struct row {
    struct range keys;  // that it sees, counted from the first of the block
    const void *bias;   // its row, from the first key of the block on
};

// Scores of one row, in powers of two: what they become by cap and bias, and the largest of them.
INLINE float largest_score(
    const struct attention *p, const struct row *row, float *s, int64_t from, int64_t to, int64_t count, float factor
) {
    const int plain = PAIR == 1 && !p->cap && !row->bias;
    vf most = splat(-INFINITY);
    for (int64_t key = from; key < to; key += LANES) {
        vf x = load(s + key);
        const int inside = key >= row->keys.from && key + LANES <= row->keys.to;
        if (!plain || !inside) {
            if (PAIR == 2) x = x * factor;
            if (p->cap) x = hyperbolic_tangent(x) * (p->cap * LOG2E);
            if (row->bias) x = biased(&p->bias, row->bias, x, key, count - key);
            if (!inside) x = hidden_outside(x, key, row->keys);
            store(s + key, x);
        }
        most = most_of(most, x);
    }
    return largest_of(most);
}

// Weights 2^(score - shift), as lanes of numbers in the place of the scores, and their sum.
INLINE float weigh(float *s, int64_t from, int64_t to, float shift) {
    vf total = splat(0.0f);
    const vf below = splat(shift);
    for (int64_t key = from; key < to; key += LANES) {
        const vf w = power2(load(s + key) - below);
        total = total + w;
#if PAIR == 2
        store_els((el *)(void *)s + key, w, LANES);
#else
        store(s + key, w);
#endif
    }
    return sum_of(total);
}
