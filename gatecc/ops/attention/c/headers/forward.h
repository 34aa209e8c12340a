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
    struct range block, struct range run
) {
    struct range all = seen(p, first, first + n - 1);
    all.from = larger(all.from, run.from) - block.from;
    all.to = smaller(all.to, run.to) - block.from;
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
        row.keys.from = larger(row.keys.from, run.from) - block.from;
        row.keys.to = smaller(row.keys.to, run.to) - block.from;
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

// Which columns of a map the queries of a job see between them, or a row of it: NULL is all of them.
static const uint8_t *row_of_map(const struct attention *p, const struct tensors *t, int64_t b, int64_t h, int64_t query) {
    return t->blocks ? place(t->blocks, &p->blocks, b, h, query / p->block_queries) : NULL;
}
static int is_needed(const struct attention *p, const struct tensors *t, int64_t b, int64_t g, struct range queries, int64_t column) {
    const int64_t group = p->H / p->G;
    for (int64_t j = 0; j < (p->blocks.head ? group : 1); j++)
        for (int64_t i = queries.from; i < queries.to; i = (i / p->block_queries + 1) * p->block_queries)
            if (row_of_map(p, t, b, g * group + j, i)[column]) return 1;
    return 0;
}

// The first keys of a range that a row of a map lets pass; empty if there are no more.
static struct range passed(const struct attention *p, const uint8_t *map, struct range keys) {
    if (!map) return keys;
    const int64_t size = p->block_keys;
    int64_t column = keys.from / size;
    while (column * size < keys.to && !map[column]) column++;
    const int64_t from = larger(keys.from, column * size);
    while (column * size < keys.to && map[column]) column++;
    return (struct range){from, larger(from, smaller(keys.to, column * size))};
}

// Pack keys and values of a block; with a map those alone that a query of the job sees, in whole vectors.
static void pack(const struct attention *p, const struct tensors *t, const struct work *w, int64_t b, int64_t g, struct range queries, struct range keys) {
    const el *const k = place(t->k, &p->k, b, g, keys.from), *const v = place(t->v, &p->v, b, g, keys.from);
    const int64_t size = t->blocks ? p->block_keys : p->S, all = keys.to - keys.from;
    for (int64_t column = keys.from / size, done = 0; column * size < keys.to; column++) {
        if (t->blocks && !is_needed(p, t, b, g, queries, column)) continue;
        const int64_t begin = larger(done, (column * size - keys.from) / LANES * LANES);
        const int64_t end = smaller(all, whole((column + 1) * size - keys.from, LANES));
        if (begin >= end) continue;
        pack_keys(k, p->k.token, begin, end, p->D, w->keys);
        pack_values(v, p->v.token, begin, end, p->E, w->values);
        done = end;
    }
    const int64_t filled = whole(all, PAIR) / PAIR, needed = whole(all, LANES) / PAIR;
    memset(w->values + filled * w->width, 0, (size_t)((needed - filled) * w->width) * 4);
}

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
    // Blocks end at the same keys in all jobs, so that a query's sums do not depend on how many threads share the work.
    for (int64_t from = all.from / LANES * LANES, next; from < all.to; from = next) {
        next = (from / BLOCK + 1) * BLOCK;
        const struct range keys = {from, smaller(next, p->S)};
        pack(p, t, &w, b, g, (struct range){first, first + queries}, (struct range){from, smaller(keys.to, all.to)});
        for (int64_t j = 0; j < group; j++)
            for (int64_t i = 0, n; i < queries; i += n) {
                const uint8_t *const map = row_of_map(p, t, b, g * group + j, first + i);
                n = smaller(MR, queries - i);
                if (map) n = smaller(n, p->block_queries - (first + i) % p->block_queries);
                for (struct range run = passed(p, map, keys); run.from < run.to; run = passed(p, map, (struct range){run.to, keys.to}))
                    meet(p, t, &w, b, g * group + j, first + i, (int)n, j * queries + i, keys, run);
            }
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
