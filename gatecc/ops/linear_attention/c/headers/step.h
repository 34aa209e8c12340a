// One token for every head: rows of S are DV wide, as the caller keeps them, and become those of ``to``, which may be S
// itself. A job is a head of a sample.
#pragma once
#include "../../../../codegen/c/headers/threads.h"
#include "tokens.h"

struct step {
    const float *q, *k, *v, *g, *beta;   // (jobs, DK); (jobs / group of each, DK), (, DV), (, DK or 1), ()
    const float *state;                  // (jobs, DK, DV)
    float *after, *o;                    // the state after the token; (jobs, DV)
    int64_t jobs, width;                 // width: of g
    int32_t k_group, v_group, g_group, beta_group;  // heads of q that one head serves
    float scale, inverse;  // inverse: as in tokens.h
    int32_t threads;
};

INLINE void step_columns(
    const float *S, float *to, const float *q, const float *k, const float *a, const float *v, float *o, float beta, const int cols
) {
    vf u[4], y[4];
    UNROLL for (int n = 0; n < cols; n++) {
        u[n] = load(v + n * LANES);
        y[n] = splat(0.0f);
    }
#if DELTA
    vf x[4];
    UNROLL for (int n = 0; n < cols; n++) x[n] = splat(0.0f);
    for (int r = 0; r < DK; r++)
        UNROLL for (int n = 0; n < cols; n++) x[n] += load(S + r * DV + n * LANES) * (GATED ? k[r] * a[r] : k[r]);
    UNROLL for (int n = 0; n < cols; n++) u[n] = (u[n] - x[n]) * beta;
#endif
    for (int r = 0; r < DK; r++)
        UNROLL for (int n = 0; n < cols; n++) {
            vf s = load(S + r * DV + n * LANES);
            if (GATED) s *= a[r];
            s += u[n] * k[r];
            store(to + r * DV + n * LANES, s);
            y[n] += s * q[r];
        }
    UNROLL for (int n = 0; n < cols; n++) store(o + n * LANES, y[n]);
}

static void step_job(const void *context, int64_t job) {
    const struct step *p = context;
    float q[DKP], a[DKP];
    const float *k = p->k + job / p->k_group * DK, *v = p->v + job / p->v_group * DV;
    const float *S = p->state + job * DK * DV;
    float *to = p->after + job * DK * DV, *o = p->o + job * DV;
    const float beta = DELTA ? p->beta[job / p->beta_group] : 1;
    for (int r = 0; r < DK; r++) q[r] = p->q[job * DK + r] * p->scale;
    if (GATED) {
        const float *g = p->g + job / p->g_group * p->width;
        for (int r = 0; r < DKP; r++) a[r] = r < DK ? g[p->width == 1 ? 0 : r] : 0;
        for (int r = 0; r < DKP; r += LANES) {
            const vf x = load(a + r);
            store(a + r, p->inverse ? root_of_sigmoid(x, p->inverse) : exponential(x));
        }
    }
    int n = 0;
    for (; n + 4 * LANES <= DV; n += 4 * LANES) step_columns(S + n, to + n, q, k, a, v + n, o + n, beta, 4);
    for (; n + LANES <= DV; n += LANES) step_columns(S + n, to + n, q, k, a, v + n, o + n, beta, 1);
    for (; n < DV; n++) {
        float u = v[n], y = 0;
        if (DELTA) {
            for (int r = 0; r < DK; r++) u -= S[r * DV + n] * (GATED ? k[r] * a[r] : k[r]);
            u *= beta;
        }
        for (int r = 0; r < DK; r++) {
            to[r * DV + n] = S[r * DV + n] * (GATED ? a[r] : 1) + u * k[r];
            y += to[r * DV + n] * q[r];
        }
        o[n] = y;
    }
}

// Small steps are not worth waking a thread.
void step(const struct step *p) {
    parallel(step_job, p, p->jobs, p->jobs * DK * DV < 1 << 18 ? 1 : p->threads);
}
