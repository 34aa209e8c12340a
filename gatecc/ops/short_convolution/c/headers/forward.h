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
    el *y;                    // (B, N, C), contiguous
    int64_t B, N, C;
    int32_t silu, threads;
};

struct work {
    const struct convolution *p;
    const el *zeros;  // (C): what is in front of the first token
    const float *taps;  // (TAPS + 1, width): a row a tap, and the bias
    int64_t width, chunks;
};

INLINE int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

APART void turn(const struct convolution *p, float *taps, int64_t width) {
    for (int64_t c = 0; c < p->C; c++) {
        for (int j = 0; j < TAPS; j++) taps[j * width + c] = widen(p->weight[c * TAPS + j]);
        taps[TAPS * width + c] = p->bias ? widen(p->bias[c]) : 0;
    }
}

INLINE const el *row_of(const struct work *w, int64_t sample, int64_t token) {
    return token < 0 ? w->zeros : w->p->x + sample * w->p->samples + token * w->p->tokens;
}

// n channels of `count` tokens that follow each other.
INLINE void channels(
    const struct work *w, const el *const *in, el *out, int64_t c, int64_t n, const int count, const int silu
) {
    vf x[BEFORE + ABREAST];
    UNROLL for (int i = 0; i < BEFORE + count; i++) x[i] = load_els(in[i] + c, n);
    UNROLL for (int t = 0; t < count; t++) {
        vf y = load(w->taps + TAPS * w->width + c);
        UNROLL for (int j = 0; j < TAPS; j++) y += load(w->taps + j * w->width + c) * x[t + j];
        store_els(out + t * w->p->C + c, silu ? y * sigmoid(y) : y, n);
    }
}

INLINE void convolve(const struct work *w, int64_t sample, int64_t token, const int count, const int silu) {
    const el *in[BEFORE + ABREAST];
    const int64_t C = w->p->C, whole = C / LANES * LANES;
    for (int i = 0; i < BEFORE + count; i++) in[i] = row_of(w, sample, token - BEFORE + i);
    el *const out = w->p->y + (sample * w->p->N + token) * C;
    for (int64_t c = 0; c < whole; c += LANES) channels(w, in, out, c, LANES, count, silu);
    if (whole < C) channels(w, in, out, whole, C - whole, count, silu);
}

INLINE void convolve_chunk(const struct work *w, int64_t sample, int64_t t, int64_t end, const int silu) {
    for (; t + ABREAST <= end; t += ABREAST) convolve(w, sample, t, ABREAST, silu);
    for (; t < end; t++) convolve(w, sample, t, 1, silu);
}

static void job(const void *context, int64_t index) {
    const struct work *const w = context;
    const int64_t N = w->p->N, sample = index / w->chunks, t = index % w->chunks * CHUNK;
    const int64_t end = t + CHUNK < N ? t + CHUNK : N;
    populate(w->p->y + (sample * N + t) * w->p->C, (end - t) * w->p->C * (int64_t)sizeof(el));
    if (w->p->silu) convolve_chunk(w, sample, t, end, 1);
    else convolve_chunk(w, sample, t, end, 0);
}

// Whether there was memory for it.
int forward(const struct convolution *p) {
    const int64_t width = padded(p->C);
    float *const taps = calloc((size_t)(TAPS + 2) * width, sizeof(float));  // the last row for zeros
    if (!taps) return 0;
    turn(p, taps, width);
    const el *const zeros = (const el *)(taps + (TAPS + 1) * width);
    const struct work w = {p, zeros, taps, width, (p->N + CHUNK - 1) / CHUNK};
    expect(p->y, p->B * p->N * p->C * (int64_t)sizeof(el));
    parallel(job, &w, p->B * w.chunks, p->threads);
    free(taps);
    return 1;
}
