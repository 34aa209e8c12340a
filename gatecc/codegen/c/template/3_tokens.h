// What the caller hands over, and rows of it as floats.
enum { FLOAT32, BFLOAT16, FLOAT16 };
#define DKP PADDED(DK)
#define DVP PADDED(DV)
#define M 4    // tokens of a micro-chunk: the state is read and written once for so many
#define T 16   // tokens that are converted to float at a time; a multiple of M

struct operand {  // x[b, head / group, token, channel]; strides in elements
    char *data;
    int64_t batch, head, token, channel;
    int32_t type, group;
    int64_t width;  // channels: 1 where one value serves all
};

struct problem {
    struct operand q, k, v, g, beta, o, grad_o;
    const int64_t *segments;  // (row of the batch, first token, length) of each sequence
    int64_t count, heads, tokens;
    const float *state;  // (count, heads, DK, DV)
    float *final, *decay;  // (count, heads, DK, DV); (count, heads, DK), the product of all gates
    const float *grad_final;
    float *dq, *dk, *dv, *dg, *dbeta, *dstate;  // (batch, heads, tokens, width), dstate as state
    float scale;
    int32_t reverse, threads;
};

struct sequence {
    int64_t batch, head, first, length, index;  // index: of its state
};

static struct sequence sequence_of(const struct problem *p, int64_t job) {
    const int64_t *s = p->segments + job / p->heads * 3;
    return (struct sequence){s[0], job % p->heads, s[1], s[2], job};
}

INLINE int64_t token_of(const struct problem *p, const struct sequence *s, int64_t t) {
    return p->reverse ? s->first + s->length - 1 - t : s->first + t;
}

static float half_to_float(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } x;
    const uint32_t magnitude = h & 0x7fff;
    const float tiny = (float)(int32_t)magnitude * 5.9604644775390625e-8f;
    x.u = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    x.f = magnitude < 0x400 ? tiny : x.f;
    x.u |= (uint32_t)(h & 0x8000) << 16;
    return x.f;
}

static float element(const char *row, int type, int64_t i) {
    if (type == FLOAT32) return ((const float *)row)[i];
    if (type == FLOAT16) return half_to_float(((const uint16_t *)row)[i]);
    const uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// One row of n channels as floats; what is beyond them up to ``padded`` is set to zero.
static void read_row(
    const struct operand *x, const struct sequence *s, int64_t token, float *restrict to, int n, int padded
) {
    const int64_t offset = s->batch * x->batch + s->head / x->group * x->head + token * x->token;
    const char *row = x->data + offset * (x->type == FLOAT32 ? 4 : 2);
    if (x->channel != 1)
        for (int i = 0; i < n; i++) to[i] = element(row, x->type, i * x->channel);
    else if (x->type == FLOAT32)
        memcpy(to, row, 4 * (size_t)n);
    else if (x->type == BFLOAT16)
        for (int i = 0; i < n; i++) ((uint32_t *)to)[i] = (uint32_t)((const uint16_t *)row)[i] << 16;
    else
        for (int i = 0; i < n; i++) to[i] = half_to_float(((const uint16_t *)row)[i]);
    for (int i = n; i < padded; i++) to[i] = 0;
}

static void write_row(const struct operand *x, const struct sequence *s, int64_t token, const float *restrict from) {
    const int64_t offset = s->batch * x->batch + s->head * x->head + token * x->token;
    if (x->type == FLOAT32) {
        memcpy(x->data + 4 * offset, from, 4 * DV);
        return;
    }
    uint16_t *to = (uint16_t *)x->data + offset;
    for (int i = 0; i < DV; i++) {  // to the nearest, ties to even
        const uint32_t bits = ((const uint32_t *)from)[i];
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = (uint16_t)(from[i] != from[i] ? 0x7fc0 : rounded);
    }
}

// Tokens [t, t + count) of a sequence, and rows that change nothing up to a multiple of M. q may be NULL.
static void read_tokens(
    const struct problem *p, const struct sequence *s, int64_t t, int count, float (*q)[DKP], float (*k)[DKP],
    float (*a)[DKP], float (*v)[DVP], float *beta
) {
    for (int i = 0; i < count; i++) {
        const int64_t token = token_of(p, s, t + i);
        read_row(&p->k, s, token, k[i], DK, DKP);
        read_row(&p->v, s, token, v[i], DV, DVP);
        if (q) {
            read_row(&p->q, s, token, q[i], DK, DKP);
            for (int d = 0; d < DKP; d += LANES) store(q[i] + d, load(q[i] + d) * p->scale);
        }
#if GATED
        if (p->g.width == 1) {
            float one[LANES];
            read_row(&p->g, s, token, one, 1, LANES);
            const vf gate = splat(exponential(load(one))[0]);
            for (int d = 0; d < DKP; d += LANES) store(a[i] + d, gate);
        } else {
            read_row(&p->g, s, token, a[i], DK, DKP);
            for (int d = 0; d < DKP; d += LANES) store(a[i] + d, exponential(load(a[i] + d)));
        }
#endif
#if DELTA
        read_row(&p->beta, s, token, beta + i, 1, 1);
#endif
    }
    for (int i = count; i % M; i++) {
        memset(k[i], 0, sizeof k[i]);
        memset(v[i], 0, sizeof v[i]);
        if (q) memset(q[i], 0, sizeof q[i]);
        for (int d = 0; GATED && d < DKP; d++) a[i][d] = 1;
        beta[i] = 0;
    }
}

// A state as kernels keep it, DK rows of DVP.
static void read_state(float *S, const float *from) {
    memset(S, 0, 4 * (size_t)DK * DVP);
    for (int r = 0; from && r < DK; r++) memcpy(S + r * DVP, from + r * DV, 4 * DV);
}

static void write_state(float *to, const float *S) {
    for (int r = 0; r < DK; r++) memcpy(to + r * DV, S + r * DVP, 4 * DV);
}
