// The recurrence over ``cols`` vectors of value channels: S is DK rows of PITCH, v and o rows of DVP.
// What is written, u, replaces v; with the delta rules that is the corrected value.
#pragma once
#include "chunk.h"

INLINE void sweep(float *S, const struct chunk *c, float *v, float *o, const float *beta, const int cols) {
    vf u[M][2], y[M][2], x[M][2];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int n = 0; n < cols; n++) {
        u[i][n] = load(v + i * DVP + n * LANES);
        x[i][n] = y[i][n] = splat(0.0f);
    }
#if DELTA
    for (int r = 0; r < DK; r++) {
        vf s[2];
        UNROLL for (int n = 0; n < cols; n++) s[n] = load(S + r * PITCH + n * LANES);
        UNROLL for (int i = 0; i < M; i++) {
            const vf k = broadcast(c->kp[i][r]), q = broadcast(o ? c->qp[i][r] : 0);
            UNROLL for (int n = 0; n < cols; n++) x[i][n] += s[n] * k;
            UNROLL for (int n = 0; o && n < cols; n++) y[i][n] += s[n] * q;
        }
    }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int n = 0; n < cols; n++) {
        vf error = u[i][n] - x[i][n];
        UNROLL for (int j = 0; j < i; j++) error -= u[j][n] * c->kk[i * M + j];
        u[i][n] = error * beta[i];
        store(v + i * DVP + n * LANES, error);
    }
#endif
    UNROLL for (int i = 0; o && i < M; i++) UNROLL for (int j = 0; j <= i; j++) UNROLL for (int n = 0; n < cols; n++)
        y[i][n] += u[j][n] * c->qk[i * M + j];
    struct ahead *const ahead = c->ahead && c->ahead->next < 4 * M * LINES ? c->ahead : NULL;
    unsigned line = ahead ? ahead->next : 0;
    for (int r = 0; r < DK; r += ROWS) {
        vf s[ROWS][2], written[ROWS][2];
        for (int i = 0; ahead && i < ASKED; i++) ask(ahead, line++);
        UNROLL for (int j = 0; j < M; j++) UNROLL for (int m = 0; m < ROWS; m++) {
            const vf k = broadcast(c->kr[j][r + m]);
            UNROLL for (int n = 0; n < cols; n++) written[m][n] = j ? written[m][n] + u[j][n] * k : u[j][n] * k;
        }
        UNROLL for (int m = 0; m < ROWS; m++) UNROLL for (int n = 0; n < cols; n++)
            s[m][n] = load(S + (r + m) * PITCH + n * LANES);
        UNROLL for (int m = 0; m < ROWS; m++) UNROLL for (int i = 0; !DELTA && o && i < M; i++) {
            const vf q = broadcast(c->qp[i][r + m]);
            UNROLL for (int n = 0; n < cols; n++) y[i][n] += s[m][n] * q;
        }
        UNROLL for (int m = 0; m < ROWS; m++) {
            const vf all = broadcast(c->all[r + m]);
            UNROLL for (int n = 0; n < cols; n++)
                store(S + (r + m) * PITCH + n * LANES, GATED ? s[m][n] * all + written[m][n] : s[m][n] + written[m][n]);
        }
    }
    if (ahead) ahead->next = line;
    UNROLL for (int i = 0; o && i < M; i++) UNROLL for (int n = 0; n < cols; n++)
        store(o + i * DVP + n * LANES, y[i][n]);
}

// One micro-chunk of states alone; v becomes what the delta rules correct it to, before beta.
APART void advance_state(float *S, const struct chunk *c, float (*v)[DVP], const float *beta) {
    int n = 0;
    for (; LANES == 16 && n + 2 * LANES <= DVP; n += 2 * LANES) sweep(S + n, c, v[0] + n, NULL, beta, 2);
    for (; n < DVP; n += LANES) sweep(S + n, c, v[0] + n, NULL, beta, 1);
}

// One micro-chunk: the state and the outputs.
APART void advance(float *S, const struct chunk *c, float (*v)[DVP], float (*o)[DVP], const float *beta) {
    int n = 0;
    for (; LANES == 16 && n + 2 * LANES <= DVP; n += 2 * LANES) sweep(S + n, c, v[0] + n, o[0] + n, beta, 2);
    for (; n < DVP; n += LANES) sweep(S + n, c, v[0] + n, o[0] + n, beta, 1);
}
