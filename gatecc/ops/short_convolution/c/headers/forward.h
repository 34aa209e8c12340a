// What a causal convolution yields: see problem.h.
#pragma once
#include "problem.h"

struct results {
    el *y;      // (B, N, C), contiguous
    el *after;  // (B, BEFORE, C), contiguous: the last inputs
};

struct call {
    struct work w;
    const struct results *out;
};

// n channels of `count` tokens that follow each other.
INLINE void channels(
    const struct work *w, const el *const *in, el *out, int64_t c, int64_t n, const int count, const int silu
) {
    vf x[BEFORE + ABREAST];
    UNROLL for (int i = 0; i < BEFORE + count; i++) x[i] = load_els(in[i] + c, n);
    UNROLL for (int t = 0; t < count; t++) {
        const vf y = weighed(w, x + t, c);
        store_els(out + t * w->p->C + c, silu ? y * sigmoid(y) : y, n);
    }
}

INLINE void convolve(const struct call *call, int64_t sample, int64_t token, const int count, const int silu) {
    const struct work *const w = &call->w;
    const el *in[BEFORE + ABREAST];
    const int64_t C = w->p->C, whole = C / LANES * LANES;
    for (int i = 0; i < BEFORE + count; i++) in[i] = row_of(w, sample, token - BEFORE + i);
    el *const out = call->out->y + (sample * w->p->N + token) * C;
    for (int64_t c = 0; c < whole; c += LANES) channels(w, in, out, c, LANES, count, silu);
    if (whole < C) channels(w, in, out, whole, C - whole, count, silu);
}

INLINE void convolve_chunk(const struct call *call, int64_t sample, int64_t t, int64_t end, const int silu) {
    for (; t + ABREAST <= end; t += ABREAST) convolve(call, sample, t, ABREAST, silu);
    for (; t < end; t++) convolve(call, sample, t, 1, silu);
}

static void job(const void *context, int64_t index) {
    const struct call *const call = context;
    const struct convolution *const p = call->w.p;
    const int64_t N = p->N, sample = index / call->w.chunks, t = index % call->w.chunks * CHUNK;
    const int64_t end = t + CHUNK < N ? t + CHUNK : N;
    populate(call->out->y + (sample * N + t) * p->C, (end - t) * p->C * (int64_t)sizeof(el));
    if (p->silu) convolve_chunk(call, sample, t, end, 1);
    else convolve_chunk(call, sample, t, end, 0);
}

// Whether there was memory for it.
int forward(const struct convolution *p, const struct results *out) {
    struct call call = {.out = out};
    float *const taps = prepare(p, &call.w);
    if (!taps) return 0;
    expect(out->y, p->B * p->N * p->C * (int64_t)sizeof(el));
    parallel(job, &call, p->B * call.w.chunks, p->threads);
    for (int64_t b = 0; b < p->B; b++)
        for (int i = 0; i < BEFORE; i++) {
            const el *const row = row_of(&call.w, b, p->N - BEFORE + i);
            memcpy(out->after + (b * BEFORE + i) * p->C, row, (size_t)p->C * sizeof(el));
        }
    free(taps);
    return 1;
}
