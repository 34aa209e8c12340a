// What the caller hands over, and rows of it as floats.
#pragma once
#include "../../../../codegen/c/headers/pages.h"
#include "constants.h"
#include "gates.h"

enum { FLOAT32, BFLOAT16, FLOAT16 };
#ifndef WHOLE
#define WHOLE LANES  // channels of a row are padded to a multiple of it
#endif
#define PADDED(n) (((n) + WHOLE - 1) / WHOLE * WHOLE)
#define DKP PADDED(DK)
#define DVP PADDED(DV)
#define PITCH (DVP + LANES)  // of a state's rows: stores that are 4096 bytes before a load would hold it up
#define ROWS 2  // of a state that are worked on together
#define M 4    // tokens of a micro-chunk: the state is read and written once for so many
#define T 8    // tokens that are converted to float at a time; a multiple of M

struct operand {  // x[b, head / group, token, channel]; strides in elements
    char *data;
    int64_t batch, head, token, channel;
    int32_t type, group;
    int64_t width;  // channels: 1 where one value serves all
};

struct problem {
    struct operand q, k, v, g, beta, o, grad_o;
    struct operand dq, dk, dv, dg, dbeta;  // of every head, in float32
    const int64_t *segments;  // (row of the batch, first token, length) of each sequence
    int64_t count, heads, tokens;
    const float *state;  // (count, heads, DK, DV)
    float *final, *decay;  // (count, heads, DK, DV); (count, heads, DK), the product of all gates
    const float *grad_final;
    float *dstate;  // as state
    float scale, inverse;  // inverse: 0 where g holds log decays; with logits, what their logsigmoid is multiplied by
    int32_t reverse, threads;
};

struct sequence {
    int64_t batch, head, first, length, index;  // index: of its state
};

static struct sequence sequence_of(const struct problem *p, int64_t job) {
    const int64_t *s = p->segments + job / p->heads * 3;
    return (struct sequence){s[0], job % p->heads, s[1], s[2], job};
}

// The rows that a job will write: one after another, or with those of the other heads between them, which are asked for
// with them, once.
INLINE void populate_rows(const struct operand *x, const struct sequence *s) {
    if (!x->data || !s->length) return;
    const int64_t size = x->type == FLOAT32 ? 4 : 2, together = x->head < x->token;
    const int64_t first = s->batch * x->batch + (together ? 0 : s->head * x->head) + s->first * x->token;
    populate(x->data + first * size, s->length * x->token * size);
}

// Of an output: the last sequence lies in the last row of the batch.
INLINE int64_t rows(const struct problem *p) {
    return p->count ? (p->segments[(p->count - 1) * 3] + 1) * p->heads * p->tokens : 0;
}

INLINE int64_t token_of(const struct problem *p, const struct sequence *s, int64_t t) {
    return p->reverse ? s->first + s->length - 1 - t : s->first + t;
}

static float half_to_float(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } x;
    const uint32_t magnitude = h & 0x7fff;
    const float tiny = (float)(int32_t)magnitude * 5.9604644775390625e-8f;
    x.u = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    x.f = magnitude < 0x400 ? tiny : x.f;
    x.u |= (uint32_t)(h & 0x8000) << 16;
    return x.f;
}

static float element(const char *row, int type, int64_t i) {
    if (type == FLOAT32) return ((const float *)row)[i];
    if (type == FLOAT16) return half_to_float(((const uint16_t *)row)[i]);
    const uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE const char *row_of(const struct operand *x, const struct sequence *s, int64_t token) {
    const int64_t offset = s->batch * x->batch + s->head / x->group * x->head + token * x->token;
    return x->data + offset * (x->type == FLOAT32 ? 4 : 2);
}

enum use { PLAIN, SCALED, EXPONENTIAL, ROOT, SLOPE };

INLINE vf used(vf x, enum use use, float scale) {
    switch (use) {
    case PLAIN: return x;
    case SCALED: return x * scale;
    case EXPONENTIAL: return exponential(x);
    case ROOT: return root_of_sigmoid(x, scale);
    case SLOPE: return slope_of_logit(x, scale);
    }
}

typedef uint16_t vh_anywhere __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

// One row of n channels as floats, and zeros (what ``use`` makes of them) up to a whole vector. Rows go from memory to
// vectors without a buffer between: a wide load of what narrower stores have just written would wait for them.
INLINE void read_row(const struct operand *x, const char *row, float *to, const int n, enum use use, float scale) {
    const int whole = n / LANES * LANES;
    if (x->channel == 1 && x->type == FLOAT32) {
        for (int d = 0; d < whole; d += LANES) store(to + d, used(load((const float *)row + d), use, scale));
    } else if (x->channel == 1 && x->type == BFLOAT16) {
        for (int d = 0; d < whole; d += LANES) {
            const vh_anywhere h = *(const vh_anywhere *)(row + 2 * d);
            store(to + d, used((vf)(__builtin_convertvector(h, vu) << 16), use, scale));
        }
    } else {
        for (int d = 0; d < whole; d += LANES) {
            vf y;
            for (int i = 0; i < LANES; i++) y[i] = element(row, x->type, (d + i) * x->channel);
            store(to + d, used(y, use, scale));
        }
    }
    if (whole == n) return;
    vf y = {0};
    for (int i = whole; i < n; i++) y[i - whole] = element(row, x->type, i * x->channel);
    store(to + whole, used(y, use, scale));
}

// What the state is multiplied by at a token, one number per channel.
APART void read_gates(const struct problem *p, const char *row, float *a) {
    if (p->g.width == 1) {
        const vf x = splat(element(row, p->g.type, 0));
        const vf gate = splat((p->inverse ? root_of_sigmoid(x, p->inverse) : exponential(x))[0]);
        for (int d = 0; d < DKP; d += LANES) store(a + d, gate);
    } else if (p->inverse) {
        read_row(&p->g, row, a, DK, ROOT, p->inverse);
    } else {
        read_row(&p->g, row, a, DK, EXPONENTIAL, 1);
    }
}

APART void write_row(const struct operand *x, const struct sequence *s, int64_t token, const float *from) {
    char *row = (char *)row_of(x, s, token);
    const int whole = DV / LANES * LANES;
    if (x->type == FLOAT32) {
        for (int d = 0; d < whole; d += LANES) store((float *)row + d, load(from + d));
        for (int d = whole; d < DV; d++) ((float *)row)[d] = from[d];
        return;
    }
    for (int i = 0; i < DV; i++) {  // to the nearest, ties to even
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)row)[i] = (uint16_t)(from[i] != from[i] ? 0x7fc0 : rounded);
    }
}

// Outputs of a megabyte and more are streamed: a store to a line that is far away reads that line first, which took a
// sixth of the backward kernel's time at 2048 tokens and 8 heads, and 7 % of the forward kernel's.
INLINE int streamed(const struct problem *p, int64_t channels) { return rows(p) * channels >= 1 << 18; }

INLINE void put_row(float *to, const float *from, const int n, int stream_it) {
    if (!stream_it || n % LANES || (uintptr_t)to % sizeof(vf)) {
        memcpy(to, from, sizeof(float) * n);
        return;
    }
    for (int d = 0; d < n; d += LANES) stream(to + d, load(from + d));
}

// Tokens [t, t + count) of a sequence, and rows that change nothing up to a multiple of M. q may be NULL.
APART void read_tokens(
    const struct problem *p, const struct sequence *s, int64_t t, int count, float (*q)[DKP], float (*k)[DKP],
    float (*a)[DKP], float (*v)[DVP], float *beta
) {
    for (int i = 0; i < count; i++) {
        const int64_t token = token_of(p, s, t + i);
        if (q) read_row(&p->q, row_of(&p->q, s, token), q[i], DK, SCALED, p->scale);
        read_row(&p->k, row_of(&p->k, s, token), k[i], DK, PLAIN, 1);
        read_row(&p->v, row_of(&p->v, s, token), v[i], DV, PLAIN, 1);
        beta[i] = DELTA ? element(row_of(&p->beta, s, token), p->beta.type, 0) : 1;
        if (GATED) read_gates(p, row_of(&p->g, s, token), a[i]);
    }
    for (int i = count; i % M; i++) {
        memset(k[i], 0, sizeof k[i]);
        memset(v[i], 0, sizeof v[i]);
        if (q) memset(q[i], 0, sizeof q[i]);
        for (int d = 0; GATED && d < DKP; d++) a[i][d] = 1;
        beta[i] = 0;
    }
}

// The rows of the M tokens ahead, asked for line by line while others are computed. Processors do not look ahead across
// pages by themselves; and asked for all at once, lines fill the few places for what is on its way, so that everything
// waits: a fifth of the time at 2048 tokens and 8 heads. Small heads are computed too fast for it.
#define LOOKS (DK * DV >= 1024)
#define LINES (((DK > DV ? DK : DV) + 15) / 16)  // of a row; narrower ones are followed by others, which come early
#define SWEEPS (LANES == 16 ? (DVP + 31) / 32 : DVP / LANES)  // over a state in a chunk, each in so many steps:
#define STEPS ((DK + ROWS - 1) / ROWS)
#define ASKED ((4 * M * LINES + SWEEPS * STEPS - 1) / (SWEEPS * STEPS))  // lines a step, until there are none
#define AHEAD (5 * M + (STEPS * ASKED + LINES - 1) / LINES)
struct ahead {
    const char *row[AHEAD];
    unsigned next;  // line
};

INLINE void ask(const struct ahead *a, unsigned line) { __builtin_prefetch(a->row[line / LINES] + line % LINES * 64); }
INLINE void ask_far(const struct ahead *a, unsigned line) {
    __builtin_prefetch(a->row[line / LINES] + line % LINES * 64, 0, 2);
}

INLINE void list_rows(
    struct ahead *a, int n, const struct operand *x, const struct problem *p, const struct sequence *s, int64_t t
) {
    const int64_t size = x->type == FLOAT32 ? 4 : 2, step = (p->reverse ? -size : size) * x->token;
    const char *row = row_of(x, s, token_of(p, s, t));
    UNROLL for (int i = 0; i < M; i++) a->row[n + i] = row + i * step;
}

// Rows beyond the end are asked for in vain, and so are those that are not replaced: it is only advice.
APART void look_ahead(struct ahead *a, const struct problem *p, const struct sequence *s, int64_t t, int reads) {
    a->next = 0;
    list_rows(a, 0, &p->k, p, s, t);
    list_rows(a, M, &p->v, p, s, t);
    if (GATED) list_rows(a, 2 * M, &p->g, p, s, t);
    if (reads) list_rows(a, 3 * M, &p->q, p, s, t);
}

// A state as kernels keep it, DK rows of PITCH.
static void read_state(float *S, const float *from) {
    memset(S, 0, 4 * (size_t)DKP * PITCH);
    for (int r = 0; from && r < DK; r++) memcpy(S + r * PITCH, from + r * DV, 4 * DV);
}

static void write_state(float *to, const float *S) {
    for (int r = 0; r < DK; r++) memcpy(to + r * DV, S + r * PITCH, 4 * DV);
}
