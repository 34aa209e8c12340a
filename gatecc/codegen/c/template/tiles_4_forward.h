// The chunks of a sequence.
#if defined(TILES)
#define PATIENCE 8  // chunks after one with strong gates before mild ones are hoped for again

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

// A pair of rows of the state, and what outputs read of it.
INLINE void keep_state(struct tiles *w, int r, int c, vf x, vf y) {
    store(w->S + r * DVP + c, x);
    store(w->S + (r + 1) * DVP + c, y);
    _mm512_store_si512(w->state[r / 2][c], two_rows(x, y));
}

// What a chunk multiplies, a square of C at a time: outputs, by channels of values; then what is written to the state.
enum { OUTPUTS = DVP / C, WRITTEN = (DKP / C) * (DVP / C) };
INLINE int key_of(int n) { return (n - OUTPUTS) / OUTPUTS * C; }
INLINE int value_of(int n) { return (n - OUTPUTS) % OUTPUTS * C; }

INLINE void multiply_square(struct tiles *w, int n) {
    clear_square();
    if (n < OUTPUTS) {
        for (int d = 0; d < DKP; d += C) multiply(w->query[0] + d, 2 * DKP, w->state[d / 2][n * C], 4 * DVP);
        multiply(w->score[0], 2 * C, w->value[0][n * C], 4 * DVP);
    } else {
        multiply(w->key[key_of(n)], 2 * C, w->value[0][value_of(n)], 4 * DVP);
    }
    store_square(w->square[n % 2][0], C);
}

INLINE void write_outputs(const struct tiles *w, const struct job *j, int64_t t, int n) {
    const __mmask32 inside = DV - n * C >= C ? ~0u : (1u << (DV - n * C)) - 1;
    for (int64_t i = 0; i < C && t + i < j->s.length; i++) {
        const float *o = w->square[n % 2][i];
        bf16 *row = (bf16 *)(j->o.first + (t + i) * j->o.step) + n * C;
        _mm512_mask_storeu_epi16(row, inside, pair(load(o) * j->p->scale, load(o + LANES) * j->p->scale));
    }
}

// Before the gates where keys were divided by them (``mild``).
INLINE void add_written(struct tiles *w, int n, const int mild) {
    for (int i = 0; i < C; i += 2) UNROLL for (int l = 0; l < C; l += LANES) {
        const int r = key_of(n) + i, c = value_of(n) + l;
        const float *S = w->S + r * DVP + c, *u = w->square[n % 2][i] + l;
        const vf x = load(S), y = load(S + DVP), a = broadcast(w->all[r]), b = broadcast(w->all[r + 1]);
        if (mild)
            keep_state(w, r, c, (x + load(u)) * a, (y + load(u + C)) * b);
        else
            keep_state(w, r, c, x * a + load(u), y * b + load(u + C));
    }
}

// The next square is multiplied while one is put where it belongs.
APART void chunk(struct tiles *w, const struct job *j, int64_t t, const int mild) {
    const int reads = j->o.first != NULL;
    int n = reads ? 0 : OUTPUTS;
    if (mild)
        meet_mild(w, reads);
    else
        meet_halves(w, j, t);
    multiply_square(w, n);
    for (; n < OUTPUTS + WRITTEN; n++) {
        if (n + 1 < OUTPUTS + WRITTEN) multiply_square(w, n + 1);
        if (n < OUTPUTS)
            write_outputs(w, j, t, n);
        else if (mild)
            add_written(w, n, 1);
        else
            add_written(w, n, 0);
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
    int patience = 0;
    for (int64_t t = 0; t < s.length; t += C) {
        const int mild = !patience && read_mild(w, &j, t);
        patience = mild ? 0 : patience ? patience - 1 : PATIENCE;
        read_values(w, &j, t);
        chunk(w, &j, t, mild);
        for (int d = 0; p->decay && d < DKP; d++) w->decay[d] *= w->all[d];
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
