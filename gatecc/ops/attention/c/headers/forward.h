// Softmax attention in blocks of keys (Dao et al. 2022): a job holds a block of queries of all heads that share keys.
//
// A block of keys and values is packed once for the job. Tiles of MR queries then meet it: their scores, their weights,
// and what the values add to the sums of before, which are rescaled to the largest score so far.
#pragma once
#include "../../../../codegen/c/headers/threads.h"
#include "softmax.h"

#ifndef BLOCK
#define BLOCK 256  // keys of a block
#endif

#define ROOM_OF_ROWS (MR + LANES)

struct work {  // a job's memory
    float *q;                       // [rows][D in lanes, whole vectors]
    float *keys, *values;           // packed
    float *sums;                    // [rows][E in whole vectors]
    float *largest, *total;         // [rows]
    float *scores;                  // [MR][BLOCK]
    int64_t lanes, width, queries;  // of q, of sums; of a head
};

static void meet(
    const struct attention *p, const struct tensors *t, const struct work *w, int64_t b, int64_t h, int64_t first, int n, int64_t at,
    struct range block
) {
    struct range all = seen(p, first, first + n - 1);
    all.from = larger(all.from, block.from) - block.from;
    all.to = smaller(all.to, block.to) - block.from;
    if (all.from >= all.to) return;
    const int64_t from = all.from / LANES * LANES, to = whole(all.to, LANES), K = (p->D + PAIR - 1) / PAIR;
    for (int64_t key = from; key < to;) {
        const int64_t next = smaller(to, (key / NR + 1) * NR);
        const float *const panel = w->keys + key / NR * K * NR + key % NR;
        tile_of(n, (int)((next - key) / LANES), w->q + at * w->lanes, w->lanes, panel, NR, K, w->scores + key, BLOCK, NULL);
        key = next;
    }
    float most[ROOM_OF_ROWS], keep[ROOM_OF_ROWS];
    for (int r = 0; r < n; r++) {
        struct row row = {seen(p, first + r, first + r), NULL};
        row.keys.from -= block.from;
        row.keys.to -= block.from;
        if (t->bias)
            row.bias = (const char *)place(t->bias, &p->bias, b, h, first + r) +
                       block.from * p->bias.step * size_of(p->bias.kind);
        most[r] = largest_score(p, &row, w->scores + r * BLOCK, from, to, block.to - block.from, factor_of(p));
    }
    for (int r = 0; r < n; r += LANES) {  // the rest of a vector belongs to rows that come later, or to none
        const vf before = load(w->largest + at + r), now = most_of(before, load(most + r));
        store(most + r, now);
        store(keep + r, power2(before - either(now == -INFINITY, splat(0.0f), now)));
    }
    for (int r = 0; r < n; r++) {
        const float shift = most[r] == -INFINITY ? 0 : most[r];
        w->total[at + r] = w->total[at + r] * keep[r] + weigh(w->scores + r * BLOCK, from, to, shift);
        w->largest[at + r] = most[r];
    }
    for (int64_t e = 0; e < w->width; e += NR) {
        const int columns = (int)(smaller(w->width - e, NR) / LANES);
        const float *const values = w->values + from / PAIR * w->width + e;
        float *const sums = w->sums + at * w->width + e;
        tile_of(n, columns, w->scores + from / PAIR, BLOCK, values, w->width, (to - from) / PAIR, sums, w->width, keep);
    }
}

INLINE vf activated(int32_t activation, vf x) {
    if (activation == IDENTITY) return x;
    const vf s = 1.0f / (1.0f + exponential(-x));
    return activation == SIGMOID ? s : x * s;
}

static void finish(
    const struct attention *p, const struct tensors *t, const struct work *w, int64_t b, int64_t h, int64_t query, int64_t at
) {
    const float total = w->total[at];
    const vf factor = splat(total > 0 || total != total ? 1.0f / total : 0.0f);
    const void *const gate = t->gate ? place(t->gate, &p->gate, b, h, query) : NULL;
    el *const out = (el *)(uintptr_t)place(t->out, &p->out, b, h, query);
    for (int64_t e = 0; e < p->E; e += LANES) {
        vf x = load(w->sums + at * w->width + e) * factor;
        if (gate) x = x * activated(p->activation, floats_at(&p->gate, gate, e, p->E - e));
        store_els(out + e, x, p->E - e);
    }
    const float most = w->largest[at] == -INFINITY ? 0 : w->largest[at];
    t->logsumexp[(b * p->H + h) * p->N + query] = LN2 * most + logf(total);
}

static int64_t floats_of_job(const struct attention *p, struct work *w, float *memory) {
    const int64_t rows = p->rows * (p->H / p->G);
    float *at = memory;
    w->lanes = whole((p->D + PAIR - 1) / PAIR, LANES);
    w->width = whole(p->E, LANES);
#define ROOM(name, count) w->name = at, at += whole(count, LANES)
    ROOM(q, rows * w->lanes);
    ROOM(keys, BLOCK * whole(p->D, PAIR) / PAIR);
    ROOM(values, BLOCK * w->width);
    ROOM(sums, rows * w->width);
    ROOM(scores, MR * BLOCK);
    ROOM(largest, rows + LANES);
    ROOM(total, rows);
#undef ROOM
    return at - memory;
}

struct call {
    const struct attention *p;
    const struct tensors *t;
    int64_t blocks;  // of queries
    int failed;
};

static void job(const void *context, int64_t index) {
    struct call *const call = (struct call *)(uintptr_t)context;
    const struct attention *const p = call->p;
    const struct tensors *const t = call->t;
    // The last queries have the most keys where it is causal: they go first.
    const int64_t block = call->blocks - 1 - index / (p->B * p->G), g = index % p->G, b = index / p->G % p->B;
    const int64_t first = block * p->rows, queries = smaller(p->rows, p->N - first), group = p->H / p->G;
    struct work w;
    const int64_t room = floats_of_job(p, &w, NULL) * 4;
    float *const memory = aligned_alloc(64, (size_t)whole(room, 64));
    if (!memory) {
        call->failed = 1;
        return;
    }
    floats_of_job(p, &w, memory);
    const float factor = factor_of(p);
    for (int64_t j = 0; j < group; j++) {
        const int64_t h = g * group + j;
        const float sink = t->sinks ? t->sinks[h] * LOG2E : -INFINITY;
        for (int64_t i = 0; i < queries; i++) {
            const int64_t at = j * queries + i;
            pack_query(place(t->q, &p->q, b, h, first + i), p->D, factor, w.q + at * w.lanes);
            w.largest[at] = sink;
            w.total[at] = t->sinks && sink > -INFINITY;
        }
    }
    memset(w.sums, 0, (size_t)(group * queries * w.width) * 4);
    const struct range all = seen(p, first, first + queries - 1);
    for (int64_t from = all.from / LANES * LANES; from < all.to; from += BLOCK) {
        const struct range keys = {from, smaller(from + BLOCK, p->S)};
        const int64_t count = smaller(keys.to, all.to) - from;
        pack_keys(place(t->k, &p->k, b, g, from), p->k.token, count, p->D, w.keys);
        pack_values(place(t->v, &p->v, b, g, from), p->v.token, count, p->E, w.values);
        const int64_t filled = whole(count, PAIR) / PAIR, needed = whole(count, LANES) / PAIR;
        memset(w.values + filled * w.width, 0, (size_t)((needed - filled) * w.width) * 4);
        for (int64_t j = 0; j < group; j++)
            for (int64_t i = 0; i < queries; i += MR)
                meet(p, t, &w, b, g * group + j, first + i, (int)smaller(MR, queries - i), j * queries + i, keys);
    }
    for (int64_t j = 0; j < group; j++)
        for (int64_t i = 0; i < queries; i++) finish(p, t, &w, b, g * group + j, first + i, j * queries + i);
    free(memory);
}

int forward(const struct attention *p, const struct tensors *t) {
    struct call call = {p, t, (p->N + p->rows - 1) / p->rows, 0};
    parallel(job, &call, call.blocks * p->B * p->G, p->threads);
    return call.failed;
}
int vector_lanes(void) { return LANES; }
int numbers_of_a_lane(void) { return PAIR; }
