// Chunks with mild gates, or none: tokens meet as (q_i P_i) · (k_j / P_j), all of them in one product.
#pragma once
#include "tiles_units.h"

#if defined(TILES)
#define MILD 1e-15f  // of the product of a chunk's gates: what is divided by it stays far from overflow

INLINE void gates_at(float *a, const struct job *j, int64_t t) {
    if (t < j->s.length) {
        read_gates(j->p, j->g.first + t * j->g.step, a);
        return;
    }
    for (int d = 0; d < DKP; d += LANES) store(a + d, splat(1.0f));
}

// Tokens [t, t + C): queries, and rows of keys. 0 if the gates are too strong to divide by.
APART int read_keys(struct tiles *w, const struct job *j, int64_t t) {
    for (int d = 0; d < DKP; d += LANES) store(w->all + d, splat(1.0f));
    for (int i = 0; i < C; i++) {
        const char *q = row_at(j, j->q, t + i), *k = row_at(j, j->k, t + i);
        fetch_ahead(j, t + i);
        if (GATED) gates_at(w->gates, j, t + i);
        for (int d = 0; d < DKP; d += 2 * LANES) {
            vf query[2], key[2];
            UNROLL for (int n = 0; n < 2; n++) {
                const int c = d + n * LANES;
                query[n] = numbers(q, c, DK);
                key[n] = numbers(k, c, DK);
                if (!GATED) continue;
                const vf product = load(w->all + c) * load(w->gates + c);
                store(w->all + c, product);
                query[n] *= product;
                key[n] *= (vf)_mm512_rcp14_ps((__m512)product);
            }
            _mm512_store_si512(w->query[i] + d, pair(query[0], query[1]));
            _mm512_store_si512(w->row[i] + d, pair(key[0], key[1]));
        }
    }
    __mmask16 mild = 0xffff;
    for (int d = 0; GATED && d < DK; d += LANES)
        mild &= _mm512_cmp_ps_mask(_mm512_loadu_ps(w->all + d), _mm512_set1_ps(MILD), _CMP_GE_OQ);  // NaN is not
    return mild == 0xffff;
}

// 0 if one is infinite or NaN: in a product of tiles it would spoil tokens before it, too.
APART int read_values(struct tiles *w, const struct job *j, int64_t t) {
    const __m512i number = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < C; i += 2) for (int d = 0; d < DVP; d += 2 * LANES) {
        const __m512i even = whole_row(row_at(j, j->v, t + i), d, DV);
        const __m512i odd = whole_row(row_at(j, j->v, t + i + 1), d, DV);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(even, number));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(odd, number));
        _mm512_store_si512(w->value[i / 2][d], interleaved(even, odd, 0));
        _mm512_store_si512(w->value[i / 2][d + LANES], interleaved(even, odd, 1));
    }
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
}

APART void turn_for_scores(struct tiles *w) {
    for (int t = 0; t < C; t += SIDE) for (int d = 0; d < DKP; d += 2 * LANES) {
        __m512i x[SIDE];
        UNROLL for (int i = 0; i < SIDE; i++) x[i] = _mm512_load_si512(w->row[t + i] + d);
        transpose(x);
        UNROLL for (int i = 0; i < SIDE; i++) _mm512_store_si512(w->seen[d / 2 + i][t], x[i]);
    }
}

APART void turn_for_state(struct tiles *w) {
    for (int d = 0; d < DKP; d += 2 * LANES) for (int last = 0; last < 2; last++) {
        __m512i x[C / 2];
        UNROLL for (int i = 0; i < C / 2; i++) {
            const bf16 *even = w->row[2 * i] + d, *odd = w->row[2 * i + 1] + d;
            x[i] = interleaved(_mm512_load_si512(even), _mm512_load_si512(odd), last);
        }
        transpose(x);
        UNROLL for (int i = 0; i < LANES; i++) _mm512_store_si512(w->key[d + last * LANES + i], x[i]);
    }
}

APART void meet(struct tiles *w, const int reads) {
    if (reads) {
        turn_for_scores(w);
        clear_square();
        for (int d = 0; d < DKP; d += C) multiply(w->query[0] + d, 2 * DKP, w->seen[d / 2][0], 4 * C);
        store_square(w->square[0][0], C);
    }
    turn_for_state(w);  // while the product is on its way
    for (int i = 0; reads && i < C; i++) {
        const float *row = w->square[0][i];
        const __mmask32 seen = (__mmask32)((2ull << i) - 1);  // no token that is later
        _mm512_store_si512(w->score[i], _mm512_maskz_mov_epi16(seen, pair(load(row), load(row + LANES))));
    }
}

// What a chunk multiplies, a square of C at a time: outputs, by channels of values; then what is written to the state.
enum { OUTPUTS = DVP / C, WRITTEN = (DKP / C) * (DVP / C) };
INLINE int key_of(int n) { return (n - OUTPUTS) / OUTPUTS * C; }
INLINE int value_of(int n) { return (n - OUTPUTS) % OUTPUTS * C; }

INLINE void multiply_square(struct tiles *w, int n) {
    clear_square();
    if (n < OUTPUTS) {
        for (int d = 0; d < DKP; d += C) multiply(w->query[0] + d, 2 * DKP, w->state[d / 2][n * C], 4 * DVP);
        multiply(w->score[0], 2 * C, w->value[0][n * C], 4 * DVP);
    } else {
        multiply(w->key[key_of(n)], 2 * C, w->value[0][value_of(n)], 4 * DVP);
    }
    store_square(w->square[n % 2][0], C);
}

INLINE void write_outputs(const struct tiles *w, const struct job *j, int64_t t, int n) {
    const __mmask32 inside = DV - n * C >= C ? ~0u : (1u << (DV - n * C)) - 1;
    for (int64_t i = 0; i < C && t + i < j->s.length; i++) {
        bf16 *row = (bf16 *)(j->o.first + (t + i) * j->o.step);
        const float *o = w->square[n % 2][i];
        const vf low = load(o) * j->p->scale, high = load(o + LANES) * j->p->scale;
        _mm512_mask_storeu_epi16(row + n * C, inside, pair(low, high));
    }
}

// A pair of rows of the state, and what outputs read of it.
INLINE void keep_state(struct tiles *w, int r, int c, vf x, vf y) {
    store(w->S + r * PITCH + c, x);
    store(w->S + (r + 1) * PITCH + c, y);
    _mm512_store_si512(w->state[r / 2][c], two_rows(x, y));
}

// Before the gates, for keys were divided by them.
INLINE void add_written(struct tiles *w, int n) {
    for (int i = 0; i < C; i += 2) UNROLL for (int l = 0; l < C; l += LANES) {
        const int r = key_of(n) + i, c = value_of(n) + l;
        const float *S = w->S + r * PITCH + c, *u = w->square[n % 2][i] + l;
        vf x = load(S) + load(u), y = load(S + PITCH) + load(u + C);
        if (GATED) x *= broadcast(w->all[r]);
        if (GATED) y *= broadcast(w->all[r + 1]);
        keep_state(w, r, c, x, y);
    }
}

// The next square is multiplied while one is put where it belongs.
APART void mild_chunk(struct tiles *w, const struct job *j, int64_t t) {
    const int reads = j->o.first != NULL;
    int n = reads ? 0 : OUTPUTS;
    meet(w, reads);
    multiply_square(w, n);
    for (; n < OUTPUTS + WRITTEN; n++) {
        if (n + 1 < OUTPUTS + WRITTEN) multiply_square(w, n + 1);
        if (n < OUTPUTS)
            write_outputs(w, j, t, n);
        else
            add_written(w, n);
    }
}
#endif
