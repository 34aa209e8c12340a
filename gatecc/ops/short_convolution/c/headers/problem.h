// A causal convolution of TAPS taps along tokens, each channel by itself, with SiLU behind it or not: y[t] = the sum of
// weight[j] x[t - (TAPS - 1) + j] and the bias. Channels lie together, so they are the lanes.
#pragma once
#include "../../../../codegen/c/headers/numbers.h"
#include "../../../../codegen/c/headers/pages.h"
#include "../../../../codegen/c/headers/threads.h"

#define BEFORE (TAPS - 1)
#define ABREAST 4  // tokens whose inputs and weights are read once
#define CHUNK 64   // tokens of a job

struct convolution {
    const el *x;  // (B, N, C), its last stride 1
    int64_t samples, tokens;  // the other strides of x
    const el *weight, *bias;  // (C, TAPS), (C) or NULL
    const el *state;          // (B, BEFORE, C), what is in front of x, or NULL for zeros
    int64_t B, N, C;
    int32_t silu, threads;
};

struct work {
    const struct convolution *p;
    const el *zeros;    // (C)
    const float *taps;  // (TAPS + 1, width): a row a tap, and the bias
    int64_t width, chunks;
};

INLINE int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// Taps as floats, and a row of zeros behind them. NULL without memory; to be freed.
APART float *prepare(const struct convolution *p, struct work *w) {
    const int64_t width = padded(p->C);
    float *const taps = calloc((size_t)(TAPS + 2) * width, sizeof(float));
    if (!taps) return NULL;
    for (int64_t c = 0; c < p->C; c++) {
        for (int j = 0; j < TAPS; j++) taps[j * width + c] = widen(p->weight[c * TAPS + j]);
        taps[TAPS * width + c] = p->bias ? widen(p->bias[c]) : 0;
    }
    *w = (struct work){p, (const el *)(taps + (TAPS + 1) * width), taps, width, (p->N + CHUNK - 1) / CHUNK};
    return taps;
}

// The inputs of a token: of the state before the first, zeros behind the last.
INLINE const el *row_of(const struct work *w, int64_t sample, int64_t token) {
    const struct convolution *const p = w->p;
    if (token >= p->N || (token < 0 && !p->state)) return w->zeros;
    if (token < 0) return p->state + (sample * BEFORE + BEFORE + token) * p->C;
    return p->x + sample * p->samples + token * p->tokens;
}

// The sum over taps of a token, given LANES channels of its inputs.
INLINE vf weighed(const struct work *w, const vf *x, int64_t c) {
    vf y = load(w->taps + TAPS * w->width + c);
    UNROLL for (int j = 0; j < TAPS; j++) y += load(w->taps + j * w->width + c) * x[j];
    return y;
}
