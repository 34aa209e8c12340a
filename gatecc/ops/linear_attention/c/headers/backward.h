// Gradients. A job goes forward once to keep the state before every span of SPAN tokens, then backward span by span:
// the states before its micro-chunks are computed again, and the gradient of the state, D, is carried from the end.
//
// With S the state before a micro-chunk and D the gradient of the state after it (both through the gates of the chunk
// only by products, so that strong decay costs no digits), e the gradient of the corrected value and u = beta * error:
//     X_i = S do_i,  Z_i = -S e_i,  Y_j = D u_j,  W = the products of S and D summed over value channels,
//     dq_i = P_i X_i + pairs,  dk_j = R_j Y_j + P_j Z_j + pairs,  du_j = D^T (k_j R_j) + pairs,
//     dg_t = all W + sum_{j<t} k_j R_j Y_j + sum_{i>=t} P_i (q_i X_i + k_i Z_i) + pairs that the gate t lies between.
//
// Most sums run over value channels: here a vector holds key channels. A state is kept in the order in which it is read,
// DKP / LANES blocks of DVL vectors.
#pragma once
#include "../../../../codegen/c/headers/pages.h"
#include "../../../../codegen/c/headers/threads.h"
#include "chunk.h"

#define SPAN 64
#define CHUNKS (SPAN / M)
#define DVL PADDED(DV)
#define AT(d, n) ((d) * DVL + (n) * LANES)  // key channels d to d + LANES of value channel n
#define STATE (DKP * DVL)

struct backward_scratch {
    float S[STATE], D[STATE], after[CHUNKS][STATE];  // after each chunk of a span
    float q[SPAN][DKP], k[SPAN][DKP], a[SPAN][DKP], v[SPAN][DVP], u[SPAN][DVP], grad[SPAN][DVP], beta[SPAN];
    float X[M][DKP], Y[M][DKP], Z[M][DKP], W[DKP];
    float dq[M][DKP], dk[M][DKP], dg[M][DKP], e[M][DVP], dbeta[LANES];  // e: dv, too
    struct chunk chunk;
    struct ahead ahead;
    unsigned lines;  // to ask for
};

// Lists the rows of the M tokens from t on for `write_values` to ask for, into the second cache: a span is too much for
// the first. ``all``: the rows of q and of the outputs' gradients as well. A fifth of the time was spent on waiting.
APART void expect_tokens(struct backward_scratch *w, const struct problem *p, const struct sequence *s, int64_t t, int all) {
    w->lines = 0;
    if (t < 0 || t + M > s->length) return;
    look_ahead(&w->ahead, p, s, t, all);
    if (!GATED) list_rows(&w->ahead, 2 * M, &p->k, p, s, t);
    if (all) list_rows(&w->ahead, 4 * M, &p->grad_o, p, s, t);
    w->lines = (all ? 5 : 3) * M * LINES;
}

// x_j = S^T k_j for M rows.
APART void look_up(float (*x)[DVP], const float *S, const float (*k)[DKP]) {
    for (int n = 0; n < DVL; n += LANES)
        for (int j = 0; j < M; j++) {
            vf y[LANES];
            UNROLL for (int i = 0; i < LANES; i++) y[i] = load(S + AT(0, n + i)) * load(k[j]);
            for (int d = LANES; d < DKP; d += LANES) {
                const vf z = load(k[j] + d);
                UNROLL for (int i = 0; i < LANES; i++) y[i] += load(S + AT(d, n + i)) * z;
            }
            store(x[j] + n, sums(y));
        }
}

// The state ``to`` after a chunk that wrote u, from that before it.
APART void write_values(struct backward_scratch *w, float *to, const float *S, const float (*u)[DVP]) {
    const struct chunk *c = &w->chunk;
    unsigned line = 0;
    for (int d = 0; d < DKP; d += LANES) {
        const vf all = load(c->all + d);
        vf k[M];
        UNROLL for (int j = 0; j < M; j++) k[j] = load(c->kr[j] + d);
        for (int n = 0; n < DVL; n += 4) {
            if (line < w->lines) ask_far(&w->ahead, line++);
            UNROLL for (int i = n; i < n + 4; i++) {
                vf s = load(S + AT(d, i));
                if (GATED) s *= all;
                UNROLL for (int j = 0; j < M; j++) s += k[j] * u[j][i];
                store(to + AT(d, i), s);
            }
        }
    }
}

// X, Y, Z, W of a chunk, and D of the state before it.
APART void carry_back(struct backward_scratch *w, const float *S, const float (*u)[DVP], const float (*grad)[DVP]) {
    const struct chunk *c = &w->chunk;
    for (int d = 0; d < DKP; d += LANES) {
        vf X[M] = {0}, Y[M] = {0}, Z[M] = {0}, W = {0}, q[M], k[M];
        const vf all = load(c->all + d);
        UNROLL for (int i = 0; i < M; i++) {
            q[i] = load(c->qp[i] + d);
            if (DELTA) k[i] = load(c->kp[i] + d);
        }
        for (int n = 0; n < DV; n++) {
            const vf s = load(S + AT(d, n)), after = load(w->D + AT(d, n));
            vf before = GATED ? after * all : after;
            if (GATED) W += s * after;
            UNROLL for (int i = 0; i < M; i++) {
                const vf g = broadcast(grad[i][n]);
                X[i] += s * g;
                before += q[i] * g;
                Y[i] += after * u[i][n];
                if (!DELTA) continue;
                const vf e = broadcast(w->e[i][n]);
                Z[i] -= s * e;
                before -= k[i] * e;
            }
            store(w->D + AT(d, n), before);
        }
        UNROLL for (int i = 0; i < M; i++) {
            store(w->X[i] + d, X[i]);
            store(w->Y[i] + d, Y[i]);
            if (DELTA) store(w->Z[i] + d, Z[i]);
        }
        store(w->W + d, W);
    }
}

// products[i][j] = x_i · y_j for j <= i.
APART void multiply(float *products, const float (*x)[DVP], const float (*y)[DVP]) {
    vf sum[M * M] = {0};
    for (int n = 0; n < DVP; n += LANES)
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int j = 0; j <= i; j++) sum[i * M + j] += load(x[i] + n) * load(y[j] + n);
    UNROLL for (int n = 0; n < M * M; n += LANES) store(products + n, sums(sum + n));
}

// dq, dk and dg of a chunk from X, Y, Z and W; qu[i][j] = do_i · u_j and eu[i][j] = e_i · u_j. What passes a gate is added
// up, never found as a difference, so that dg is exact where it is small.
APART void share(struct backward_scratch *w, int t, const float *qu, const float *eu, float scale) {
    for (int d = 0; d < DKP; d += LANES) {
        vf q[M], k[M], a[M], y[M], dq[M], dk[M], dg[M];
        vf P = splat(1.0f), R = splat(1.0f), passed = load(w->chunk.all + d) * load(w->W + d);
        UNROLL for (int i = 0; i < M; i++) {
            q[i] = load(w->q[t + i] + d);
            k[i] = load(w->k[t + i] + d);
            a[i] = GATED ? load(w->a[t + i] + d) : splat(1.0f);
            P *= a[i];
            dq[i] = P * load(w->X[i] + d);
            dk[i] = DELTA ? P * load(w->Z[i] + d) : splat(0.0f);
            dg[i] = dq[i] * q[i] + dk[i] * k[i];
        }
        UNROLL for (int j = M - 1; j >= 0; j--) {
            if (j + 1 < M) dg[j] += dg[j + 1];
            y[j] = R * load(w->Y[j] + d);
            R *= a[j];
        }
        UNROLL for (int j = 0; j < M; j++) {
            vf between = splat(1.0f), pair[M], sum = splat(0.0f);
            dg[j] += passed;
            passed += y[j] * k[j];
            dk[j] += y[j];
            UNROLL for (int i = j; i < M; i++) {
                if (i > j) between *= a[i];
                const vf through = between * k[j];
                vf read = q[i] * qu[i * M + j];
                dq[i] += through * qu[i * M + j];
                if (DELTA && i > j) {
                    read -= k[i] * eu[i * M + j];
                    dk[i] -= through * eu[i * M + j];
                }
                dk[j] += between * read;
                pair[i] = through * read;
            }
            UNROLL for (int i = M - 1; i > j; i--) {
                sum += pair[i];
                dg[i] += sum;
            }
        }
        UNROLL for (int i = 0; i < M; i++) {
            store(w->dq[i] + d, dq[i] * scale);
            store(w->dk[i] + d, dk[i]);
            if (GATED) store(w->dg[i] + d, dg[i]);
        }
    }
}

// u of a chunk, and in the place of v its error, v - S^T k.
APART void correct(const float *S, const struct chunk *c, float (*v)[DVP], float (*u)[DVP], const float *beta) {
    float held[M][DVP];
    look_up(held, S, c->kp);
    for (int i = 0; i < M; i++)
        for (int n = 0; n < DVP; n += LANES) {
            vf error = load(v[i] + n) - load(held[i] + n);
            for (int j = 0; j < i; j++) error -= load(u[j] + n) * c->kk[i * M + j];
            store(v[i] + n, error);
            store(u[i] + n, error * beta[i]);
        }
}

// The state ``to`` after the M tokens from t on, from that before them.
APART void chunk_forward(struct backward_scratch *w, float *to, const float *S, int t) {
    prepare(&w->chunk, NULL, w->k + t, w->a + t);
    if (DELTA) correct(S, &w->chunk, w->v + t, w->u + t, w->beta + t);
    write_values(w, to, S, DELTA ? w->u + t : w->v + t);
}

// The gradients of the M tokens from t on, S being the state before them.
APART void chunk_backward(struct backward_scratch *w, const float *S, int t, float scale) {
    const struct chunk *c = &w->chunk;
    float (*const grad)[DVP] = w->grad + t, (*const u)[DVP] = DELTA ? w->u + t : w->v + t;
    float qu[M * M], eu[M * M];
    prepare(&w->chunk, w->q + t, w->k + t, w->a + t);
    look_up(w->e, w->D, c->kr);
    vf slope[LANES] = {0};
    for (int j = M - 1; j >= 0; j--)
        for (int n = 0; n < DVP; n += LANES) {
            vf du = load(w->e[j] + n);
            for (int i = j; i < M; i++) du += load(grad[i] + n) * c->qk[i * M + j];
            for (int i = j + 1; DELTA && i < M; i++) du -= load(w->e[i] + n) * c->kk[i * M + j];
            if (DELTA) slope[j] += du * load(w->v[t + j] + n);  // v: the error by now
            store(w->e[j] + n, DELTA ? du * w->beta[t + j] : du);
        }
    if (DELTA) store(w->dbeta, sums(slope));
    multiply(qu, grad, u);
    if (DELTA) multiply(eu, w->e, u);
    carry_back(w, S, u, grad);
    share(w, t, qu, eu, scale);
}

INLINE float *room_of(const struct operand *x, const struct sequence *s, int64_t token) {
    return (float *)row_of(x, s, token);
}

// The gradients of a token's logits in the place of those of their log decays.
APART void through_sigmoid(const struct problem *p, const char *row, float *dg) {
    float slope[DKP];
    if (p->g.width == 1) {
        const vf x = splat(element(row, p->g.type, 0));
        dg[0] *= slope_of_logit(x, p->inverse)[0];
        return;
    }
    read_row(&p->g, row, slope, DK, SLOPE, p->inverse);
    for (int d = 0; d < DK; d++) dg[d] *= slope[d];
}

static void write_gradients(
    const struct problem *p, const struct sequence *s, struct backward_scratch *w, int64_t t, int count
) {
    const int straight = streamed(p, DK);
    for (int i = 0; i < count; i++) {
        const int64_t token = token_of(p, s, t + i);
        put_row(room_of(&p->dq, s, token), w->dq[i], DK, straight);
        put_row(room_of(&p->dk, s, token), w->dk[i], DK, straight);
        put_row(room_of(&p->dv, s, token), w->e[i], DV, straight);
        if (DELTA) *room_of(&p->dbeta, s, token) = w->dbeta[i];
        if (!GATED) continue;
        float *dg = w->dg[i], sum = 0;
        for (int d = 0; d < DK && p->g.width == 1; d++) sum += dg[d];
        if (p->g.width == 1) dg[0] = sum;
        if (p->inverse) through_sigmoid(p, row_of(&p->g, s, token), dg);
        if (p->g.width == 1)
            *room_of(&p->dg, s, token) = dg[0];
        else
            put_row(room_of(&p->dg, s, token), dg, DK, straight);
    }
}

// Tokens of a span, with their outputs' gradients if ``all`` is wanted; how many there are.
static int read_span(const struct problem *p, const struct sequence *s, struct backward_scratch *w, int64_t t, int all) {
    const int count = s->length - t < SPAN ? (int)(s->length - t) : SPAN;
    read_tokens(p, s, t, count, all ? w->q : NULL, w->k, w->a, w->v, w->beta);
    for (int i = 0; all && i < count; i++)
        read_row(&p->grad_o, row_of(&p->grad_o, s, token_of(p, s, t + i)), w->grad[i], DV, PLAIN, 1);
    for (int i = count; all && i % M; i++) memset(w->grad[i], 0, sizeof w->grad[i]);
    return count;
}

// A state as it is here, from and to the caller's rows.
static void take_state(float *S, const float *from) {
    memset(S, 0, sizeof(float) * STATE);
    for (int r = 0; from && r < DK; r++)
        for (int n = 0; n < DV; n++) S[AT(r / LANES * LANES, n) + r % LANES] = from[r * DV + n];
}

static void give_state(float *to, const float *S) {
    for (int r = 0; r < DK; r++)
        for (int n = 0; n < DV; n++) to[r * DV + n] = S[AT(r / LANES * LANES, n) + r % LANES];
}

static void *scratch(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) abort();  // as malloc, only where the machine is out of memory
    expect(memory, (int64_t)bytes);
    populate(memory, (int64_t)bytes);
    return memory;
}

static void backward_job(const void *context, int64_t job) {
    const struct problem *p = context;
    const struct sequence s = sequence_of(p, job);
    const int64_t size = (int64_t)DK * DV, spans = (s.length + SPAN - 1) / SPAN;
    struct backward_scratch *w = scratch(sizeof *w);
    float *kept = scratch(sizeof(float) * STATE * (size_t)(spans + 1)), *S = kept;
    populate_rows(&p->dq, &s);
    populate_rows(&p->dk, &s);
    populate_rows(&p->dv, &s);
    populate_rows(&p->dg, &s);
    for (int i = 0; i < AHEAD; i++) w->ahead.row[i] = (const char *)w;
    take_state(S, p->state ? p->state + job * size : NULL);
    take_state(w->D, p->grad_final ? p->grad_final + job * size : NULL);
    for (int64_t n = 0; n + 1 < spans; n++, S += STATE) {
        read_span(p, &s, w, n * SPAN, 0);
        for (int m = 0; m < CHUNKS; m++) {
            expect_tokens(w, p, &s, (n + 1) * SPAN + m * M, n + 2 == spans);
            chunk_forward(w, m + 1 < CHUNKS ? w->S : S + STATE, m ? w->S : S, m * M);
        }
    }
    for (int64_t n = spans - 1; n >= 0; n--, S -= STATE) {
        const int count = read_span(p, &s, w, n * SPAN, 1), chunks = (count + M - 1) / M;
        for (int m = 0; m < chunks; m++) {
            expect_tokens(w, p, &s, (n - 1) * SPAN + m * M, 1);
            chunk_forward(w, w->after[m], m ? w->after[m - 1] : S, m * M);
        }
        for (int m = chunks - 1; m >= 0; m--) {
            const int64_t t = n * SPAN + m * M;
            chunk_backward(w, m ? w->after[m - 1] : S, m * M, p->scale);
            write_gradients(p, &s, w, t, s.length - t < M ? (int)(s.length - t) : M);
        }
    }
    end_streams();
    give_state(p->dstate + job * size, w->D);
    free(kept);
    free(w);
}

void backward(const struct problem *p) {
    expect(p->dq.data, rows(p) * 4 * DK);
    expect(p->dk.data, rows(p) * 4 * DK);
    expect(p->dv.data, rows(p) * 4 * DV);
    if (GATED) expect(p->dg.data, rows(p) * 4 * p->g.width);
    parallel(backward_job, p, p->count * p->heads, p->threads);
}
