// Gradients. States are transposed here, DV rows of DKW with key channels in the lanes, because most sums run over value
// channels. A job goes forward once to keep the state before every span of SPAN tokens, then backward span by span:
// the states before its micro-chunks are computed again, and the gradient of the state, D, is carried from the end.
//
// With S the state before a micro-chunk and D the gradient of the state after it (both through the gates of the chunk
// only by products, so that strong decay costs no digits), e the gradient of the corrected value and u = beta * error:
//     X_i = S do_i,  Z_i = -S e_i,  Y_j = D u_j,  W = the products of S and D summed over value channels,
//     dq_i = P_i X_i + pairs,  dk_j = R_j Y_j + P_j Z_j + pairs,  du_j = D^T (k_j R_j) + pairs,
//     dg_t = all W + sum_{j<t} k_j R_j Y_j + sum_{i>=t} P_i (q_i X_i + k_i Z_i) + pairs that the gate t lies between.
#define SPAN 64
#define DKW (DKP + LANES)
#define DVL PADDED(DV)

struct backward_scratch {
    float S[DKP * PITCH], before[SPAN / M][DVL * DKW], D[DVL * DKW];
    float q[SPAN][DKP], k[SPAN][DKP], a[SPAN][DKP], v[SPAN][DVP], u[SPAN][DVP], grad[SPAN][DVP], beta[SPAN];
    float dq[SPAN][DKP], dk[SPAN][DKP], dg[SPAN][DKP], dv[SPAN][DVP], dbeta[SPAN];
    float e[M][DVP], X[M][DKP], Y[M][DKP], Z[M][DKP], W[DKP], chunk_scale;
    struct chunk chunk;
};

APART void transpose(float *to, const float *S) {
    for (int r = 0; r < DKP; r++)
        for (int c = 0; c < DV; c++) to[c * DKW + r] = S[r * PITCH + c];
}

// du_j = D^T (k_j R_j) for the M tokens of a chunk.
APART void read_gradient(const float *D, const struct chunk *c, float (*du)[DVP]) {
    UNROLL for (int j = 0; j < M; j++)
        for (int n = 0; n < DVL; n += LANES) {
            vf x[LANES];
            UNROLL for (int i = 0; i < LANES; i++) x[i] = load(D + (n + i) * DKW) * load(c->kr[j]);
            for (int d = LANES; d < DKP; d += LANES) {
                const vf k = load(c->kr[j] + d);
                UNROLL for (int i = 0; i < LANES; i++) x[i] += load(D + (n + i) * DKW + d) * k;
            }
            store(du[j] + n, sums(x));
        }
}

// The transposed state ``to`` after a chunk that wrote u, from that before it.
APART void write_values(float *restrict to, const float *restrict S, const struct chunk *c, const float (*u)[DVP]) {
    for (int d = 0; d < DKP; d += LANES) {
        const vf all = load(c->all + d);
        vf k[M];
        UNROLL for (int j = 0; j < M; j++) k[j] = load(c->kr[j] + d);
        for (int n = 0; n < DV; n++) {
            vf s = load(S + n * DKW + d);
            if (GATED) s *= all;
            UNROLL for (int j = 0; j < M; j++) s += k[j] * broadcast(u[j][n]);
            store(to + n * DKW + d, s);
        }
    }
}

// X, Y, Z, W of a chunk, and D of the state before it.
APART void carry_back(struct backward_scratch *w, const float *S, const float (*u)[DVP], const float (*grad)[DVP]) {
    struct chunk *c = &w->chunk;
    for (int d = 0; d < DKP; d += LANES) {
        vf X[M] = {0}, Y[M] = {0}, Z[M] = {0}, W = {0}, q[M], k[M];
        const vf all = load(c->all + d);
        UNROLL for (int i = 0; i < M; i++) {
            q[i] = load(c->qp[i] + d);
            if (DELTA) k[i] = load(c->kp[i] + d);
        }
        for (int n = 0; n < DV; n++) {
            const vf s = load(S + n * DKW + d), after = load(w->D + n * DKW + d);
            vf before = GATED ? after * all : after;
            if (GATED) W += s * after;
            UNROLL for (int i = 0; i < M; i++) {
                const vf g = broadcast(grad[i][n]);
                X[i] += s * g;
                before += q[i] * g;
                Y[i] += after * broadcast(u[i][n]);
                if (!DELTA) continue;
                const vf e = broadcast(w->e[i][n]);
                Z[i] -= s * e;
                before -= k[i] * e;
            }
            store(w->D + n * DKW + d, before);
        }
        UNROLL for (int i = 0; i < M; i++) {
            store(w->X[i] + d, X[i]);
            store(w->Y[i] + d, Y[i]);
            store(w->Z[i] + d, Z[i]);
        }
        store(w->W + d, W);
    }
}

APART float dot(const float *x, const float *y) {
    vf sum = {0};
    for (int d = 0; d < DVP; d += LANES) sum += load(x + d) * load(y + d);
    float total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}

// dq, dk and dg of a chunk; qu[i][j] = do_i · u_j and eu[i][j] = -e_i · u_j.
APART void share(struct backward_scratch *w, int t, const float qu[M][M], const float eu[M][M]) {
    const struct chunk *c = &w->chunk;
    for (int d = 0; d < DKP; d += LANES) {
        vf q[M], k[M], a[M], dq[M], dk[M], dg[M];
        UNROLL for (int i = 0; i < M; i++) {
            q[i] = load(w->q[t + i] + d);
            k[i] = load(w->k[t + i] + d);
            if (GATED) a[i] = load(w->a[t + i] + d);
            dg[i] = load(c->all + d) * load(w->W + d);
        }
        vf P = splat(1.0f), R = splat(1.0f);
        UNROLL for (int i = 0; i < M; i++) {
            if (GATED) P *= a[i];
            dq[i] = P * load(w->X[i] + d);
            dk[i] = DELTA ? P * load(w->Z[i] + d) : splat(0.0f);
            vf share = dq[i] * q[i];
            if (DELTA) share += dk[i] * k[i];
            UNROLL for (int g = 0; GATED && g <= i; g++) dg[g] += share;
        }
        UNROLL for (int j = M - 1; j >= 0; j--) {
            const vf y = R * load(w->Y[j] + d);
            dk[j] += y;
            UNROLL for (int g = j + 1; GATED && g < M; g++) dg[g] += y * k[j];
            if (GATED) R *= a[j];
        }
        UNROLL for (int j = 0; j < M; j++) {
            vf between = splat(1.0f);
            UNROLL for (int i = j; i < M; i++) {
                if (GATED && i > j) between *= a[i];
                const vf through = between * k[j];
                dq[i] += through * qu[i][j];
                vf read = q[i] * qu[i][j];
                if (DELTA && i > j) {
                    dk[i] += through * eu[i][j];
                    read += k[i] * eu[i][j];
                }
                dk[j] += between * read;
                UNROLL for (int g = j + 1; GATED && g <= i; g++) dg[g] += through * read;
            }
        }
        UNROLL for (int i = 0; i < M; i++) {
            store(w->dq[t + i] + d, dq[i] * w->chunk_scale);
            store(w->dk[t + i] + d, dk[i]);
            store(w->dg[t + i] + d, dg[i]);
        }
    }
}

APART void chunk_backward(struct backward_scratch *w, int t) {
    const struct chunk *c = &w->chunk;
    float qu[M][M] = {{0}}, eu[M][M] = {{0}};
    read_gradient(w->D, c, w->dv + t);  // du, for now
    for (int j = M - 1; j >= 0; j--) {
        float *du = w->dv[t + j];
        for (int i = j; i < M; i++)
            for (int n = 0; n < DVP; n += LANES) {
                vf x = load(du + n) + load(w->grad[t + i] + n) * c->qk[i * M + j];
                if (DELTA && i > j) x -= load(w->e[i] + n) * c->kk[i * M + j];
                store(du + n, x);
            }
        if (!DELTA) continue;
        w->dbeta[t + j] = dot(du, w->v[t + j]);  // v: the error by now
        for (int n = 0; n < DVP; n += LANES) store(w->e[j] + n, load(du + n) * w->beta[t + j]);
        memcpy(du, w->e[j], sizeof w->e[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j <= i; j++) {
            qu[i][j] = dot(w->grad[t + i], w->u[t + j]);
            if (DELTA && i > j) eu[i][j] = -dot(w->e[i], w->u[t + j]);
        }
    carry_back(w, w->before[t / M], w->u + t, w->grad + t);
    share(w, t, qu, eu);
}

static void write_gradients(
    const struct problem *p, const struct sequence *s, const struct backward_scratch *w, int64_t t, int count
) {
    for (int i = 0; i < count; i++) {
        const int64_t at = (s->batch * p->heads + s->head) * p->tokens + token_of(p, s, t + i);
        memcpy(p->dq + at * DK, w->dq[i], 4 * DK);
        memcpy(p->dk + at * DK, w->dk[i], 4 * DK);
        memcpy(p->dv + at * DV, w->dv[i], 4 * DV);
        if (DELTA) p->dbeta[at] = w->dbeta[i];
        if (!GATED) continue;
        if (p->g.width != 1) {
            memcpy(p->dg + at * DK, w->dg[i], 4 * DK);
            continue;
        }
        float sum = 0;
        for (int d = 0; d < DK; d++) sum += w->dg[i][d];
        p->dg[at] = sum;
    }
}

// Tokens of a span, its chunks prepared one after the other by ``backward_job``.
APART void read_span(const struct problem *p, const struct sequence *s, struct backward_scratch *w, int64_t t, int count) {
    read_tokens(p, s, t, count, w->q, w->k, w->a, w->v, w->beta);
    for (int i = 0; i < count; i++) {
        const int64_t token = token_of(p, s, t + i);
        read_row(&p->grad_o, row_of(&p->grad_o, s, token), w->grad[i], DV, PLAIN, 1);
    }
    for (int i = count; i % M; i++) memset(w->grad[i], 0, sizeof w->grad[i]);
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
    float *kept = scratch(sizeof(float) * DKP * PITCH * (size_t)(spans + 1));
    const int64_t first = (s.batch * p->heads + s.head) * p->tokens + s.first;
    populate(p->dq + first * DK, s.length * 4 * DK);
    populate(p->dk + first * DK, s.length * 4 * DK);
    populate(p->dv + first * DV, s.length * 4 * DV);
    if (GATED) populate(p->dg + first * p->g.width, s.length * 4 * p->g.width);
    memset(w->D, 0, sizeof w->D);
    w->chunk_scale = p->scale;
    read_state(w->S, p->state ? p->state + job * size : NULL);
    for (int64_t n = 0; n < spans; n++) {
        memcpy(kept + n * DKP * PITCH, w->S, sizeof w->S);
        const int count = s.length - n * SPAN < SPAN ? (int)(s.length - n * SPAN) : SPAN;
        if (n + 1 == spans) break;
        read_tokens(p, &s, n * SPAN, count, NULL, w->k, w->a, w->v, w->beta);
        for (int i = 0; i < count; i += M) {
            prepare(&w->chunk, NULL, w->k + i, w->a + i);
            advance_state(w->S, &w->chunk, w->v + i, w->beta + i);
        }
    }
    for (int r = 0; p->grad_final && r < DK; r++)
        for (int c = 0; c < DV; c++) w->D[c * DKW + r] = p->grad_final[job * size + r * DV + c];
    for (int64_t n = spans - 1; n >= 0; n--) {
        const int count = s.length - n * SPAN < SPAN ? (int)(s.length - n * SPAN) : SPAN;
        const int chunks = (count + M - 1) / M;
        read_span(p, &s, w, n * SPAN, count);
        memcpy(w->S, kept + n * DKP * PITCH, sizeof w->S);
        transpose(w->before[0], w->S);
        for (int m = 0; m < chunks; m++) {
            prepare(&w->chunk, w->q + m * M, w->k + m * M, w->a + m * M);
            if (DELTA) advance_state(w->S, &w->chunk, w->v + m * M, w->beta + m * M);
            for (int i = m * M; i < m * M + M; i++)
                for (int d = 0; d < DVP; d += LANES) store(w->u[i] + d, load(w->v[i] + d) * (DELTA ? w->beta[i] : 1));
            if (m + 1 == chunks) break;
            write_values(w->before[m + 1], w->before[m], &w->chunk, w->u + m * M);
        }
        for (int m = chunks - 1; m >= 0; m--) {
            prepare(&w->chunk, w->q + m * M, w->k + m * M, w->a + m * M);
            chunk_backward(w, m * M);
        }
        write_gradients(p, &s, w, n * SPAN, count);
    }
    for (int r = 0; r < DK; r++)
        for (int c = 0; c < DV; c++) p->dstate[job * size + r * DV + c] = w->D[c * DKW + r];
    free(kept);
    free(w);
}

void backward(const struct problem *p) {
    expect(p->dq, rows(p) * 4 * DK);
    expect(p->dk, rows(p) * 4 * DK);
    expect(p->dv, rows(p) * 4 * DV);
    if (GATED) expect(p->dg, rows(p) * 4 * p->g.width);
    parallel(backward_job, p, p->count * p->heads, p->threads);
}
