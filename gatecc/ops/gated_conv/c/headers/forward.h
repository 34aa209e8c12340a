// A convolution of two axes, of which each sample computes the output channels whose gate is not 0, and reads the input
// channels that are not known to be 0. What is read of a few rows of the kernel is packed, abreast, for all places.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../../../codegen/c/headers/vectors.h"

#define ROWS 6             // output channels abreast
#define WIDE 2             // vectors of places abreast
#define TILE (WIDE * LANES)

struct convolution {
    const float *x, *weight, *bias, *gate, *inputs;  // contiguous; bias and inputs may be NULL
    float *y;                                        // (B, O, OH, OW)
    int64_t B, C, H, W, O, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW;
    int64_t gate_step, inputs_step;  // from sample to sample, 0 if they share a row
};

// Inputs with their padding, of the channels that are read. With steps of 1 a tap of a place lies `shift` behind the
// place: places are numbered through the padded lines, and those between two lines of the result are dropped. With other
// steps they are unfolded first, a plane for each tap.
struct scratch {
    int64_t *rows, *columns, on, read;
    int64_t taps, line, places, tiles, plane;  // line: from a line of the result to the next; plane: of a channel and tap
    int64_t *shift;                            // (taps)
    float *in;                                 // (read, or read taps; plane)
    float *last;                               // (ROWS, TILE)
    float *packed;                             // (read, taps, rows abreast)
};

static void pad(const struct convolution *p, const float *x, const struct scratch *s) {
    const int64_t W = p->W + 2 * p->PW;
    for (int64_t i = 0; i < s->read; i++) {
        float *const to = s->in + i * s->plane;
        const float *const from = x + s->columns[i] * p->H * p->W;
        memset(to, 0, (size_t)s->plane * sizeof(float));
        for (int64_t h = 0; h < p->H; h++)
            memcpy(to + (h + p->PH) * W + p->PW, from + h * p->W, (size_t)p->W * sizeof(float));
    }
}

static void unfold(const struct convolution *p, const float *x, const struct scratch *s) {
    float *to = s->in;
    for (int64_t i = 0; i < s->read; i++) {
        const float *const from = x + s->columns[i] * p->H * p->W;
        for (int64_t k = 0; k < s->taps; k++, to += s->plane) {
            const int64_t first = k % p->KW * p->DW - p->PW;
            memset(to, 0, (size_t)s->plane * sizeof(float));
            for (int64_t oh = 0; oh < p->OH; oh++) {
                const int64_t h = oh * p->SH - p->PH + k / p->KW * p->DH;
                if (h < 0 || h >= p->H) continue;
                for (int64_t ow = 0; ow < p->OW; ow++) {
                    const int64_t w = ow * p->SW + first;
                    if (w >= 0 && w < p->W) to[oh * p->OW + ow] = from[h * p->W + w];
                }
            }
        }
    }
}

INLINE void pack(const struct convolution *p, const struct scratch *s, int64_t row, const int count) {
    for (int r = 0; r < count; r++) {
        float *to = s->packed + r;
        for (int64_t i = 0; i < s->read; i++) {
            const float *const from = p->weight + (s->rows[row + r] * p->C + s->columns[i]) * s->taps;
            for (int64_t k = 0; k < s->taps; k++, to += count) *to = from[k];
        }
    }
}

// `count` output channels at a tile of places.
INLINE void block(
    const struct convolution *p, const struct scratch *s, int64_t sample, int64_t row, int64_t t, const int count
) {
    vf sum[ROWS][WIDE];
    UNROLL for (int r = 0; r < count; r++) {
        const int64_t o = s->rows[row + r];
        UNROLL for (int v = 0; v < WIDE; v++) sum[r][v] = splat(p->bias ? p->bias[o] : 0.0f);
    }
    const float *in = s->in + t * TILE, *w = s->packed;
    const int64_t next = s->shift[s->taps];
    for (int64_t i = 0; i < s->read; i++, in += next) {
        for (int64_t k = 0; k < s->taps; k++, w += count) {
            const float *const at = in + s->shift[k];
            vf x[WIDE];
            UNROLL for (int v = 0; v < WIDE; v++) x[v] = load(at + v * LANES);
            UNROLL for (int r = 0; r < count; r++) {
                const vf factor = broadcast(w[r]);
                UNROLL for (int v = 0; v < WIDE; v++) sum[r][v] += factor * x[v];
            }
        }
    }
    UNROLL for (int r = 0; r < count; r++) {
        const int64_t o = s->rows[row + r];
        const vf gate = splat(p->gate[sample * p->gate_step + o]);
        UNROLL for (int v = 0; v < WIDE; v++) store(s->last + r * TILE + v * LANES, gate * sum[r][v]);
    }
    // Into the lines of the result: the places of a tile that are no padding.
    const int64_t first = t * TILE, end = first + TILE < s->places ? first + TILE : s->places;
    for (int64_t h = first / s->line; h < p->OH && h * s->line < end; h++) {
        const int64_t from = h * s->line > first ? h * s->line : first;
        const int64_t to = h * s->line + p->OW < end ? h * s->line + p->OW : end;
        if (from >= to) continue;
        for (int r = 0; r < count; r++) {
            float *const y = p->y + ((sample * p->O + s->rows[row + r]) * p->OH + h) * p->OW;
            memcpy(y + from - h * s->line, s->last + r * TILE + from - first, (size_t)(to - from) * sizeof(float));
        }
    }
}

static void convolve_sample(const struct convolution *p, struct scratch *s, int64_t sample, const int direct) {
    const float *const gate = p->gate + sample * p->gate_step, *const x = p->x + sample * p->C * p->H * p->W;
    s->on = s->read = 0;
    for (int64_t o = 0; o < p->O; o++) {
        if (gate[o] != 0.0f) s->rows[s->on++] = o;
        else memset(p->y + (sample * p->O + o) * p->OH * p->OW, 0, (size_t)(p->OH * p->OW) * sizeof(float));
    }
    for (int64_t c = 0; c < p->C; c++) {
        if (!p->inputs || p->inputs[sample * p->inputs_step + c] != 0.0f) s->columns[s->read++] = c;
    }
    if (!s->on) return;
    if (direct) pad(p, x, s);
    else unfold(p, x, s);
    int64_t row = 0;
    for (; row + ROWS <= s->on; row += ROWS) {
        pack(p, s, row, ROWS);
        for (int64_t t = 0; t < s->tiles; t++) block(p, s, sample, row, t, ROWS);
    }
    for (; row + 2 <= s->on; row += 2) {
        pack(p, s, row, 2);
        for (int64_t t = 0; t < s->tiles; t++) block(p, s, sample, row, t, 2);
    }
    if (row < s->on) {
        pack(p, s, row, 1);
        for (int64_t t = 0; t < s->tiles; t++) block(p, s, sample, row, t, 1);
    }
}

// Whether there was memory for it.
int forward(const char *call) {
    struct convolution p;
    memcpy(&p, call, sizeof p);
    const int direct = p.SH == 1 && p.SW == 1;
    struct scratch s = {.taps = p.KH * p.KW, .line = direct ? p.W + 2 * p.PW : p.OW};
    s.places = (p.OH - 1) * s.line + p.OW;
    s.tiles = (s.places + TILE - 1) / TILE;
    // What a tile reads behind the last place, of the last tap, is inside the plane.
    const int64_t reach = direct ? (p.KH - 1) * p.DH * s.line + (p.KW - 1) * p.DW : 0;
    const int64_t padded = (p.H + 2 * p.PH) * s.line;
    s.plane = s.tiles * TILE + reach;
    if (direct && padded > s.plane) s.plane = padded;
    s.rows = malloc((size_t)(p.O + p.C + s.taps + 1) * sizeof(int64_t));
    s.in = malloc((size_t)(p.C * (direct ? 1 : s.taps) * s.plane + ROWS * (TILE + p.C * s.taps)) * sizeof(float));
    const int made = s.rows && s.in;
    if (made) {
        s.columns = s.rows + p.O;
        s.shift = s.columns + p.C;
        for (int64_t k = 0; k < s.taps; k++)
            s.shift[k] = direct ? k / p.KW * p.DH * s.line + k % p.KW * p.DW : k * s.plane;
        s.shift[s.taps] = direct ? s.plane : s.taps * s.plane;
        s.last = s.in + p.C * (direct ? 1 : s.taps) * s.plane;
        s.packed = s.last + ROWS * TILE;
        for (int64_t b = 0; b < p.B; b++) convolve_sample(&p, &s, b, direct);
    }
    free(s.rows);
    free(s.in);
    return made;
}
