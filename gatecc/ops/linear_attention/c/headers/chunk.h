// A micro-chunk of M tokens. With P_i the product of the gates up to token i of the chunk and R_j that of those after
// token j, every factor is a product of gates: nothing is divided by a gate, so gates of 0 are exact.
#pragma once
#include "tokens.h"

struct chunk {
    float qp[M][DKP];   // q_i P_i
    float kr[M][DKP];   // k_j R_j
    float kp[M][DKP];   // k_i P_i, delta rules: what key i reads of the state before the chunk
    float all[DKP];     // P of the last token
    float qk[M * M];    // q_i · k_j through the gates between, j <= i
    float kk[M * M];    // k_i · k_j likewise, j < i, delta rules
    struct ahead *ahead;  // lines to ask for while the chunk is worked on, or NULL
};

APART void prepare(struct chunk *c, const float (*q)[DKP], const float (*k)[DKP], const float (*a)[DKP]) {
    vf qk[M * M] = {0}, kk[M * M] = {0};
    for (int d = 0; d < DKP; d += LANES) {
        UNROLL for (int i = 0; q && i < M; i++) {
            vf x = load(q[i] + d);
            UNROLL for (int j = i; j >= 0; j--) {
                qk[i * M + j] += x * load(k[j] + d);
                if (GATED) x *= load(a[j] + d);
            }
            store(c->qp[i] + d, x);
        }
        UNROLL for (int i = 0; DELTA && i < M; i++) {
            vf x = load(k[i] + d);
            if (GATED) x *= load(a[i] + d);
            UNROLL for (int j = i - 1; j >= 0; j--) {
                kk[i * M + j] += x * load(k[j] + d);
                if (GATED) x *= load(a[j] + d);
            }
            store(c->kp[i] + d, x);
        }
        vf rest = splat(1.0f);
        UNROLL for (int j = M - 1; j >= 0; j--) {
            store(c->kr[j] + d, load(k[j] + d) * rest);
            if (GATED) rest *= load(a[j] + d);
        }
        store(c->all + d, rest);
    }
    UNROLL for (int n = 0; n < M * M; n += LANES) {
        store(c->qk + n, sums(qk + n));
        if (DELTA) store(c->kk + n, sums(kk + n));
    }
}
