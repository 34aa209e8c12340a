// The forward pass on matrix units (AMX), for linear and gated rules with q, k and v in bfloat16: chunks of C tokens as
// products of tiles, of bfloat16 and summed in float32. The state stays in float32; what products read of it, and of
// keys and queries through gates, is rounded, as in all kernels for such units. Here: operands, and how they are made.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define C 32        // tokens of a chunk: the depth of a product of tiles
#define SIDE 16     // rows of a tile, and its columns of float32
#define MICRO (C / M)

typedef uint16_t bf16;

// Key channels stand in another order here: in each 32 those of even number, then those of odd. So a row of bfloat16 is
// two vectors of floats by a shift and a mask. Sums over channels do not mind; the state is put in order at the ends.
#define CHANNEL(place) ((place) / 32 * 32 + (place) % 32 % 16 * 2 + (place) % 32 / 16)

struct micro {  // see struct chunk
    float qp[M][DKP], kr[M][DKP], all[DKP];
};

struct tiles {
    float S[DKP * DVP], decay[DKP], all[DKP], square[2][C][C];
    bf16 query[C][DKP];            // q_i P_i, with P_i the product of the gates of the chunk up to token i
    bf16 key[DKP][C];              // k_j through the gates behind it, transposed
    bf16 value[C / 2][DVP][2];     // right operands have two rows in one, element by element
    bf16 state[DKP / 2][DVP][2];
    bf16 score[C][C];              // what token i reads of token j
    bf16 row[C][DKP], seen[DKP / 2][C][2];  // keys on their way to scores
    float a[M][DKP], met[SIDE][SIDE];
    struct micro micro[MICRO];
};

// A sequence's rows of one operand, in the order of the recurrence.
struct stream {
    const char *first;
    int64_t step;
};

struct job {
    const struct problem *p;
    struct sequence s;
    struct stream q, k, v, g, o;
};

static struct stream stream_of(const struct problem *p, const struct sequence *s, const struct operand *x) {
    const int64_t step = x->token * (x->type == FLOAT32 ? 4 : 2);
    return (struct stream){x->data ? row_of(x, s, token_of(p, s, 0)) : NULL, p->reverse ? -step : step};
}

static const float nothing[DKP + DVP];  // a row of zeros, of any operand and type

// Beyond the end come zeros: they write nothing, and a gate of e^0 changes nothing.
INLINE const char *row_at(const struct job *j, struct stream x, int64_t t) {
    return t < j->s.length ? x.first + t * x.step : (const char *)nothing;
}

INLINE __m512i whole_row(const char *row, int d, int width) {  // 32 channels from d, and zeros beyond the width
    const __mmask32 inside = width - d >= 32 ? ~0u : (1u << (width - d)) - 1;
    return _mm512_maskz_loadu_epi16(inside, (const bf16 *)row + d);
}
INLINE vf half_row(const char *row, int d) {  // vector d of the order of CHANNEL
    const __m512i x = whole_row(row, d / 32 * 32, DK);
    return (vf)(d % 32 ? _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(x, 16));
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

// e^x to 2e-7 (and 1e-7 |x|): 2^y as the power of two below, and a polynomial in the rest of least relative error.
INLINE vf quick_exponential(vf x) {
    const vf y = x * 1.44269504088896341f, f = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF);
    vf p = f * 1.8671304956e-3f + 9.0170294152e-3f;
    p = p * f + 5.5799913759e-2f;
    p = p * f + 2.4016444997e-1f;
    p = p * f + 6.9315131182e-1f;
    return (vf)_mm512_scalef_ps((__m512)(p * f + 1.0f), (__m512)y);
}

// The gates of a token.
APART void read_gates(float *a, const struct job *j, int64_t t) {
    const struct operand *x = &j->p->g;
    const char *row = row_at(j, j->g, t);
    if (x->width == 1) {
        const vf gate = splat(quick_exponential(splat(element(row, x->type, 0)))[0]);
        for (int d = 0; d < DKP; d += LANES) store(a + d, gate);
    } else if ((x->channel == 1 && x->type == BFLOAT16) || row == (const char *)nothing) {
        for (int d = 0; d < DKP; d += LANES) store(a + d, quick_exponential(half_row(row, d)));
    } else {
        float g[DKP] = {0};
        for (int d = 0; d < DKP; d++)
            if (CHANNEL(d) < DK) g[d] = element(row, x->type, CHANNEL(d) * x->channel);
        for (int d = 0; d < DKP; d += LANES) store(a + d, quick_exponential(load(g + d)));
    }
}

INLINE void fetch_stream(struct stream x, int64_t t, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(x.first + t * x.step + b);
}

// Ask for a token of the next chunk while this one is computed.
INLINE void fetch_ahead(const struct job *j, int64_t t) {
    fetch_stream(j->q, t + C, 2 * DK);
    fetch_stream(j->k, t + C, 2 * DK);
    fetch_stream(j->v, t + C, 2 * DV);
    if (GATED) fetch_stream(j->g, t + C, 2 * DK);
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
