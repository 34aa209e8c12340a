// The forward pass on matrix units (AMX), for linear and gated rules with q, k and v in bfloat16: chunks of C tokens as
// products of tiles, of bfloat16 and summed in float32. The state stays in float32; what products read of it, and of
// keys and queries through gates, is rounded, as in all kernels for such units. Here: operands, and how they are made.
// (float32 as a sum of three bfloat16 has six products in the place of one: slower than the vector units.)
#pragma once
#include "chunk.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define C 32     // tokens of a chunk: the depth of a product of tiles
#define SIDE 16  // rows of a tile, and its columns of float32

typedef uint16_t bf16;

struct tiles {
    float S[DKP * PITCH], decay[DKP], all[DKP], gates[DKP], square[2][C][C];
    bf16 query[C][DKP];        // q_i P_i, with P_i the product of the gates of the chunk up to token i
    bf16 row[C][DKP];          // k_j / P_j,
    bf16 seen[DKP / 2][C][2];  // as right operand of scores: these have two rows in one, element by element,
    bf16 key[DKP][C];          // and transposed, as left operand of what is written to the state
    bf16 value[C / 2][DVP][2];
    bf16 state[DKP / 2][DVP][2];
    bf16 score[C][C];  // what token i reads of token j
    // Token by token, where gates are strong:
    float q[T][DKP], k[T][DKP], a[T][DKP], v[T][DVP], o[T][DVP], beta[T];
    struct chunk chunk;
};

// A sequence's rows of one operand, in the order of the recurrence.
struct series {
    const char *first;
    int64_t step;
};

struct job {
    const struct problem *p;
    struct sequence s;
    struct series q, k, v, g, o;
};

static struct series series_of(const struct problem *p, const struct sequence *s, const struct operand *x) {
    const int64_t step = x->token * (x->type == FLOAT32 ? 4 : 2);
    return (struct series){x->data ? row_of(x, s, token_of(p, s, 0)) : NULL, p->reverse ? -step : step};
}

static const float nothing[DKP + DVP];  // a row of zeros

// Beyond the end come zeros, which write nothing.
INLINE const char *row_at(const struct job *j, struct series x, int64_t t) {
    return t < j->s.length ? x.first + t * x.step : (const char *)nothing;
}

INLINE void fetch_series(struct series x, int64_t t, int channels) {
    for (int c = 0; c < channels; c += 32) __builtin_prefetch(x.first + t * x.step + 2 * c);
}

// Ask for a token of the next chunk while this one is computed.
INLINE void fetch_ahead(const struct job *j, int64_t t) {
    fetch_series(j->q, t + C, DK);
    fetch_series(j->k, t + C, DK);
    fetch_series(j->v, t + C, DV);
    if (GATED) fetch_series(j->g, t + C, DK);
}

// 16 channels from d of a row, and zeros beyond its width.
INLINE vf numbers(const char *row, int d, int width) {
    const __mmask16 inside = width - d >= LANES ? 0xffff : width <= d ? 0 : (__mmask16)((1u << (width - d)) - 1);
    const __m256i x = _mm256_maskz_loadu_epi16(inside, (const bf16 *)row + d);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

INLINE __m512i whole_row(const char *row, int d, int width) {  // 32 channels as they are
    const __mmask32 inside = width - d >= 32 ? ~0u : (1u << (width - d)) - 1;
    return _mm512_maskz_loadu_epi16(inside, (const bf16 *)row + d);
}

INLINE __m512i pair(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// x[0], y[0], x[1], y[1], ... of the first and of the last 16 of two rows of bfloat16.
INLINE __m512i interleaved(__m512i x, __m512i y, const int last) {
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0
    );
    return _mm512_permutex2var_epi16(x, last ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, y);
}
// The same of two rows of floats.
INLINE __m512i two_rows(vf x, vf y) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0
    );
    return _mm512_permutexvar_epi16(order, pair(x, y));
}

INLINE void transpose(__m512i x[16]) {
    __m512i y[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < 16; n += 8) {
        y[n + i] = _mm512_shuffle_i32x4(x[n + i], x[n + i + 4], 0x88);
        y[n + i + 4] = _mm512_shuffle_i32x4(x[n + i], x[n + i + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// Accumulators 0 to 3, a square of C, += C rows of A by C columns of B; pitches in bytes.
INLINE void multiply(const bf16 *A, size_t A_pitch, const bf16 *B, size_t B_pitch) {
    _tile_loadd(4, A, A_pitch);
    _tile_loadd(6, B, B_pitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + 2 * SIDE, B_pitch);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, A + SIDE * (A_pitch / sizeof(bf16)), A_pitch);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void clear_square(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void store_square(float *to, size_t pitch) {
    _tile_stored(0, to, 4 * pitch);
    _tile_stored(1, to + SIDE, 4 * pitch);
    _tile_stored(2, to + SIDE * pitch, 4 * pitch);
    _tile_stored(3, to + SIDE * pitch + SIDE, 4 * pitch);
}
#endif
