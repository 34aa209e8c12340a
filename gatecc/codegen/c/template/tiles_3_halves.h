// Chunks with any gates, 0 included. Which tokens see each other through which gates is decided by halves. With P_i the
// product of the gates of token i's block up to i, and R_j that of those after j in its block, tokens of two
// neighbouring blocks meet as (q_i P_i) · (k_j R_j); blocks then double, until the chunk is one. Nothing is divided by
// a gate.
#if defined(TILES)
INLINE void put_scores(struct tiles *w, int i, int j, const float *from, int count) {
    const __m256i x = (__m256i)_mm512_cvtneps_pbh((__m512)load(from));
    _mm256_mask_storeu_epi16(&w->score[i][j], (__mmask16)((1u << count) - 1), x);
}

// Tokens [t, t + M), as in prepare(): their scores among themselves, and what they are to others.
APART void read_micro(struct tiles *w, const struct job *j, int64_t t, const int c) {
    struct micro *m = w->micro + c;
    const char *q[M], *k[M];
    UNROLL for (int i = 0; i < M; i++) {
        k[i] = row_at(j, j->k, t + i);
        q[i] = row_at(j, j->q, t + i);
        if (GATED) read_gates(w->a[i], j, t + i);
    }
    vf qk[M * M] = {0};
    for (int d = 0; d < DKP; d += LANES) {
        vf key[M], a[M];
        UNROLL for (int i = 0; i < M; i++) {
            key[i] = half_row(k[i], d);
            if (GATED) a[i] = load(w->a[i] + d);
        }
        UNROLL for (int i = 0; i < M; i++) {
            vf x = half_row(q[i], d);
            UNROLL for (int n = i; n >= 0; n--) {
                qk[i * M + n] += x * key[n];
                if (GATED) x *= a[n];
            }
            store(m->qp[i] + d, x);
        }
        vf rest = splat(1.0f);
        UNROLL for (int n = M - 1; n >= 0; n--) {
            store(m->kr[n] + d, key[n] * rest);
            if (GATED) rest *= a[n];
        }
        store(m->all + d, rest);
    }
    bf16 sum[M][M] __attribute__((aligned(32)));
    _mm256_store_si256((__m256i *)sum, (__m256i)_mm512_cvtneps_pbh((__m512)sums(qk)));
    UNROLL for (int i = 0; i < M; i++) memcpy(&w->score[c * M + i][c * M], sum[i], sizeof sum[i]);
}

// Two vectors of a row, through the gates of the other block if there are any: scaled in place, and as it was before.
INLINE __m512i scaled(float *row, const float *by) {
    const vf low = load(row), high = load(row + LANES);
    if (GATED) store(row, low * load(by));
    if (GATED) store(row + LANES, high * load(by + LANES));
    return pair(low, high);
}

// Blocks of ``half`` tokens meet their neighbours, and become blocks of twice as many.
INLINE void meet(struct tiles *w, const int half) {
    const int h = half / M;  // micro-chunks of a block
    bf16(*later)[DKP] = w->row, (*earlier)[SIDE][2] = (bf16(*)[SIDE][2])w->seen;
    for (int d = 0; d < DKP; d += 32) {
        __m512i x[SIDE];
        UNROLL for (int n = 0; n < SIDE; n++) {
            const int c = n / half * 2 * h + n % half / M;
            x[n] = scaled(w->micro[c].kr[n % M] + d, w->micro[n / half * 2 * h + h].all + d);
        }
        transpose(x);
        UNROLL for (int n = 0; n < SIDE; n++) _mm512_store_si512(earlier[d / 2 + n], x[n]);
        UNROLL for (int n = 0; n < SIDE; n++) {
            const int c = n / half * 2 * h + h + n % half / M;
            _mm512_store_si512(later[n] + d, scaled(w->micro[c].qp[n % M] + d, w->micro[n / half * 2 * h].all + d));
        }
        for (int c = 0; GATED && c < MICRO; c += 2 * h) UNROLL for (int n = d; n < d + 32; n += LANES)
            store(w->micro[c].all + n, load(w->micro[c].all + n) * load(w->micro[c + h].all + n));
    }
    _tile_zero(0);
    for (int d = 0; d < DKP; d += 32) {
        _tile_loadd(4, later[0] + d, 2 * DKP);
        _tile_loadd(6, earlier[d / 2], 4 * SIDE);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, w->met, 4 * SIDE);
    UNROLL for (int n = 0; n < SIDE; n++) {
        const int block = n / half * half;
        put_scores(w, n + block + half, 2 * block, w->met[n] + block, half);
    }
}

// What the chunk is to the others.
APART void finish_halves(struct tiles *w) {
    for (int t = 0; t < C; t++) for (int d = 0; d < DKP; d += 32) {
        const float *row = w->micro[t / M].qp[t % M] + d;
        _mm512_store_si512(w->query[t] + d, pair(load(row), load(row + LANES)));
    }
    for (int d = 0; d < DKP; d += LANES) {
        __m512i x[C / 2];
        UNROLL for (int t = 0; t < C; t += 2)
            x[t / 2] = two_rows(load(w->micro[t / M].kr[t % M] + d), load(w->micro[t / M].kr[t % M + 1] + d));
        transpose(x);
        UNROLL for (int i = 0; i < LANES; i++) _mm512_store_si512(w->key[d + i], x[i]);
    }
    memcpy(w->all, w->micro[0].all, sizeof w->all);
}

APART void meet_halves(struct tiles *w, const struct job *j, int64_t t) {
    for (int c = 0; c < MICRO; c++) read_micro(w, j, t + c * M, c);
    UNROLL for (int half = M; half < C; half *= 2) meet(w, half);
    finish_halves(w);
}
#endif
