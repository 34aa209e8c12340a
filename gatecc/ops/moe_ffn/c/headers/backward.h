// gatecc::moe_ffn, backwards. With u = g down of a slot's row g: <u, a> + <g, bias> is the gradient of its weight, w u
// passes through the activation to dh, and dh gate_up is the gradient of x. Those of the weights are dh^T x and
// g^T (w a) over the rows of an expert.
#pragma once
#include "experts.h"

struct gradients {
    const el *grad;      // (T, o), or (T, k, o) with slots
    const el *hidden;    // (T k, rows), as forwards left it
    el *dx;              // (T, d), or NULL where none is wanted, as all that follow
    float *dweights;     // (T, k)
    el *dgate_up, *ddown, *dgate_up_bias, *ddown_bias;  // contiguous, zero where an expert has no rows
};

struct back {
    struct run run;
    const struct gradients *g;
    const int64_t *offsets;
    const int64_t *active;   // experts with rows
    num *dh, *wa;            // (slots, rows), (slots, F): by expert
};

INLINE const el *grad_of(const struct back *b, int64_t slot) {
    const struct experts *p = b->run.p;
    return b->g->grad + (p->slots ? slot : slot / p->k) * p->o;
}

// Rows of K numbers as products read them, each copied if it must be.
static const num **gathered(int64_t rows, int64_t K, num **copy) {
    const int64_t padded = (K + PAIR - 1) / PAIR * PAIR;
    *copy = !DIRECT || padded != K ? calloc((size_t)(rows * padded), sizeof(num)) : NULL;
    return malloc((size_t)rows * sizeof(num *));
}
static void gather(const num **a, num *copy, int64_t row, int64_t K, const el *from) {
    const int64_t padded = (K + PAIR - 1) / PAIR * PAIR;
    if (copy)
        for (int64_t i = 0; i < K; i++) copy[row * padded + i] = as_num(widen(from[i]));
    a[row] = copy ? copy + row * padded : (const num *)from;
}

INLINE vf hidden_of(const struct back *b, int64_t row, int64_t column, int up, int64_t n) {
    const struct experts *p = b->run.p;
    const el *const at = b->g->hidden + row * width(p);
    if (p->layout != INTERLEAVED) return load_els(at + row_of(p, column, up), n);
    vf x = splat(0.0f);
    for (int64_t i = 0; i < n && i < LANES; i++) ((float *)&x)[i] = widen(at[row_of(p, column + i, up)]);
    return x;
}
INLINE void put_dh(const struct back *b, int64_t row, int64_t column, int up, vf x, int64_t n) {
    const struct experts *p = b->run.p;
    num *const at = b->dh + row * width(p);
    if (p->layout != INTERLEAVED) store_nums(at + row_of(p, column, up), x, n);
    else
        for (int64_t i = 0; i < n && i < LANES; i++) at[row_of(p, column + i, up)] = as_num(((float *)&x)[i]);
}

struct through {
    const struct back *b;
    const struct task *task;
    int64_t column;
    vf *dots;                // of each row of the task
};

// A tile of u.
static void finish_through(void *context, int64_t row, int rows, vf sum[MR][NV]) {
    const struct through *t = context;
    const struct experts *p = t->b->run.p;
    for (int r = 0; r < rows; r++) {
        const int64_t at = t->task->first + row + r;
        const float weight = p->weights[t->b->run.order[at]];
        for (int v = 0; v < NV; v++) {
            const int64_t column = t->column + v * LANES, n = p->F - column;
            if (n <= 0) break;
            const vf gate = hidden_of(t->b, at, column, 0, n), u = sum[r][v];
            vf of_gate, of_up, a;
            if (p->layout == PLAIN) {
                a = pointwise(&p->function, gate);
                of_gate = slope(&p->function, gate);
            } else {
                a = gated_slopes(&p->function, gate, hidden_of(t->b, at, column, 1, n), &of_gate, &of_up);
                put_dh(t->b, at, column, 1, weight * u * of_up, n);
            }
            put_dh(t->b, at, column, 0, weight * u * of_gate, n);
            store_nums(t->b->wa + at * p->F + column, weight * a, n);
            vf product = u * a;
            if (n < LANES)
                for (int i = (int)n; i < LANES; i++) ((float *)&product)[i] = 0;
            t->dots[row + r] += product;
        }
    }
}

struct to_x {
    const struct back *b;
    const struct task *task;
    int64_t column;
};

static void finish_x(void *context, int64_t row, int rows, vf sum[MR][NV]) {
    const struct to_x *t = context;
    const struct experts *p = t->b->run.p;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NV; v++) {
            const int64_t column = t->column + v * LANES, n = p->d - column;
            if (n <= 0) break;
            const int64_t slot = t->b->run.order[t->task->first + row + r];
            if (t->b->run.sums) store_floats(t->b->run.sums + slot * p->d + column, sum[r][v], n);
            else store_els(t->b->g->dx + slot * p->d + column, sum[r][v], n);
        }
}

// A panel of the columns of w (K, N) from ``column`` on: lines where these lie together, else columns.
static void panel_of(
    struct panel *p, const struct weight *w, int64_t expert, int64_t N, int64_t column, const void **lines
) {
    const el *const at = w->at + expert * w->expert;
    p->lines = w->step == 1 ? lines : NULL;
    p->column = column;
    p->width = N;
    p->of_nums = 0;
    p->step = w->row;
    if (w->step == 1)
        for (int64_t k = 0; column == 0 && k < p->K; k++) lines[k] = at + k * w->row;
    else
        for (int c = 0; c < NR; c++) p->columns[c] = column + c < N ? at + (column + c) * w->step : NULL;
}

// A block of rows: u, dh, w a, the gradients of weights and of x.
static void rows_job(const void *context, int64_t index) {
    struct back *const b = (struct back *)context;
    const struct experts *p = b->run.p;
    const struct task *task = &b->run.tasks[index];
    const int64_t rows = task->rows, most = larger(p->o, width(p));
    float *const room = aligned_alloc(64, (KC * NR + BLOCK * NR + BLOCK * LANES) * 4);
    num *copy, *wide;
    const num **a = gathered(rows, p->o, &copy), **h = gathered(rows, width(p), &wide);
    const void **lines = malloc((size_t)most * sizeof(void *));
    const int padded = width(p) % PAIR != 0;
    if (!room || !a || !h || !lines || (!copy && (!DIRECT || p->o % PAIR)) || (!wide && padded)) {
        __atomic_store_n(&b->run.failed, 1, __ATOMIC_RELAXED);
    } else {
        float *const partial = room + KC * NR;
        struct through t = {.b = b, .task = task, .dots = (vf *)(partial + BLOCK * NR)};
        struct panel panel = {.K = p->o};
        for (int64_t r = 0; r < rows; r++) {
            gather(a, copy, r, p->o, grad_of(b, b->run.order[task->first + r]));
            t.dots[r] = splat(0.0f);
        }
        for (int64_t column = 0; column < p->F; column += NR) {
            t.column = column;
            panel_of(&panel, &p->down, task->expert, p->F, column, lines);
            multiply(a, rows, &panel, room, partial, finish_through, &t, nothing(room));
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t slot = b->run.order[task->first + r];
            float sum = 0;
            for (int i = 0; i < LANES; i++) sum += ((float *)&t.dots[r])[i];
            if (p->down_bias)
                for (int64_t i = 0; i < p->o; i++)
                    sum += widen(p->down_bias[task->expert * p->o + i]) * widen(grad_of(b, slot)[i]);
            b->g->dweights[slot] = sum;
        }
        if (b->g->dx) {
            struct to_x x = {.b = b, .task = task};
            panel.K = width(p);
            for (int64_t r = 0; r < rows; r++) {
                const num *const from = b->dh + (task->first + r) * width(p);
                h[r] = from;
                if (!padded) continue;
                h[r] = wide + r * (width(p) + 1);
                memcpy(wide + r * (width(p) + 1), from, (size_t)width(p) * sizeof(num));
            }
            for (int64_t column = 0; column < p->d; column += NR) {
                x.column = column;
                panel_of(&panel, &p->gate_up, task->expert, p->d, column, lines);
                multiply(h, rows, &panel, room, partial, finish_x, &x, nothing(room));
            }
        }
    }
    free(lines);
    free(wide);
    free(copy);
    free(h);
    free(a);
    free(room);
}

// Gradients of an expert's weights

struct to_weight {
    el *to;
    int64_t pitch, row, column;
};

static void finish_weight(void *context, int64_t row, int rows, vf sum[MR][NV]) {
    const struct to_weight *t = context;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NV; v++) {
            const int64_t column = t->column + v * LANES, n = t->pitch - column;
            if (n > 0) store_els(t->to + (t->row + row + r) * t->pitch + column, sum[r][v], n);
        }
}

// K lines (of M numbers) turned into rows of K numbers, M of them from ``from`` on.
static void turn(const struct panel *lines, int64_t from, int64_t rows, num *turned, int64_t pitch) {
    const int64_t K = (lines->K + PAIR - 1) / PAIR;
    for (int64_t m = 0; m < rows; m += LANES)
        for (int64_t k = 0; k < K; k += LANES) {
            vf x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = k + i < K ? paired(lines, (k + i) * PAIR, from + m, rows - m) : splat(0.0f);
            transpose(x);
            for (int i = 0; i < LANES && m + i < rows; i++) {
                num *const to = turned + (m + i) * pitch + k * PAIR;
                memcpy(to, &x[i], (size_t)(K - k < LANES ? K - k : LANES) * 4);
            }
        }
}

// left^T right, both of K lines: (M, N) to ``to``.
static int outer(struct panel left, int64_t M, struct panel right, el *to, float *room) {
    const int64_t pitch = (left.K + PAIR - 1) / PAIR * PAIR;
    num *const turned = malloc((size_t)(BLOCK * pitch) * sizeof(num));
    if (!turned) return 1;
    struct to_weight t = {.to = to, .pitch = right.width};
    const num *a[BLOCK];
    for (int64_t row = 0; row < M; row += BLOCK) {
        const int64_t rows = M - row < BLOCK ? M - row : BLOCK;
        turn(&left, row, rows, turned, pitch);
        for (int64_t r = 0; r < rows; r++) a[r] = turned + r * pitch;
        t.row = row;
        for (int64_t column = 0; column < right.width; column += NR) {
            t.column = right.column = column;
            multiply(a, rows, &right, room, room + KC * NR, finish_weight, &t, nothing(room));
        }
    }
    free(turned);
    return 0;
}

INLINE void add_up(const struct panel *lines, const float *weights, const int64_t *order, int64_t N, el *to) {
    for (int64_t n = 0; n < N; n++) {
        float sum = 0;
        for (int64_t k = 0; k < lines->K; k++) {
            const float x = lines->of_nums && !DIRECT ? ((const float *)lines->lines[k])[n]
                                                      : widen(((const el *)lines->lines[k])[n]);
            sum += weights ? weights[order[k]] * x : x;
        }
        to[n] = narrow(sum);
    }
}

static void weights_job(const void *context, int64_t index) {
    struct back *const b = (struct back *)context;
    const struct experts *p = b->run.p;
    const int64_t e = b->active[index / 2], first = b->offsets[e], rows = b->offsets[e + 1] - first;
    const int64_t *const order = b->run.order + first;
    float *const room = aligned_alloc(64, (KC * NR + BLOCK * NR) * 4);
    const void **left = malloc((size_t)rows * sizeof(void *)), **right = malloc((size_t)rows * sizeof(void *));
    int failed = !room || !left || !right;
    if (!failed && index % 2 == 0 && (b->g->dgate_up || b->g->dgate_up_bias)) {
        for (int64_t r = 0; r < rows; r++) {
            left[r] = b->dh + (first + r) * width(p);
            right[r] = p->x + order[r] / p->k * p->x_row;
        }
        const struct panel l = {.K = rows, .lines = left, .width = width(p), .of_nums = 1};
        const struct panel x = {.K = rows, .lines = right, .width = p->d};
        if (b->g->dgate_up) failed = outer(l, width(p), x, b->g->dgate_up + e * width(p) * p->d, room);
        if (b->g->dgate_up_bias) add_up(&l, NULL, NULL, width(p), b->g->dgate_up_bias + e * width(p));
    }
    if (!failed && index % 2 == 1 && (b->g->ddown || b->g->ddown_bias)) {
        for (int64_t r = 0; r < rows; r++) {
            left[r] = grad_of(b, order[r]);
            right[r] = b->wa + (first + r) * p->F;
        }
        const struct panel l = {.K = rows, .lines = left, .width = p->o};
        const struct panel wa = {.K = rows, .lines = right, .width = p->F, .of_nums = 1};
        if (b->g->ddown) failed = outer(l, p->o, wa, b->g->ddown + e * p->o * p->F, room);
        if (b->g->ddown_bias) add_up(&l, p->weights, order, p->o, b->g->ddown_bias + e * p->o);
    }
    if (failed) __atomic_store_n(&b->run.failed, 1, __ATOMIC_RELAXED);
    free(right);
    free(left);
    free(room);
}

static void sum_x_job(const void *context, int64_t index) {
    const struct back *b = context;
    sum_slots(b->run.p, b->run.sums, b->run.p->d, b->g->dx, index);
}

static void pass_back(struct back *b, int64_t tasks, int64_t experts) {
    const struct experts *p = b->run.p;
    const struct gradients *g = b->g;
    const int64_t slots = p->T * p->k;
    parallel(rows_job, b, tasks, p->threads);
    if (b->run.failed) return;
    if (g->dgate_up || g->ddown || g->dgate_up_bias || g->ddown_bias)
        parallel(weights_job, b, 2 * experts, p->threads);
    for (int64_t i = b->offsets[p->E]; i < slots; i++) {
        const int64_t slot = b->run.order[i];
        g->dweights[slot] = 0;
        if (g->dx && !b->run.sums) memset(g->dx + slot * p->d, 0, (size_t)p->d * sizeof(el));
    }
    if (g->dx && b->run.sums) parallel(sum_x_job, b, (p->T + TOKENS - 1) / TOKENS, p->threads);
}

static void no_gradients(const struct experts *p, const struct gradients *g, int64_t e) {
    const int64_t size = sizeof(el);
    if (g->dgate_up) memset(g->dgate_up + e * width(p) * p->d, 0, (size_t)(width(p) * p->d * size));
    if (g->ddown) memset(g->ddown + e * p->o * p->F, 0, (size_t)(p->o * p->F * size));
    if (g->dgate_up_bias) memset(g->dgate_up_bias + e * width(p), 0, (size_t)(width(p) * size));
    if (g->ddown_bias) memset(g->ddown_bias + e * p->o, 0, (size_t)(p->o * size));
}

int backward(const struct experts *p, const struct gradients *g) {
    const int64_t slots = p->T * p->k, most = p->E + slots / BLOCK + 1, most_tasks = most < slots ? most : slots;
    int64_t *const offsets = malloc((size_t)(2 * p->E + 2 + slots) * 8), *const order = offsets + p->E + 2;
    int64_t *const active = order + slots;
    struct task *const tasks = malloc((size_t)most_tasks * sizeof(struct task));
    num *const dh = room_for(slots * width(p) * (int64_t)sizeof(num));
    num *const wa = room_for(slots * p->F * (int64_t)sizeof(num));
    float *const sums = g->dx && p->k > 1 ? room_for(slots * p->d * 4) : NULL;
    expect(g->dgate_up, p->E * width(p) * p->d * (int64_t)sizeof(el));
    expect(g->ddown, p->E * p->o * p->F * (int64_t)sizeof(el));
    const int there = offsets && tasks && dh && wa && (sums || !g->dx || p->k == 1);
    int result = there ? sort(p, offsets, order) : NO_MEMORY;
    if (result == DONE) {
        struct back b = {.run = {.p = p, .order = order, .tasks = tasks, .splits = 1, .sums = sums},
                         .g = g, .offsets = offsets, .active = active, .dh = dh, .wa = wa};
        int64_t experts = 0;
        for (int64_t e = 0; e < p->E; e++)
            if (offsets[e + 1] > offsets[e]) active[experts++] = e;
            else no_gradients(p, g, e);
        pass_back(&b, divide(p, offsets, tasks), experts);
        result = b.run.failed ? NO_MEMORY : DONE;
    }
    free(sums);
    free(wa);
    free(dh);
    free(tasks);
    free(offsets);
    return result;
}
