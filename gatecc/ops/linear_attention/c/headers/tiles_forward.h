// The chunks of a sequence: on the matrix units where gates are mild, else as everywhere, where no gate is too strong.
#pragma once
#include "../../../../codegen/c/headers/pages.h"
#include "../../../../codegen/c/headers/threads.h"
#include "sweep.h"
#include "tiles_chunk.h"

#if defined(TILES)
#define PATIENCE 8  // chunks after one with strong gates before mild ones are hoped for again

static void round_state(struct tiles *w) {
    for (int r = 0; r < DKP; r += 2) for (int c = 0; c < DVP; c += LANES)
        keep_state(w, r, c, load(w->S + r * PITCH + c), load(w->S + (r + 1) * PITCH + c));
}

APART void strong_chunk(struct tiles *w, const struct job *j, int64_t t) {
    const struct problem *p = j->p;
    const int reads = j->o.first != NULL;
    const int64_t end = j->s.length - t < C ? j->s.length : t + C;
    for (int d = 0; d < DKP; d++) w->all[d] = 1;
    for (; t < end; t += T) {
        const int count = end - t < T ? (int)(end - t) : T;
        read_tokens(p, &j->s, t, count, reads ? w->q : NULL, w->k, w->a, w->v, w->beta);
        for (int i = 0; i < count; i += M) {
            prepare(&w->chunk, reads ? w->q + i : NULL, w->k + i, w->a + i);
            if (reads)
                advance(w->S, &w->chunk, w->v + i, w->o + i, w->beta + i);
            else
                advance_state(w->S, &w->chunk, w->v + i, w->beta + i);
            for (int d = 0; d < DKP; d++) w->all[d] *= w->chunk.all[d];
        }
        for (int i = 0; reads && i < count; i++) write_row(&p->o, &j->s, token_of(p, &j->s, t + i), w->o[i]);
    }
    round_state(w);
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
        p, s, series_of(p, &s, &p->q), series_of(p, &s, &p->k), series_of(p, &s, &p->v), series_of(p, &s, &p->g),
        series_of(p, &s, &p->o),
    };
    static __thread struct tiles room __attribute__((aligned(64)));  // kept: fresh pages are dear
    struct tiles *w = &room;
    __asm__("" : "+r"(w));  // an address that is worked out once: left alone, GCC asks for it in every function
    struct tile_config config = {.palette = 1}, before;  // others of this thread may have set theirs
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = SIDE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&config);
    read_state(w->S, p->state ? p->state + job * DK * DV : NULL);
    round_state(w);
    w->chunk.ahead = NULL;
    for (int d = 0; d < DKP; d++) w->decay[d] = w->gates[d] = 1;  // gates beyond the last channel stay
    populate_rows(&p->o, &s);
    int patience = 0;
    for (int64_t t = 0; t < s.length; t += C) {
        const int mild = !patience && read_values(w, &j, t) && read_keys(w, &j, t);
        patience = mild ? 0 : patience ? patience - 1 : PATIENCE;
        if (mild)
            mild_chunk(w, &j, t);
        else
            strong_chunk(w, &j, t);
        for (int d = 0; p->decay && d < DKP; d++) w->decay[d] *= w->all[d];
    }
    if (p->final) write_state(p->final + job * DK * DV, w->S);
    if (p->decay) memcpy(p->decay + job * DK, w->decay, 4 * DK);
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
