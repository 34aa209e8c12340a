// Products of gathered rows with a weight, (rows, K) x (N, K)^T. For a few rows these are dot products. For more, panels
// of the weight's columns are packed for the moment in which they are used: turning 16 x 16 numbers takes 64 shuffles,
// 16 products of a number with each of 16 rows as many steps, so with 32 rows packing takes an eighth of the time.
#pragma once
#include "../../../../codegen/c/headers/numbers.h"

#define MR 6                                // rows of a tile
#define NV (LANES == 16 ? 4 : 2)            // vectors of a row of it: with MR rows, all registers but a few
#define NR (NV * LANES)                     // columns of a panel
#ifndef KC
#define KC 512                              // lanes of K at once: a panel of 128 KB lies in the second cache
#endif
#define BLOCK 240                           // rows of a block, a multiple of MR
#define FEW 3  // rows up to which dot products are faster than packing

// What a panel is made of. Either its columns in a weight, NULL for none, their numbers ``step`` apart; or, with
// ``lines``, K of them with a number for each column: those from ``column`` on, ``width`` in all.
struct panel {
    const el *columns[NR];
    int64_t step, K;
    const void *const *lines;
    int64_t column, width;
    int of_nums;  // whether lines hold num, not el
};

// Numbers of two lines side by side, lane by lane.
INLINE vf paired(const struct panel *p, int64_t k, int64_t column, int64_t n) {
    const int64_t size = p->of_nums ? sizeof(num) : sizeof(el);
    const void *const at = (const char *)p->lines[k] + column * size;
#if PAIR == 2
    const __mmask16 mask = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
    if (k + 1 == p->K) return (vf)x;
    const void *const after = (const char *)p->lines[k + 1] + column * size;
    return (vf)_mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, after)), 16));
#else
    if (!p->of_nums) return load_els(at, n);
    return n >= LANES ? load(at) : floats_of(at, n);
#endif
}

static void pack_lines(const struct panel *p, int64_t first, int64_t count, float *packed) {
    for (int64_t k = 0; k < count; k++)
        for (int v = 0; v < NV; v++) {
            const int64_t column = p->column + v * LANES, n = p->width - column;
            store(packed + k * NR + v * LANES, n > 0 ? paired(p, (first + k) * PAIR, column, n) : splat(0.0f));
        }
}

// Lanes [first, first + count) of K into packed[count][NR].
static void pack(const struct panel *p, int64_t first, int64_t count, float *packed) {
    if (p->lines) {
        pack_lines(p, first, count, packed);
        return;
    }
    const int64_t K = p->K - first * PAIR;  // numbers left
    if (p->step != 1) {
        for (int64_t k = 0; k < count; k++)
            for (int c = 0; c < NR; c++) {
                num pair[PAIR];
                for (int i = 0; i < PAIR; i++) {
                    const int64_t at = k * PAIR + i;
                    const int there = p->columns[c] && at < K;
                    pair[i] = there ? as_num(widen(p->columns[c][(first * PAIR + at) * p->step])) : 0;
                }
                memcpy(packed + k * NR + c, pair, 4);
            }
        return;
    }
    for (int v = 0; v < NV; v++)
        for (int64_t k = 0; k < count; k += LANES) {
            vf x[LANES];
            const int64_t left = K - k * PAIR;
            for (int i = 0; i < LANES; i++) {
                const el *const column = p->columns[v * LANES + i];
                const el *const at = column + (first + k) * PAIR;
                x[i] = !column ? splat(0.0f) : left >= LANES * PAIR ? lanes(at) : lanes_of(at, left);
            }
            transpose(x);
            for (int i = 0; i < LANES && i < count - k; i++) store(packed + (k + i) * NR + v * LANES, x[i]);
        }
}

// Weights that come next, two pieces of memory in as many lines of 64 bytes each: they are asked for while a panel is
// multiplied, one cache line per step, or few rows would wait for the memory at each panel.
struct ahead {
    const char *at[2];
    int64_t lines, next;
};

INLINE void tile(
    const num *const *a, int64_t first, int64_t count, const float *packed, vf sum[MR][NV], struct ahead *ahead,
    const int rows
) {
    const int64_t left = ahead->lines - ahead->next, step = left > 0 ? 64 : 0, from = left > 0 ? ahead->next * 64 : 0;
    const char *next = ahead->at[0] + from, *other = ahead->at[1] + from;
    ahead->next += count;
    vf s[MR][NV];
    const num *p[MR];
    UNROLL for (int r = 0; r < rows; r++) {
        p[r] = a[r] + first * PAIR;
        UNROLL for (int v = 0; v < NV; v++) s[r][v] = sum[r][v];
    }
    for (int64_t k = 0; k < count; k++) {
        vf b[NV];
        __builtin_prefetch(next + k * step, 0, 2);
        __builtin_prefetch(other + k * step, 0, 2);
        UNROLL for (int v = 0; v < NV; v++) b[v] = load(packed + k * NR + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vf x = same(p[r] + k * PAIR);
            UNROLL for (int v = 0; v < NV; v++) s[r][v] = plus_product(s[r][v], x, b[v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) sum[r][v] = s[r][v];
}

// Tiles of up to MR rows: each number of rows is a loop of its own.
static void tile_of(
    int rows, const num *const *a, int64_t first, int64_t count, const float *packed, vf sum[MR][NV],
    struct ahead *ahead
) {
    switch (rows) {
    case 1: tile(a, first, count, packed, sum, ahead, 1); break;
    case 2: tile(a, first, count, packed, sum, ahead, 2); break;
    case 3: tile(a, first, count, packed, sum, ahead, 3); break;
    case 4: tile(a, first, count, packed, sum, ahead, 4); break;
    case 5: tile(a, first, count, packed, sum, ahead, 5); break;
    default: tile(a, first, count, packed, sum, ahead, MR);
    }
}

// One panel against all rows, in tiles of as equal size as may be. ``finish`` is given each finished tile: its first row,
// its rows and sums.
typedef void (*finish_t)(void *context, int64_t row, int rows, vf sum[MR][NV]);
static void multiply(
    const num *const *a, int64_t rows, const struct panel *p, float *packed, float *partial, finish_t finish,
    void *context, struct ahead ahead
) {
    const int64_t K = (p->K + PAIR - 1) / PAIR, tiles = (rows + MR - 1) / MR;
    for (int64_t first = 0; first < K; first += KC) {
        const int64_t count = K - first < KC ? K - first : KC;
        pack(p, first, count, packed);
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t row = rows * i / tiles;
            const int n = (int)(rows * (i + 1) / tiles - row);
            vf sum[MR][NV];
            for (int r = 0; r < n; r++)
                for (int v = 0; v < NV; v++)
                    sum[r][v] = first ? load(partial + (row + r) * NR + v * LANES) : splat(0.0f);
            tile_of(n, a + row, first, count, packed, sum, &ahead);
            if (first + count == K) {
                finish(context, row, n, sum);
                continue;
            }
            for (int r = 0; r < n; r++)
                for (int v = 0; v < NV; v++) store(partial + (row + r) * NR + v * LANES, sum[r][v]);
        }
    }
}

// Nothing: any address will do.
INLINE struct ahead nothing(const void *p) { return (struct ahead){{p, p}, 0, 0}; }

// LANES / R columns against R rows: one vector of sums, by row, then by column.
INLINE vf dots_of(const num *const *a, const el *w, int64_t pitch, int64_t K, const int R) {
    const int C = LANES / R;
    vf sum[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sum[i] = splat(0.0f);
    int64_t k = 0;
    for (; k + LANES * PAIR <= K; k += LANES * PAIR) {
        vf x[4];
        UNROLL for (int r = 0; r < R; r++) x[r] = load((const float *)(const void *)(a[r] + k));
        UNROLL for (int c = 0; c < C; c++) {
            const vf y = lanes(w + c * pitch + k);
            UNROLL for (int r = 0; r < R; r++) sum[r * C + c] = plus_product(sum[r * C + c], x[r], y);
        }
    }
    if (k < K)
        for (int c = 0; c < C; c++) {
            const vf y = lanes_of(w + c * pitch + k, K - k);
            for (int r = 0; r < R; r++) {
                vf x = splat(0.0f);
                memcpy(&x, a[r] + k, (size_t)(K - k) * sizeof(num));
                sum[r * C + c] = plus_product(sum[r * C + c], x, y);
            }
        }
    return sums(sum);
}

// out[r * width + n - from] for rows r and columns n from ``from`` to ``to``; numbers of a column lie together.
static void dots(
    const num *const *a, int64_t rows, const el *w, int64_t pitch, int64_t K, int64_t from, int64_t to, float *out
) {
    const int64_t width = to - from;
    for (int64_t row = 0; row < rows;) {
        const int R = rows - row >= 4 && LANES >= 4 ? 4 : rows - row >= 2 ? 2 : 1, C = LANES / R;
        int64_t n = from;
        for (; n + C <= to; n += C) {
            const el *const at = w + n * pitch;
            vf y;
            if (R == 4) y = dots_of(a + row, at, pitch, K, 4);
            else if (R == 2) y = dots_of(a + row, at, pitch, K, 2);
            else y = dots_of(a + row, at, pitch, K, 1);
            for (int r = 0; r < R; r++) memcpy(out + (row + r) * width + n - from, (float *)&y + r * C, (size_t)C * 4);
        }
        for (; n < to; n++)
            for (int r = 0; r < R; r++) {
                vf sum[LANES];
                for (int i = 0; i < LANES; i++) sum[i] = splat(0.0f);
                for (int64_t k = 0; k < K; k += LANES * PAIR) {
                    const int64_t left = K - k;
                    vf x = splat(0.0f);
                    memcpy(&x, a[row + r] + k, (size_t)(left < LANES * PAIR ? left : LANES * PAIR) * sizeof(num));
                    const el *const at = w + n * pitch + k;
                    sum[0] = plus_product(sum[0], x, left < LANES * PAIR ? lanes_of(at, left) : lanes(at));
                }
                out[(row + r) * width + n - from] = sums(sum)[0];
            }
        row += R;
    }
}
