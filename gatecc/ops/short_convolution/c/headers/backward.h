// Gradients of a causal convolution: with dz = dy act'(z), where z is computed again,
//
//     dx[s] = the sum over j of weight[j] dz[s + (TAPS - 1) - j],
//     dweight[j] = the sum over t of dz[t] x[t - (TAPS - 1) + j].
//
// A job goes once through a chunk of tokens and, for dx, through the TAPS - 1 behind it. Its sums for the weights are
// its own; they are added in the order of the jobs, in double, so that a result does not depend on the number of threads.
#pragma once
#include "problem.h"

struct gradients {  // NULL where none is needed, contiguous
    const el *grad;  // of y: (B, N, C), its last stride 1
    int64_t samples, tokens;
    el *dx, *dweight, *dbias, *dstate;
};

struct differentiation {
    struct work w;
    const struct gradients *g;
    float *sums;  // of each job (TAPS + 1, width), or NULL
    int failed;
};

struct rows {  // of tokens that follow each other
    const el *in[BEFORE + ABREAST], *grad[ABREAST];
    el *out[ABREAST];  // of those that come BEFORE earlier; NULL where nothing is asked
    float *carry;      // (BEFORE, width): dz of the tokens before
    float *sums;
};

INLINE void differentiate_channels(
    const struct work *w, const struct rows *r, int64_t c, int64_t n, const int silu, const int sums
) {
    const int64_t width = w->width;
    vf x[BEFORE + ABREAST], dz[BEFORE + ABREAST];
    UNROLL for (int i = 0; i < BEFORE + ABREAST; i++) x[i] = load_els(r->in[i] + c, n);
    UNROLL for (int i = 0; i < BEFORE; i++) dz[i] = load(r->carry + i * width + c);
    UNROLL for (int t = 0; t < ABREAST; t++) {
        dz[BEFORE + t] = load_els(r->grad[t] + c, n);
        if (silu) {
            const vf z = weighed(w, x + t, c), s = sigmoid(z);
            dz[BEFORE + t] *= s * (1.0f + z * (1.0f - s));
        }
    }
    UNROLL for (int i = 0; i < BEFORE; i++) store(r->carry + i * width + c, dz[ABREAST + i]);
    if (sums) {
        UNROLL for (int j = 0; j < TAPS; j++) {
            vf sum = load(r->sums + j * width + c);
            UNROLL for (int t = 0; t < ABREAST; t++) sum += dz[BEFORE + t] * x[t + j];
            store(r->sums + j * width + c, sum);
        }
        vf sum = load(r->sums + TAPS * width + c);
        UNROLL for (int t = 0; t < ABREAST; t++) sum += dz[BEFORE + t];
        store(r->sums + TAPS * width + c, sum);
    }
    UNROLL for (int t = 0; t < ABREAST; t++) {
        if (!r->out[t]) continue;
        vf dx = splat(0.0f);
        UNROLL for (int j = 0; j < TAPS; j++) dx += load(w->taps + j * width + c) * dz[BEFORE + t - j];
        store_els(r->out[t] + c, dx, n);
    }
}

INLINE void differentiate_tokens(const struct work *w, const struct rows *r, const int silu, const int sums) {
    const int64_t C = w->p->C, whole = C / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) differentiate_channels(w, r, c, LANES, silu, sums);
    if (whole < C) differentiate_channels(w, r, whole, C - whole, silu, sums);
}

// Where the gradient of an input goes that belongs to the chunk [first, end), or for the first chunk to the state.
INLINE el *out_of(const struct differentiation *d, int64_t sample, int64_t token, int64_t first, int64_t end) {
    const struct convolution *const p = d->w.p;
    const struct gradients *const g = d->g;
    if (token < 0) return first || !g->dstate ? NULL : g->dstate + (sample * BEFORE + BEFORE + token) * p->C;
    return token < first || token >= end || !g->dx ? NULL : g->dx + (sample * p->N + token) * p->C;
}

static void differentiate_chunk(const void *context, int64_t index) {
    struct differentiation *const d = (struct differentiation *)(uintptr_t)context;
    const struct work *const w = &d->w;
    const struct convolution *const p = w->p;
    const int64_t N = p->N, sample = index / w->chunks, first = index % w->chunks * CHUNK;
    const int64_t end = first + CHUNK < N ? first + CHUNK : N;
    const int64_t last = d->g->dx || d->g->dstate ? end + BEFORE : end;
    struct rows r;
    r.carry = calloc((size_t)BEFORE * w->width, sizeof(float));
    if (!r.carry) {
        d->failed = 1;
        return;
    }
    r.sums = d->sums ? d->sums + index * (TAPS + 1) * w->width : NULL;
    if (r.sums) memset(r.sums, 0, (size_t)(TAPS + 1) * w->width * sizeof(float));
    if (d->g->dx) populate(d->g->dx + (sample * N + first) * p->C, (end - first) * p->C * (int64_t)sizeof(el));
    for (int64_t t = first; t < last; t += ABREAST) {
        for (int i = 0; i < BEFORE + ABREAST; i++) r.in[i] = row_of(w, sample, t - BEFORE + i);
        for (int i = 0; i < ABREAST; i++) {
            r.grad[i] = t + i < N ? d->g->grad + sample * d->g->samples + (t + i) * d->g->tokens : w->zeros;
            r.out[i] = out_of(d, sample, t - BEFORE + i, first, end);
        }
        // Behind the chunk are tokens of the next one, or none, whose dz is zero.
        if (r.sums && t < end) {
            if (p->silu) differentiate_tokens(w, &r, 1, 1);
            else differentiate_tokens(w, &r, 0, 1);
        } else {
            if (p->silu) differentiate_tokens(w, &r, 1, 0);
            else differentiate_tokens(w, &r, 0, 0);
        }
    }
    free(r.carry);
}

#define TOGETHER 256  // channels of a job that adds

static void add_sums(const void *context, int64_t index) {
    const struct differentiation *const d = context;
    const struct work *const w = &d->w;
    const int64_t from = index * TOGETHER, left = w->p->C - from, count = left < TOGETHER ? left : TOGETHER;
    for (int j = 0; j <= TAPS; j++) {
        double total[TOGETHER] = {0};
        for (int64_t i = 0; i < w->p->B * w->chunks; i++) {
            const float *const sums = d->sums + (i * (TAPS + 1) + j) * w->width + from;
            for (int64_t c = 0; c < count; c++) total[c] += sums[c];
        }
        for (int64_t c = 0; c < count; c++) {
            if (j < TAPS && d->g->dweight) d->g->dweight[(from + c) * TAPS + j] = narrow((float)total[c]);
            if (j == TAPS && d->g->dbias) d->g->dbias[from + c] = narrow((float)total[c]);
        }
    }
}

// Whether there was memory for it.
int backward(const struct convolution *p, const struct gradients *g) {
    struct differentiation d = {.g = g};
    float *const taps = prepare(p, &d.w);
    if (!taps) return 0;
    const int64_t jobs = p->B * d.w.chunks;
    const int summed = g->dweight || g->dbias;
    if (summed) d.sums = malloc((size_t)(jobs * (TAPS + 1) * d.w.width) * sizeof(float));
    if (summed && !d.sums) {
        free(taps);
        return 0;
    }
    expect(g->dx, p->B * p->N * p->C * (int64_t)sizeof(el));
    parallel(differentiate_chunk, &d, jobs, p->threads);
    if (summed && !d.failed) parallel(add_sums, &d, (p->C + TOGETHER - 1) / TOGETHER, p->threads);
    free(d.sums);
    free(taps);
    return !d.failed;
}
