// The forward pass on matrix units (AMX), for linear and gated rules with q, k and v in bfloat16: chunks of C tokens, in
// which all but the pairs inside micro-chunks are products of tiles, of bfloat16 and summed in float32. The state stays in
// float32; what products read of it, and of keys and queries through gates, is rounded, as in all kernels for such units.
//
// Which tokens of a chunk see each other through which gates is decided by halves. With P_i the product of the gates of
// token i's block up to i, and R_j that of those after j in its block, tokens of two neighbouring blocks meet as
// (q_i P_i) · (k_j R_j); blocks then double, until the chunk is one. As in micro-chunks nothing is divided by a gate.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define C 32        // tokens of a chunk: the depth of a product of tiles
#define SIDE 16     // rows of a tile, and its columns of float32
#define MICRO (C / M)

typedef uint16_t bf16;

// Key channels stand in another order here: in each 32 those of even number, then those of odd. So a row of bfloat16 is
// two vectors of floats by a shift and a mask. Sums over channels do not mind; the state is put in order at the ends.
#define CHANNEL(place) ((place) / 32 * 32 + (place) % 32 % 16 * 2 + (place) % 32 / 16)

struct micro {  // see struct chunk
    float qp[M][DKP], kr[M][DKP], all[DKP];
};

struct tiles {
    float S[DKP * DVP], decay[DKP], a[M][DKP], o[C][DVP], met[SIDE][SIDE], written[2][C][C];
    struct micro micro[MICRO];
    bf16 query[C][DKP];           // q_i P_i
    bf16 key[DKP][C];             // k_j R_j, transposed
    bf16 value[C / 2][DVP][2];    // right operands have two rows in one, element by element
    bf16 state[DKP / 2][DVP][2];
    bf16 score[C][C];             // what token i reads of token j
};

// A sequence's rows of one operand, in the order of the recurrence.
struct stream {
    const char *first;
    int64_t step;
};

struct job {
    const struct problem *p;
    struct sequence s;
    struct stream q, k, v, g, o;
};

static struct stream stream_of(const struct problem *p, const struct sequence *s, const struct operand *x) {
    const int64_t step = x->token * (x->type == FLOAT32 ? 4 : 2);
    return (struct stream){x->data ? row_of(x, s, token_of(p, s, 0)) : NULL, p->reverse ? -step : step};
}

static const float nothing[DKP + DVP];  // a row of zeros, of any operand and type

// Beyond the end come zeros: they write nothing, and a gate of e^0 changes nothing.
INLINE const char *row_at(const struct job *j, struct stream x, int64_t t) {
    return t < j->s.length ? x.first + t * x.step : (const char *)nothing;
}

INLINE __m512i whole_row(const char *row, int d, int width) {  // 32 channels from d, and zeros beyond the width
    const __mmask32 inside = width - d >= 32 ? ~0u : (1u << (width - d)) - 1;
    return _mm512_maskz_loadu_epi16(inside, (const bf16 *)row + d);
}
INLINE vf half_row(const char *row, int d) {  // vector d of the order of CHANNEL
    const __m512i x = whole_row(row, d / 32 * 32, DK);
    return (vf)(d % 32 ? _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(x, 16));
}

INLINE __m512i pair(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// x[0], y[0], x[1], y[1], ... of the first and of the last 16 of two rows of bfloat16.
INLINE __m512i interleaved(__m512i x, __m512i y, const int last) {
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0
    );
    return _mm512_permutex2var_epi16(x, last ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, y);
}
INLINE __m512i two_rows(vf x, vf y) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0
    );
    return _mm512_permutexvar_epi16(order, pair(x, y));
}

INLINE void transpose(__m512i x[16]) {
    __m512i y[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < 16; n += 8) {
        y[n + i] = _mm512_shuffle_i32x4(x[n + i], x[n + i + 4], 0x88);
        y[n + i + 4] = _mm512_shuffle_i32x4(x[n + i], x[n + i + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// exponential(), by the instruction that scales by powers of two.
INLINE vf quick_exponential(vf x) {
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x);  // the second operand if one is NaN
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-110.0f), bounded);
    const __m512 n = _mm512_roundscale_ps((__m512)(((vf)y) * 1.44269504088896341f), 0);
    const vf t = (vf)y - (vf)n * 0.693359375f + (vf)n * 2.12194440e-4f;
    vf p = t * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * t + 8.3334519073e-3f;
    p = p * t + 4.1665795894e-2f;
    p = p * t + 1.6666665459e-1f;
    p = p * t + 5.0000001201e-1f;
    return (vf)_mm512_scalef_ps((__m512)(p * t * t + t + 1.0f), n);
}

// Gates of tokens [t, t + M).
APART void read_gates(struct tiles *w, const struct job *j, int64_t t) {
    const struct operand *x = &j->p->g;
    const int plain = x->channel == 1 && x->type == BFLOAT16;
    for (int i = 0; i < M; i++) {
        const char *row = row_at(j, j->g, t + i);
        if (x->width == 1) {
            const vf gate = splat(quick_exponential(splat(element(row, x->type, 0)))[0]);
            for (int d = 0; d < DKP; d += LANES) store(w->a[i] + d, gate);
        } else if (plain || row == (const char *)nothing) {
            for (int d = 0; d < DKP; d += LANES) store(w->a[i] + d, quick_exponential(half_row(row, d)));
        } else {
            float g[DKP] = {0};
            for (int d = 0; d < DKP; d++)
                if (CHANNEL(d) < DK) g[d] = element(row, x->type, CHANNEL(d) * x->channel);
            for (int d = 0; d < DKP; d += LANES) store(w->a[i] + d, quick_exponential(load(g + d)));
        }
    }
}

INLINE void put_scores(struct tiles *w, int i, int j, const float *from, int count) {
    const __m256i x = (__m256i)_mm512_cvtneps_pbh((__m512)load(from));
    _mm256_mask_storeu_epi16(&w->score[i][j], (__mmask16)((1u << count) - 1), x);
}

INLINE void fetch(struct stream x, int64_t t, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(x.first + t * x.step + b);
}

// Tokens [t, t + M) of the sequence, see prepare(): their scores among themselves, and what they are to others.
APART void read_micro(struct tiles *w, const struct job *j, int64_t t, const int c) {
    struct micro *m = w->micro + c;
    const char *q[M], *k[M];
    UNROLL for (int i = 0; i < M; i++) {
        k[i] = row_at(j, j->k, t + i);
        q[i] = row_at(j, j->q, t + i);
        fetch(j->q, t + i + C, 2 * DK);
        fetch(j->k, t + i + C, 2 * DK);
        fetch(j->v, t + i + C, 2 * DV);
        if (GATED) fetch(j->g, t + i + C, 2 * DK);
    }
    if (GATED) read_gates(w, j, t);
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

APART void read_values(struct tiles *w, const struct job *j, int64_t t) {
    for (int i = 0; i < C; i += 2) {
        const char *x = row_at(j, j->v, t + i), *y = row_at(j, j->v, t + i + 1);
        for (int d = 0; d < DVP; d += 32) {
            const __m512i even = whole_row(x, d, DV), odd = whole_row(y, d, DV);
            _mm512_store_si512(w->value[i / 2][d], interleaved(even, odd, 0));
            _mm512_store_si512(w->value[i / 2][d + 16], interleaved(even, odd, 1));
        }
    }
}

// Accumulators 0 to 3, a square of C, += C rows of A by C columns of B; pitches in bytes.
INLINE void multiply(const bf16 *A, size_t A_pitch, const bf16 *B, size_t B_pitch) {
    _tile_loadd(4, A, A_pitch);
    _tile_loadd(6, B, B_pitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + 2 * SIDE, B_pitch);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, A + SIDE * (A_pitch / sizeof(bf16)), A_pitch);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void clear_square(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void store_square(float *to, size_t pitch) {
    _tile_stored(0, to, 4 * pitch);
    _tile_stored(1, to + SIDE, 4 * pitch);
    _tile_stored(2, to + SIDE * pitch, 4 * pitch);
    _tile_stored(3, to + SIDE * pitch + SIDE, 4 * pitch);
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
    bf16(*later)[DKP] = w->query, (*earlier)[SIDE][2] = (bf16(*)[SIDE][2])w->key;  // these come last, and have room
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

// The operands that all tokens of the chunk make together.
APART void whole_chunk(struct tiles *w) {
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
}

APART void outputs(struct tiles *w) {
    for (int c = 0; c < DVP; c += C) {
        clear_square();
        for (int d = 0; d < DKP; d += C) multiply(w->query[0] + d, 2 * DKP, w->state[d / 2][c], 4 * DVP);
        multiply(w->score[0], 2 * C, w->value[0][c], 4 * DVP);
        store_square(w->o[0] + c, DVP);
    }
}

APART void write_rows(const struct tiles *w, const struct job *j, int64_t t) {
    for (int64_t i = 0; i < C && t + i < j->s.length; i++) {
        bf16 *row = (bf16 *)(j->o.first + (t + i) * j->o.step);
        for (int d = 0; d < DVP; d += 32) {
            const __mmask32 inside = DV - d >= 32 ? ~0u : (1u << (DV - d)) - 1;
            const vf low = load(w->o[i] + d) * j->p->scale, high = load(w->o[i] + d + LANES) * j->p->scale;
            _mm512_mask_storeu_epi16(row + d, inside, pair(low, high));
        }
    }
}

// A pair of rows of the state, and what outputs() reads of it.
INLINE void keep_state(struct tiles *w, int r, int c, vf x, vf y) {
    store(w->S + r * DVP + c, x);
    store(w->S + (r + 1) * DVP + c, y);
    _mm512_store_si512(w->state[r / 2][c], two_rows(x, y));
}

INLINE void write_square(struct tiles *w, int square) {
    clear_square();
    multiply(w->key[square / (DVP / C) * C], 2 * C, w->value[0][square % (DVP / C) * C], 4 * DVP);
    store_square(w->written[square % 2][0], C);
}

// The next square is multiplied while one is added.
APART void write_chunk(struct tiles *w) {
    const int squares = (DKP / C) * (DVP / C);
    const float *all = w->micro[0].all;
    write_square(w, 0);
    for (int square = 0; square < squares; square++) {
        const int d = square / (DVP / C) * C, c = square % (DVP / C) * C;
        if (square + 1 < squares) write_square(w, square + 1);
        for (int r = 0; r < C; r += 2) UNROLL for (int n = 0; n < C; n += LANES) {
            const float *S = w->S + (d + r) * DVP + c + n, *u = w->written[square % 2][r] + n;
            vf x = load(S), y = load(S + DVP);
            if (GATED) x *= all[d + r];
            if (GATED) y *= all[d + r + 1];
            keep_state(w, d + r, c + n, x + load(u), y + load(u + C));
        }
    }
}

static void read_places(struct tiles *w, const float *state) {
    memset(w->S, 0, sizeof w->S);
    for (int r = 0; state && r < DKP; r++)
        if (CHANNEL(r) < DK) memcpy(w->S + r * DVP, state + CHANNEL(r) * DV, 4 * DV);
    for (int r = 0; r < DKP; r += 2) for (int c = 0; c < DVP; c += LANES)
        keep_state(w, r, c, load(w->S + r * DVP + c), load(w->S + (r + 1) * DVP + c));
}

struct tile_config {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static void forward_job(const void *context, int64_t job) {
    const struct problem *p = context;
    const struct sequence s = sequence_of(p, job);
    const struct job j = {
        p, s, stream_of(p, &s, &p->q), stream_of(p, &s, &p->k), stream_of(p, &s, &p->v), stream_of(p, &s, &p->g),
        stream_of(p, &s, &p->o),
    };
    static __thread struct tiles room __attribute__((aligned(64)));  // kept: fresh pages are dear
    struct tiles *w = &room;
    __asm__("" : "+r"(w));  // an address that is worked out once: left alone, GCC asks for it in every function
    struct tile_config config = {.palette = 1}, before;  // others of this thread may have set theirs
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = SIDE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&config);
    read_places(w, p->state ? p->state + job * DK * DV : NULL);
    for (int d = 0; d < DKP; d++) w->decay[d] = 1;
    if (j.o.first) populate((char *)row_of(&p->o, &s, s.first), 2 * s.length * DV);
    for (int64_t t = 0; t < s.length; t += C) {
        for (int c = 0; c < MICRO; c++) read_micro(w, &j, t + c * M, c);
        read_values(w, &j, t);
        UNROLL for (int half = M; half < C; half *= 2) meet(w, half);
        whole_chunk(w);
        if (j.o.first) outputs(w);
        write_chunk(w);
        if (j.o.first) write_rows(w, &j, t);
        for (int d = 0; p->decay && d < DKP; d++) w->decay[d] *= w->micro[0].all[d];
    }
    for (int r = 0; r < DKP; r++) {
        if (CHANNEL(r) >= DK) continue;
        if (p->final) memcpy(p->final + (job * DK + CHANNEL(r)) * DV, w->S + r * DVP, 4 * DV);
        if (p->decay) p->decay[job * DK + CHANNEL(r)] = w->decay[r];
    }
    _tile_loadconfig(&before);
}

// Linux lends the matrix units to a process that asks.
int ready(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

void forward(const struct problem *p) {
    if (p->o.data) expect(p->o.data, 2 * rows(p) * DV);
    parallel(forward_job, p, p->count * p->heads, p->threads);
}
#else
int ready(void) { return 0; }
void forward(const struct problem *p) { (void)p; }
#endif
