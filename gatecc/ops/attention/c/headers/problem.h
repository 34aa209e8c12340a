// One call, and which keys its queries see.
#pragma once
#include "tiles.h"

#define LOG2E 1.44269504088896341f

enum { NUMBERS, FLOATS, BOOLEANS };  // what an operand holds: el, float, or a byte
enum { IDENTITY, SIGMOID, SILU };    // of a gate

struct layout {  // of (B, heads, tokens, features), features side by side unless ``step`` is 0
    int64_t batch, head, token, step, kind;
};

struct tensors {  // of a call; NULL where there is none
    const void *q, *k, *v, *gate, *bias;
    const float *sinks;  // (H)
    void *out;
    float *logsumexp;  // (B, H, N)
    const uint8_t *blocks;
};

struct attention {  // what calls on tensors of the same shapes share
    struct layout q, k, v, gate, bias, out;  // bias: (B, H, N, S)
    struct layout blocks;                    // (B, H, blocks of queries, blocks of keys): those of them that are seen
    int64_t B, H, G, N, S, D, E;
    int64_t window;  // 0: none
    int64_t rows;    // queries of a job: a block of them for each head of a group
    int64_t block_queries, block_keys;  // of the map
    float scale, cap;  // 0: none
    int32_t causal, activation, threads, unused;
};

INLINE int64_t size_of(int64_t kind) { return kind == FLOATS ? 4 : kind == BOOLEANS ? 1 : (int64_t)sizeof(el); }
INLINE const void *place(const void *at, const struct layout *o, int64_t b, int64_t h, int64_t n) {
    return (const char *)at + (b * o->batch + h * o->head + n * o->token) * size_of(o->kind);
}
// LANES floats of an operand from a feature on, or the first n.
INLINE vf floats_at(const struct layout *o, const void *row, int64_t feature, int64_t n) {
    if (!o->step) return splat(o->kind == FLOATS ? *(const float *)row : widen(*(const el *)row));
    if (o->kind == FLOATS) {
        const float *const p = (const float *)row + feature;
        return n >= LANES ? load(p) : floats_of(p, n);
    }
    return load_els((const el *)row + feature, n);
}

// What scores are multiplied by: to be capped, or to be powers of two.
INLINE float factor_of(const struct attention *p) {
    return p->cap ? p->scale / p->cap : p->scale * LOG2E;
}

struct range {
    int64_t from, to;
};
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The keys that queries first .. last see between them; the last of all queries stands at the last key.
INLINE struct range seen(const struct attention *p, int64_t first, int64_t last) {
    const int64_t shift = p->S - p->N;
    struct range r = {0, p->S};
    if (p->window) {
        r.from = larger(0, first + shift - p->window + 1);
        r.to = smaller(p->S, last + shift + p->window);
    }
    if (p->causal) r.to = smaller(r.to, last + shift + 1);
    r.to = larger(r.to, 0);
    return r;
}
