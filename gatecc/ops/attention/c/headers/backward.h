// Gradients of attention: weights are computed again from scores and logsumexps, block by block.
//
// A job has one head of keys, or where heads do not keep all threads busy one block of it. A block, packed once, meets
// the queries of all heads that share it, a band of them at a time: p = e^(s - logsumexp), dp = do v^T,
// ds = p (dp - delta) and then dv += p^T do, dk += ds^T q, dq += ds k, where
// delta is the sum of do * o, less the gradient of the logsumexp. Numbers are single ones: lanes of floats.
#pragma once
#define SINGLE 1
#include <sched.h>
#include "../../../../codegen/c/headers/threads.h"
#include "softmax.h"

#undef TURNED
#define TURNED 1
TILES_OF(tile_of_columns)

#define KEYS 192  // of a block
#define BAND 96   // queries of a band

struct gradients {        // NULL where none is needed, contiguous
    const float *delta;  // (B, H, N)
    el *dq, *dk, *dv;
};

struct room {
    float *key_columns, *key_rows, *value_columns;  // packed: [panel][D][NR], [KEYS][D], [panel][E][NR]
    float *q, *grad;                                // a band: [BAND][D], [BAND][E]
    float *weights, *slopes;                        // p, and ds: [BAND][KEYS]
    float *dk, *dv;                                 // [KEYS][D], [KEYS][E]
    float *dq;                                      // [heads of the group][N][D]
    int64_t D, E;                                   // in whole vectors
};

static const float ONES[MR] = {1, 1, 1, 1, 1, 1};

// From scores and dp to weights and ds, of one row.
static void slopes_of(
    const struct attention *p, const struct row *row, float *s, float *dp, struct range live, int64_t count,
    float logsumexp, float delta
) {
    const vf shift = splat(logsumexp == -INFINITY ? 0 : logsumexp * LOG2E);
    for (int64_t key = live.from; key < live.to; key += LANES) {
        vf x = load(s + key), slope = splat(1.0f);
        if (p->cap) {
            const vf y = hyperbolic_tangent(x);
            slope = 1.0f - y * y;
            x = y * (p->cap * LOG2E);
        }
        if (row->bias) x = biased(&p->bias, row->bias, x, key, count - key);
        if (key < row->keys.from || key + LANES > row->keys.to) x = hidden_outside(x, key, row->keys);
        const vf w = power2(x - shift);
        store(s + key, w);
        store(dp + key, w * (load(dp + key) - delta) * slope);
    }
}

INLINE void clear(float *row, struct range live, int64_t width) {
    memset(row, 0, (size_t)live.from * 4);
    memset(row + live.to, 0, (size_t)(width - live.to) * 4);
}

// A (rows, K) with packed columns, those of a range.
static void columns_of(
    const float *a, int64_t pitch, int n, const float *packed, int64_t K, struct range live, float *out
) {
    for (int64_t key = live.from; key < live.to;) {
        const int64_t next = smaller(live.to, (key / NR + 1) * NR);
        const float *const panel = packed + key / NR * K * NR + key % NR;
        tile_of(n, (int)((next - key) / LANES), a, pitch, panel, NR, K, out + key, KEYS, NULL);
        key = next;
    }
}

// out += a^T b, or a b with a row of a for each row of out.
static void add_products(
    const float *a, int turned, int n, const float *b, int64_t width, int64_t count, float *out
) {
    for (int64_t e = 0; e < width; e += NR) {
        const int columns = (int)(smaller(width - e, NR) / LANES);
        if (turned) tile_of_columns(n, columns, a, KEYS, b + e, width, count, out + e, width, ONES);
        else tile_of(n, columns, a, KEYS, b + e, width, count, out + e, width, ONES);
    }
}

static void band(
    const struct attention *p, const struct tensors *t, const struct gradients *g, const struct room *w, int64_t b,
    int64_t h, int64_t first, int64_t queries, struct range block, float *dq
) {
    const int64_t count = block.to - block.from, width = whole(count, LANES);
    for (int64_t i = 0; i < queries; i++) {
        pack_query(place(t->q, &p->q, b, h, first + i), p->D, factor_of(p), w->q + i * w->D);
        pack_query(place(t->out, &p->out, b, h, first + i), p->E, 1.0f, w->grad + i * w->E);
    }
    for (int64_t i = 0; i < queries; i += MR) {
        const int n = (int)smaller(MR, queries - i);
        float *const weights = w->weights + i * KEYS, *const slopes = w->slopes + i * KEYS;
        const struct range all = seen(p, first + i, first + i + n - 1);
        struct range live = {larger(all.from, block.from) - block.from, smaller(all.to, block.to) - block.from};
        if (live.from >= live.to) live.from = live.to = 0;
        live.from = live.from / LANES * LANES;
        live.to = whole(live.to, LANES);
        columns_of(w->q + i * w->D, w->D, n, w->key_columns, p->D, live, weights);
        columns_of(w->grad + i * w->E, w->E, n, w->value_columns, p->E, live, slopes);
        for (int r = 0; r < n; r++) {
            const int64_t query = first + i + r, at = (b * p->H + h) * p->N + query;
            struct row row = {seen(p, query, query), NULL};
            row.keys.from -= block.from;
            row.keys.to -= block.from;
            if (t->bias)
                row.bias = (const char *)place(t->bias, &p->bias, b, h, query) +
                           block.from * p->bias.step * size_of(p->bias.kind);
            slopes_of(p, &row, weights + r * KEYS, slopes + r * KEYS, live, count, t->logsumexp[at], g->delta[at]);
            clear(weights + r * KEYS, live, width);
            clear(slopes + r * KEYS, live, width);
        }
        if (g->dq && live.from < live.to)
            add_products(slopes + live.from, 0, n, w->key_rows + live.from * w->D, w->D, smaller(live.to, count) - live.from, dq + i * w->D);
    }
    const int64_t shift = p->S - p->N + first;  // the place of the first query of the band
    for (int64_t key = 0; key < count; key += MR) {
        const int n = (int)smaller(MR, count - key);
        struct range rows = {0, queries};
        if (p->causal) rows.from = larger(0, block.from + key - shift);
        else if (p->window) rows.from = larger(0, block.from + key - shift - p->window + 1);
        if (p->window) rows.to = smaller(queries, block.from + key + n - 1 - shift + p->window);
        if (rows.from >= rows.to) continue;
        const int64_t at = rows.from * KEYS + key, many = rows.to - rows.from;
        if (g->dv) add_products(w->weights + at, 1, n, w->grad + rows.from * w->E, w->E, many, w->dv + key * w->E);
        if (g->dk) add_products(w->slopes + at, 1, n, w->q + rows.from * w->D, w->D, many, w->dk + key * w->D);
    }
}

static void write_rows(const float *from, int64_t rows, int64_t pitch, int64_t width, float factor, el *to) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d += LANES)
            store_els(to + i * width + d, load(from + i * pitch + d) * factor, width - d);
}

static int64_t floats_of_room(const struct attention *p, struct room *w, float *memory) {
    float *at = memory;
    w->D = whole(p->D, LANES);
    w->E = whole(p->E, LANES);
#define ROOM(name, count) w->name = at, at += whole(count, LANES)
    ROOM(key_columns, KEYS * p->D);
    ROOM(key_rows, KEYS * w->D);
    ROOM(value_columns, KEYS * p->E);
    ROOM(q, BAND * w->D);
    ROOM(grad, BAND * w->E);
    ROOM(weights, BAND * KEYS);
    ROOM(slopes, BAND * KEYS);
    ROOM(dk, KEYS * w->D);
    ROOM(dv, KEYS * w->E);
    ROOM(dq, p->H / p->G * p->N * w->D);
#undef ROOM
    return at - memory;
}

struct backward_call {
    const struct attention *p;
    const struct tensors *t;
    const struct gradients *g;
    int64_t blocks;  // of a head that are jobs of their own; 1 if a job goes through all
    float *dq;       // (B, H, N, D in whole vectors), shared by the blocks of a head
    int32_t *done;   // (B, H, bands): behind which block the sums of a band are
    int failed;
};

static void write_queries(const struct backward_call *call, const float *dq, int64_t heads, int64_t first) {
    const struct attention *const p = call->p;
    write_rows(dq, heads * p->N, whole(p->D, LANES), p->D, p->scale, call->g->dq + first * p->N * p->D);
}

// Blocks of a head run at once, but add to a band of queries one after the other, in their order: the bits of a result
// are those of one thread. Jobs begin in order too, so that the first one that is not done waits for nobody.
INLINE void await(const struct backward_call *call, const int32_t *done, int64_t block) {
    while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != block && !__atomic_load_n(&call->failed, __ATOMIC_RELAXED))
        sched_yield();
}

static void backward_block(
    struct backward_call *call, const struct room *w, int64_t b, int64_t head, int64_t from, float *sums
) {
    const struct attention *const p = call->p;
    const struct gradients *const g = call->g;
    const int64_t group = p->H / p->G, bands = (p->N + BAND - 1) / BAND;
    const struct range block = {from, smaller(from + KEYS, p->S)};
    const int64_t count = block.to - from;
    pack_keys(place(call->t->k, &p->k, b, head, from), p->k.token, 0, count, p->D, w->key_columns);
    pack_values(place(call->t->k, &p->k, b, head, from), p->k.token, 0, count, p->D, w->key_rows);
    pack_keys(place(call->t->v, &p->v, b, head, from), p->v.token, 0, count, p->E, w->value_columns);
    memset(w->dk, 0, (size_t)(KEYS * w->D) * 4);
    memset(w->dv, 0, (size_t)(KEYS * w->E) * 4);
    for (int64_t j = 0; j < group; j++)
        for (int64_t first = 0; first < p->N; first += BAND) {
            const int64_t queries = smaller(BAND, p->N - first), h = head * group + j;
            const struct range all = seen(p, first, first + queries - 1);
            if (all.from >= block.to || all.to <= block.from) continue;
            int32_t *const done = call->done ? call->done + (b * p->H + h) * bands + first / BAND : NULL;
            if (done && from / KEYS > larger(all.from, 0) / KEYS) await(call, done, from / KEYS);
            band(p, call->t, g, w, b, h, first, queries, block, sums + (j * p->N + first) * w->D);
            if (done) __atomic_store_n(done, (int32_t)(from / KEYS + 1), __ATOMIC_RELEASE);
        }
    const int64_t at = (b * p->G + head) * p->S + from;
    if (g->dk) write_rows(w->dk, count, w->D, p->D, p->scale / factor_of(p), g->dk + at * p->D);
    if (g->dv) write_rows(w->dv, count, w->E, p->E, 1.0f, g->dv + at * p->E);
}

static void backward_job(const void *context, int64_t index) {
    struct backward_call *const call = (struct backward_call *)(uintptr_t)context;
    const struct attention *const p = call->p;
    const int64_t of = index / call->blocks, b = of / p->G, head = of % p->G, group = p->H / p->G;
    struct room w;
    float *const memory = aligned_alloc(64, (size_t)whole(floats_of_room(p, &w, NULL) * 4, 64));
    if (!memory) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    floats_of_room(p, &w, memory);
    if (call->dq) {
        float *const sums = call->dq + of * group * p->N * w.D;
        backward_block(call, &w, b, head, index % call->blocks * KEYS, sums);
    } else {
        memset(w.dq, 0, (size_t)(group * p->N * w.D) * 4);
        for (int64_t from = 0; from < p->S; from += KEYS) backward_block(call, &w, b, head, from, w.dq);
        if (call->g->dq) write_queries(call, w.dq, group, b * p->H + head * group);
    }
    free(memory);
}

static void queries_job(const void *context, int64_t index) {
    const struct backward_call *const call = context;
    write_queries(call, call->dq + index * call->p->N * whole(call->p->D, LANES), 1, index);
}

// ``t->out`` is the gradient of the result, before any gate.
int backward(const struct attention *p, const struct tensors *t, const struct gradients *g) {
    struct backward_call call = {p, t, g, 1, NULL, NULL, 0};
    const int64_t heads = p->B * p->G, blocks = (p->S + KEYS - 1) / KEYS, bands = (p->N + BAND - 1) / BAND;
    if (blocks > 1 && heads % p->threads && heads < 4 * p->threads) {
        call.blocks = blocks;
        call.dq = calloc((size_t)(p->B * p->H * p->N * whole(p->D, LANES)), 4);
        call.done = calloc((size_t)(p->B * p->H * bands), 4);
        call.failed = !call.dq || !call.done;
    }
    if (!call.failed) parallel(backward_job, &call, heads * call.blocks, p->threads);
    if (!call.failed && call.dq && g->dq) parallel(queries_job, &call, p->B * p->H, p->threads);
    free(call.dq);
    free(call.done);
    return call.failed;
}
