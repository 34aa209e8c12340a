// Chunks with mild gates, or none: tokens meet as (q_i P_i) · (k_j / P_j), all of them in one product.
#if defined(TILES)
#define MILD 1e-15f  // of the product of a chunk's gates: what is divided by it stays far from overflow

// Tokens [t, t + C): queries, and rows of keys. 0 if the gates are too strong to divide by.
APART int read_mild(struct tiles *w, const struct job *j, int64_t t) {
    for (int d = 0; d < DKP; d += LANES) store(w->all + d, splat(1.0f));
    for (int i = 0; i < C; i++) {
        const char *q = row_at(j, j->q, t + i), *k = row_at(j, j->k, t + i);
        fetch_ahead(j, t + i);
        if (GATED) read_gates(w->a[0], j, t + i);
        for (int d = 0; d < DKP; d += 2 * LANES) {
            vf query[2], key[2];
            UNROLL for (int n = 0; n < 2; n++) {
                query[n] = half_row(q, d + n * LANES);
                key[n] = half_row(k, d + n * LANES);
                if (!GATED) continue;
                const vf product = load(w->all + d + n * LANES) * load(w->a[0] + d + n * LANES);
                store(w->all + d + n * LANES, product);
                query[n] *= product;
                key[n] *= (vf)_mm512_rcp14_ps((__m512)product);
            }
            _mm512_store_si512(w->query[i] + d, pair(query[0], query[1]));
            _mm512_store_si512(w->row[i] + d, pair(key[0], key[1]));
        }
    }
    __mmask16 mild = 0xffff;
    for (int d = 0; GATED && d < DKP; d += LANES)
        mild &= _mm512_cmp_ps_mask(_mm512_loadu_ps(w->all + d), _mm512_set1_ps(MILD), _CMP_GE_OQ);  // NaN is not
    return mild == 0xffff;
}

// Rows of keys as the right operand of scores, with channels as rows.
APART void turn_for_scores(struct tiles *w) {
    for (int t = 0; t < C; t += SIDE) for (int d = 0; d < DKP; d += 2 * LANES) {
        __m512i x[SIDE];
        UNROLL for (int i = 0; i < SIDE; i++) x[i] = _mm512_load_si512(w->row[t + i] + d);
        transpose(x);
        UNROLL for (int i = 0; i < SIDE; i++) _mm512_store_si512(w->seen[d / 2 + i][t], x[i]);
    }
}

// Rows of keys as the left operand of what is written to the state.
APART void turn_for_state(struct tiles *w) {
    for (int d = 0; d < DKP; d += 2 * LANES) for (int n = 0; n < 2; n++) {
        __m512i x[C / 2];
        UNROLL for (int i = 0; i < C / 2; i++)
            x[i] = interleaved(_mm512_load_si512(w->row[2 * i] + d), _mm512_load_si512(w->row[2 * i + 1] + d), n);
        transpose(x);
        UNROLL for (int i = 0; i < LANES; i++) _mm512_store_si512(w->key[d + n * LANES + i], x[i]);
    }
}

APART void meet_mild(struct tiles *w, const int reads) {
    if (reads) {
        turn_for_scores(w);
        clear_square();
        for (int d = 0; d < DKP; d += C) multiply(w->query[0] + d, 2 * DKP, w->seen[d / 2][0], 4 * C);
        store_square(w->square[0][0], C);
    }
    turn_for_state(w);  // while the product is on its way
    for (int i = 0; reads && i < C; i++) {
        const float *row = w->square[0][i];
        const __mmask32 seen = (__mmask32)((2ull << i) - 1);  // no token that is later
        _mm512_store_si512(w->score[i], _mm512_maskz_mov_epi16(seen, pair(load(row), load(row + LANES))));
    }
}
#endif
