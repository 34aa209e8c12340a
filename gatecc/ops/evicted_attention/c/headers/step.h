// Attention of one new token per sample over what each key head holds, and the token's place behind it.
#pragma once
#include "../../../../codegen/c/headers/numbers.h"
#include "../../../../codegen/c/headers/threads.h"

#define TILE 64      // keys at a time
#define ABREAST 8    // vectors of a result that are summed up at once
#define LOG2E 1.44269504088896341f

struct step {
    const el *q, *k, *v;        // (B, H, D), (B, K, D), (B, K, E)
    const float *keep;          // (B, K)
    const uint8_t *valid;       // (B), or NULL
    el *keys, *values;          // (C, D), (C, E)
    const int64_t *places;      // (B, K, 2 + recent / 3, 3): first, count, end of the room; what the newest tokens are
    int64_t *after;
    el *out;                    // (B, H, E)
    int64_t B, H, K, D, E, budget, recent;
    float scale, cap;
    int64_t threads;
};
enum { FIRST, COUNT, END };
enum { NONE, FLAGGED, KEPT };

struct query {  // one query head: what it has summed up so far
    float most, total;
    float *q, *sum;  // (D) in powers of two, or plain with a cap; (E)
};

INLINE int64_t stride(const struct step *p) { return 3 * (2 + (p->recent + 2) / 3); }

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Scores of n keys, at most TILE; -inf behind them.
INLINE float scored(const struct step *p, const struct query *x, const el *keys, int64_t n, float *s) {
    vf most = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += LANES) {
        vf rows[LANES];
        UNROLL for (int l = 0; l < LANES; l++) {
            rows[l] = splat(0.0f);
            if (j + l >= n) continue;
            const el *const key = keys + (j + l) * p->D;
            int64_t d = 0;
            for (; d + LANES <= p->D; d += LANES) rows[l] += load_els(key + d, LANES) * load(x->q + d);
            if (d < p->D) rows[l] += load_els(key + d, p->D - d) * load(x->q + d);
        }
        vf score = sums(rows);
        if (p->cap) {
            const vf e = exponential(between(splat(-40.0f), score * (-2.0f / p->cap), splat(40.0f)));
            score = (splat(1.0f) - e) / (splat(1.0f) + e) * (p->cap * LOG2E);
        }
        for (int l = 0; l < LANES; l++)
            if (j + l >= n) score[l] = -INFINITY;
        store(s + j, score);
        most = either(score > most, score, most);
    }
    float found = most[0];
    for (int l = 1; l < LANES; l++) found = most[l] > found ? most[l] : found;
    return found;
}

// sum <- factor sum + weights values
INLINE void summed(const struct step *p, float *sum, const el *values, const float *weights, int64_t n, float factor) {
    int64_t e = 0;
    for (; e + ABREAST * LANES <= p->E; e += ABREAST * LANES) {
        vf acc[ABREAST];
        UNROLL for (int i = 0; i < ABREAST; i++) acc[i] = load(sum + e + i * LANES) * factor;
        for (int64_t j = 0; j < n; j++) {
            const vf w = splat(weights[j]);
            const el *const row = values + j * p->E + e;
            UNROLL for (int i = 0; i < ABREAST; i++) acc[i] += w * load_els(row + i * LANES, LANES);
        }
        UNROLL for (int i = 0; i < ABREAST; i++) store(sum + e + i * LANES, acc[i]);
    }
    for (; e < p->E; e += LANES) {
        const int64_t wide = p->E - e < LANES ? p->E - e : LANES;
        vf acc = load(sum + e) * factor;
        for (int64_t j = 0; j < n; j++) acc += load_els(values + j * p->E + e, wide) * weights[j];
        store(sum + e, acc);
    }
}

static void attend(const struct step *p, struct query *x, int64_t group, const el *keys, const el *values, int64_t n) {
    float s[TILE];
    for (int64_t from = 0; from < n; from += TILE) {
        const int64_t some = n - from < TILE ? n - from : TILE;
        for (int64_t g = 0; g < group; g++) {
            const float most = scored(p, x + g, keys + from * p->D, some, s);
            const float top = most > x[g].most ? most : x[g].most;
            const float factor = power2(splat(x[g].most - top))[0];
            vf total = splat(0.0f);
            for (int64_t j = 0; j < some; j += LANES) {
                const vf w = power2(load(s + j) - top);
                store(s + j, w);
                total += w;
            }
            float sum = 0.0f;
            for (int l = 0; l < LANES; l++) sum += total[l];
            x[g].total = x[g].total * factor + sum;
            x[g].most = top;
            summed(p, x[g].sum, values + from * p->E, s, some, factor);
        }
    }
}

// Where the new token goes: 0 or 1, the class, or -1 if it is held by nobody.
INLINE int64_t class_of(const struct step *p, int64_t head) {
    if (p->valid && !p->valid[head / p->K]) return -1;
    if (p->keep[head] > 0.5f) return 0;
    return p->budget || p->recent ? 1 : -1;
}

static void one_head(const void *context, int64_t head) {
    const struct step *const p = context;
    const int64_t group = p->H / p->K, wide = padded(p->D), tall = padded(p->E);
    const int64_t *const held = p->places + head * stride(p);
    float memory[group * (wide + tall)];
    struct query x[group];
    const float factor = p->cap ? p->scale : p->scale * LOG2E;
    memset(memory, 0, sizeof memory);
    for (int64_t g = 0; g < group; g++) {
        x[g] = (struct query){-INFINITY, 0.0f, memory + g * wide, memory + group * wide + g * tall};
        const el *const q = p->q + (head * group + g) * p->D;
        for (int64_t d = 0; d < p->D; d++) x[g].q[d] = widen(q[d]) * factor;
    }
    const el *const key = p->k + head * p->D, *const value = p->v + head * p->E;
    attend(p, x, group, key, value, 1);
    for (int c = 0; c < 2; c++)
        attend(p, x, group, p->keys + held[3 * c] * p->D, p->values + held[3 * c] * p->E, held[3 * c + COUNT]);
    for (int64_t g = 0; g < group; g++)
        for (int64_t e = 0; e < p->E; e++)
            p->out[(head * group + g) * p->E + e] = narrow(x[g].sum[e] / x[g].total);
    int64_t *const after = p->after + head * stride(p);
    memcpy(after, held, (size_t)stride(p) * sizeof(int64_t));
    const int64_t c = class_of(p, head);
    if (c < 0) return;
    const int64_t at = held[3 * c] + held[3 * c + COUNT];
    memcpy(p->keys + at * p->D, key, (size_t)p->D * sizeof(el));
    memcpy(p->values + at * p->E, value, (size_t)p->E * sizeof(el));
    after[3 * c + COUNT]++;
    int64_t newest[2] = {0, 0}, *const last = after + 6;  // how many of each class are among the newest
    if (p->recent) {
        memmove(last, last + 1, (size_t)(p->recent - 1) * sizeof(int64_t));
        last[p->recent - 1] = c ? FLAGGED : KEPT;
        for (int64_t i = 0; i < p->recent; i++) newest[0] += last[i] == KEPT, newest[1] += last[i] == FLAGGED;
    }
    for (int d = p->budget ? 0 : 1; d < 2; d++) {  // the oldest leave: of the kept tokens, then of the others
        int64_t room = p->budget ? p->budget - p->recent : 0;
        if (d && p->budget) room -= after[COUNT] - newest[0];
        const int64_t over = after[3 * d + COUNT] - newest[d] - room;
        if (over > 0) after[3 * d] += over, after[3 * d + COUNT] -= over;
    }
}

// 1, or 0 if a head has no room for its token: then nothing was written.
int step(const struct step *p) {
    for (int64_t head = 0; head < p->B * p->K; head++) {
        const int64_t c = class_of(p, head);
        if (c < 0) continue;
        const int64_t *const held = p->places + head * stride(p) + 3 * c;
        if (held[FIRST] + held[COUNT] >= held[END]) return 0;
    }
    parallel(one_head, p, p->B * p->K, (int)p->threads);
    return 1;
}
