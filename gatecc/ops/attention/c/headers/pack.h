// Queries, keys and values as the products read them: lanes of PAIR numbers, whole vectors, zeros behind the last number.
#pragma once
#include "problem.h"

INLINE int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A row of D numbers, times a factor unless lanes are pairs: those are as exact as they came.
static void pack_query(const el *row, int64_t D, float factor, float *to) {
    for (int64_t d = 0; d < D; d += LANES * PAIR) {
        const vf x = D - d >= LANES * PAIR ? lanes(row + d) : lanes_of(row + d, D - d);
        store(to + d / PAIR, PAIR == 2 ? x : x * factor);
    }
}

// Keys as columns, from ``begin`` on, a whole number of vectors: to[panel][lane of D][NR], keys behind ``count`` zero.
static void pack_keys(const el *keys, int64_t pitch, int64_t begin, int64_t count, int64_t D, float *to) {
    const int64_t K = (D + PAIR - 1) / PAIR;
    for (int64_t key = begin; key < count; key += LANES) {
        float *const panel = to + key / NR * K * NR + key % NR;
        for (int64_t k = 0; k < K; k += LANES) {
            vf x[LANES];
            const int64_t left = D - k * PAIR;
            for (int i = 0; i < LANES; i++) {
                const el *const at = keys + (key + i) * pitch + k * PAIR;
                x[i] = key + i >= count ? splat(0.0f) : left >= LANES * PAIR ? lanes(at) : lanes_of(at, left);
            }
            transpose(x);
            for (int i = 0; i < LANES && k + i < K; i++) store(panel + (k + i) * NR, x[i]);
        }
    }
}

// Values as rows: to[lane of keys][E in whole vectors], PAIR rows beside each other in a lane.
static void pack_values(const el *values, int64_t pitch, int64_t begin, int64_t count, int64_t E, float *to) {
    const int64_t width = whole(E, LANES);
    for (int64_t k = begin; k < count; k += PAIR) {
        const el *const row = values + k * pitch;
        for (int64_t e = 0; e < E; e += LANES) {
#if PAIR == 2
            const int64_t n = E - e;
            const __mmask16 mask = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
            __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
            if (k + 1 < count) {
                const __m512i y = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + pitch + e));
                x = _mm512_or_si512(x, _mm512_slli_epi32(y, 16));
            }
            store(to + k / PAIR * width + e, (vf)x);
#else
            store(to + k * width + e, load_els(row + e, E - e));
#endif
        }
    }
}
