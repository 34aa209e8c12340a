// The forward pass: a job is a head of a sequence.
#pragma once
#include "../../../../codegen/c/headers/pages.h"
#include "../../../../codegen/c/headers/threads.h"
#include "sweep.h"

struct forward_scratch {
    float S[DKP * PITCH], q[T][DKP], k[T][DKP], a[T][DKP], v[T][DVP], o[T][DVP], beta[T], decay[DKP];
    struct chunk chunk;
    struct ahead ahead;
};

static void forward_job(const void *context, int64_t job) {
    const struct problem *p = context;
    const struct sequence s = sequence_of(p, job);
    static __thread struct forward_scratch room __attribute__((aligned(64)));  // kept: fresh pages are dear
    struct forward_scratch *w = &room;
    __asm__("" : "+r"(w));  // else its address is asked for again in every loop that is not inlined
    const int64_t size = (int64_t)DK * DV;
    read_state(w->S, p->state ? p->state + job * size : NULL);
    for (int d = 0; d < DKP; d++) w->decay[d] = 1;
    for (int i = 0; i < AHEAD; i++) w->ahead.row[i] = (const char *)w;
    w->chunk.ahead = LOOKS ? &w->ahead : NULL;
    const int reads = p->o.data != NULL, straight = reads && p->o.type == FLOAT32 && streamed(p, DV);
    populate_rows(&p->o, &s);
    for (int64_t t = 0; t < s.length; t += T) {
        const int count = s.length - t < T ? (int)(s.length - t) : T;
        read_tokens(p, &s, t, count, reads ? w->q : NULL, w->k, w->a, w->v, w->beta);
        for (int i = 0; i < count; i += M) {
            if (LOOKS) look_ahead(&w->ahead, p, &s, t + T + i, reads);
            prepare(&w->chunk, reads ? w->q + i : NULL, w->k + i, w->a + i);
            if (reads)
                advance(w->S, &w->chunk, w->v + i, w->o + i, w->beta + i);
            else
                advance_state(w->S, &w->chunk, w->v + i, w->beta + i);
            for (int d = 0; p->decay && d < DKP; d++) w->decay[d] *= w->chunk.all[d];
        }
        for (int i = 0; reads && i < count; i++) {
            const int64_t token = token_of(p, &s, t + i);
            if (straight)
                put_row((float *)row_of(&p->o, &s, token), w->o[i], DV, 1);
            else
                write_row(&p->o, &s, token, w->o[i]);
        }
    }
    end_streams();
    if (p->final) write_state(p->final + job * size, w->S);
    if (p->decay) memcpy(p->decay + job * DK, w->decay, 4 * DK);
}

void forward(const struct problem *p) {
    if (p->o.data) expect(p->o.data, rows(p) * DV * (p->o.type == FLOAT32 ? 4 : 2));
    parallel(forward_job, p, p->count * p->heads, p->threads);
}
