// Products of a few rows with packed columns: what both products of attention are made of.
#pragma once
#include "../../../../codegen/c/headers/numbers.h"

#define MR 6                      // rows of a tile
#define NV (LANES == 16 ? 4 : 2)  // vectors of a row of it: with MR rows, all registers but a few
#define NR (NV * LANES)           // columns of a panel

// A lane of numbers, in all lanes.
INLINE vf everywhere(const float *p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    return (vf)(bits - (vi){0});
}

// out[r][v] = keep[r] * out[r][v] + the sum over k of a[r][k] * b[k][v], or without ``keep`` that sum alone. a and b hold
// lanes of PAIR numbers each, out floats; ``pitch``, ``step`` and ``width`` are from row to row. ``turned``: a[k][r].
INLINE void tile(
    const float *a, int64_t pitch, const float *b, int64_t step, int64_t count, float *out, int64_t width,
    const float *keep, const int rows, const int columns, const int turned
) {
    vf sum[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < columns; v++) sum[r][v] = splat(0.0f);
    for (int64_t k = 0; k < count; k++) {
        vf y[NV];
        UNROLL for (int v = 0; v < columns; v++) y[v] = load(b + k * step + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vf x = everywhere(turned ? a + k * pitch + r : a + r * pitch + k);
            UNROLL for (int v = 0; v < columns; v++) sum[r][v] = plus_product(sum[r][v], x, y[v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const vf kept = keep ? splat(keep[r]) : splat(0.0f);
        UNROLL for (int v = 0; v < columns; v++) {
            float *const at = out + r * width + v * LANES;
            store(at, keep ? load(at) * kept + sum[r][v] : sum[r][v]);
        }
    }
}

#define TILE(rows, columns) \
    case rows * 8 + columns: tile(a, pitch, b, step, count, out, width, keep, rows, columns, TURNED); break;
#if LANES == 16
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3) TILE(rows, 4)
#else
#define TILES(rows) TILE(rows, 1) TILE(rows, 2)
#endif
#define TILES_OF(name) \
    APART void name( \
        int rows, int columns, const float *a, int64_t pitch, const float *b, int64_t step, int64_t count, float *out, \
        int64_t width, const float *keep \
    ) { \
        switch (rows * 8 + columns) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) } \
    }
// Each size of a tile is a loop of its own.
#define TURNED 0
TILES_OF(tile_of)
