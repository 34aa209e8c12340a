// gatecc::moe_ffn, forwards: slots sorted by expert, then for a block of an expert's rows both products and what lies
// between them, results weighted into slots, slots summed in their order.
#pragma once
#include "../../../../codegen/c/headers/pages.h"
#include "../../../../codegen/c/headers/threads.h"
#include "functions.h"
#include "product.h"

enum { HALVES, INTERLEAVED, PLAIN };

struct weight {
    const el *at;
    int64_t expert, row, step;  // strides
};

struct experts {
    const el *x;             // (T, d), rows x_row apart
    int64_t x_row;
    const float *weights;    // (T, k)
    const int64_t *indices;  // (T, k)
    struct weight gate_up, down;
    const el *gate_up_bias, *down_bias;  // (E, rows), (E, o), or NULL
    el *out;                 // (T, o), or (T, k, o) with slots
    el *hidden;              // (T k, rows) or NULL: the first products, by expert
    int64_t T, k, E, d, F, o;
    struct function function;
    int32_t layout, slots, threads;
};

// A block of the rows of one expert, and which columns of each product are to be done.
struct task {
    int64_t expert, first, rows;
};

struct run {
    const struct experts *p;
    const int64_t *order;    // slots by expert
    const struct task *tasks;
    int64_t count, splits;          // of the columns of each task; 1: a job does both products
    float *sums;             // (T k, o), or NULL where results go to out at once
    num **middle;            // what the second product reads, of each task
    int failed;
};

// Pieces of a job

struct first {
    const struct experts *p;
    const struct task *task;
    int64_t column;          // of F, where the panel begins
    vf bias[NV];
    num *middle;
    int64_t pitch;
};

INLINE int64_t width(const struct experts *p) { return p->layout == PLAIN ? p->F : 2 * p->F; }
INLINE int64_t row_of(const struct experts *p, int64_t column, int up) {
    return p->layout == PLAIN ? column : p->layout == HALVES ? up * p->F + column : 2 * column + up;
}

INLINE void keep(const struct experts *p, int64_t row, int64_t column, int up, vf h, int64_t n) {
    el *const at = p->hidden + row * width(p);
    if (p->layout != INTERLEAVED) store_els(at + row_of(p, column, up), h, n);
    else
        for (int64_t i = 0; i < n && i < LANES; i++) at[row_of(p, column + i, up)] = narrow(((float *)&h)[i]);
}

static void finish_first(void *context, int64_t row, int rows, vf sum[MR][NV]) {
    const struct first *f = context;
    const struct experts *p = f->p;
    const int plain = p->layout == PLAIN, vectors = plain ? NV : NV / 2;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const int64_t column = f->column + v * LANES, n = p->F - column;
            if (n <= 0) break;
            const vf gate = sum[r][v] + f->bias[v];
            num *const to = f->middle + (row + r) * f->pitch + column;
            if (plain) {
                store_nums(to, pointwise(&p->function, gate), n);
                if (p->hidden) keep(p, f->task->first + row + r, column, 0, gate, n);
                continue;
            }
            const vf up = sum[r][v + NV / 2] + f->bias[v + NV / 2];
            store_nums(to, gated(&p->function, gate, up), n);
            if (p->hidden) {
                keep(p, f->task->first + row + r, column, 0, gate, n);
                keep(p, f->task->first + row + r, column, 1, up, n);
            }
        }
}

struct second {
    const struct run *run;
    const struct task *task;
    int64_t column;          // of o
    vf bias[NV];
};

INLINE void deliver(const struct run *run, int64_t slot, int64_t column, vf y, int64_t n) {
    const struct experts *p = run->p;
    y *= p->weights[slot];
    if (run->sums) store_floats(run->sums + slot * p->o + column, y, n);
    else store_els(p->out + slot * p->o + column, y, n);
}

static void finish_second(void *context, int64_t row, int rows, vf sum[MR][NV]) {
    const struct second *s = context;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NV; v++) {
            const int64_t column = s->column + v * LANES, n = s->run->p->o - column;
            if (n <= 0) break;
            deliver(s->run, s->run->order[s->task->first + row + r], column, sum[r][v] + s->bias[v], n);
        }
}

// A panel as memory that comes next: half of it from ``row`` on, half from ``other``. ``rows`` are all.
INLINE struct ahead coming(const struct weight *w, int64_t expert, int64_t row, int64_t other, int64_t rows) {
    const el *const at = w->at + expert * w->expert;
    if (w->step != 1 || other + NR / 2 > rows) return nothing(w->at);
    const int64_t lines = NR / 2 * w->row * (int64_t)sizeof(el) / 64;
    return (struct ahead){{(const char *)(at + row * w->row), (const char *)(at + other * w->row)}, lines, 0};
}
INLINE struct ahead first_ahead(const struct experts *p, int64_t expert, int64_t column) {
    const int64_t row = row_of(p, column, 0);
    return coming(&p->gate_up, expert, row, p->layout == HALVES ? p->F + column : row + NR / 2, width(p));
}
INLINE struct ahead second_ahead(const struct experts *p, int64_t expert, int64_t column) {
    return coming(&p->down, expert, column, column + NR / 2, p->o);
}

// Both products of a task, columns [from, to) of F or of o.

static void first_product(
    const struct experts *p, const struct task *task, const num *const *a, int64_t from, int64_t to, num *middle,
    int64_t pitch, float *packed, float *partial
) {
    const el *const w = p->gate_up.at + task->expert * p->gate_up.expert;
    const el *const bias = p->gate_up_bias ? p->gate_up_bias + task->expert * width(p) : NULL;
    const int columns = p->layout == PLAIN ? NR : NR / 2;
    struct panel panel = {.step = p->gate_up.step, .K = p->d};
    struct first f = {.p = p, .task = task, .middle = middle, .pitch = pitch};
    for (int64_t column = from; column < to; column += columns) {
        float biases[NR];
        for (int c = 0; c < NR; c++) {
            const int up = c >= columns;
            const int64_t at = column + c - up * columns, row = row_of(p, at, up);
            panel.columns[c] = at < p->F ? w + row * p->gate_up.row : NULL;
            biases[c] = bias && at < p->F ? widen(bias[row]) : 0;
        }
        f.column = column;
        for (int v = 0; v < NV; v++) f.bias[v] = load(biases + v * LANES);
        const int64_t next = column + columns;
        const struct ahead ahead = next < to ? first_ahead(p, task->expert, next) : second_ahead(p, task->expert, 0);
        multiply(a, task->rows, &panel, packed, partial, finish_first, &f, ahead);
    }
}

static void second_product(
    const struct run *run, const struct task *task, const num *const *a, int64_t from, int64_t to, float *packed,
    float *partial, int64_t after
) {
    const struct experts *p = run->p;
    const el *const w = p->down.at + task->expert * p->down.expert;
    struct panel panel = {.step = p->down.step, .K = p->F};
    struct second s = {.run = run, .task = task};
    for (int64_t column = from; column < to; column += NR) {
        s.column = column;
        for (int c = 0; c < NR; c++) panel.columns[c] = column + c < p->o ? w + (column + c) * p->down.row : NULL;
        for (int v = 0; v < NV; v++) {
            const int64_t n = p->o - column - v * LANES;
            s.bias[v] = p->down_bias && n > 0 ? load_els(p->down_bias + task->expert * p->o + column + v * LANES, n)
                                              : splat(0.0f);
        }
        const int64_t next = column + NR;
        const struct ahead ahead = next < to ? second_ahead(p, task->expert, next) : first_ahead(p, after, 0);
        multiply(a, task->rows, &panel, packed, partial, finish_second, &s, ahead);
    }
}

// The same by dot products.

static void first_dots(
    const struct experts *p, const struct task *task, const num *const *a, int64_t from, int64_t to, num *middle,
    int64_t pitch, float *room
) {
    const el *const w = p->gate_up.at + task->expert * p->gate_up.expert;
    const int64_t columns = to - from, rows = task->rows;
    float *gate = room, *up = room + columns * rows;
    if (p->layout == INTERLEAVED) {
        dots(a, rows, w, 2 * p->gate_up.row, p->d, from, to, gate);
        dots(a, rows, w + p->gate_up.row, 2 * p->gate_up.row, p->d, from, to, up);
    } else {
        dots(a, rows, w, p->gate_up.row, p->d, from, to, gate);
        if (p->layout == HALVES) dots(a, rows, w + p->F * p->gate_up.row, p->gate_up.row, p->d, from, to, up);
    }
    const el *const bias = p->gate_up_bias ? p->gate_up_bias + task->expert * width(p) : NULL;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t n = columns - c;
            vf g = splat(0.0f), u = splat(0.0f);
            memcpy(&g, gate + r * columns + c, (size_t)(n < LANES ? n : LANES) * 4);
            if (p->layout != PLAIN) memcpy(&u, up + r * columns + c, (size_t)(n < LANES ? n : LANES) * 4);
            if (bias)
                for (int64_t i = 0; i < n && i < LANES; i++) {
                    ((float *)&g)[i] += widen(bias[row_of(p, from + c + i, 0)]);
                    if (p->layout != PLAIN) ((float *)&u)[i] += widen(bias[row_of(p, from + c + i, 1)]);
                }
            const vf y = p->layout == PLAIN ? pointwise(&p->function, g) : gated(&p->function, g, u);
            store_nums(middle + r * pitch + from + c, y, n);
            if (!p->hidden) continue;
            keep(p, task->first + r, from + c, 0, g, n);
            if (p->layout != PLAIN) keep(p, task->first + r, from + c, 1, u, n);
        }
}

static void second_dots(
    const struct run *run, const struct task *task, const num *const *a, int64_t from, int64_t to, float *room
) {
    const struct experts *p = run->p;
    const int64_t columns = to - from;
    dots(a, task->rows, p->down.at + task->expert * p->down.expert, p->down.row, p->F, from, to, room);
    for (int64_t r = 0; r < task->rows; r++)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t n = columns - c;
            vf y = splat(0.0f);
            memcpy(&y, room + r * columns + c, (size_t)(n < LANES ? n : LANES) * 4);
            if (p->down_bias) y += load_els(p->down_bias + task->expert * p->o + from + c, n);
            deliver(run, run->order[task->first + r], from + c, y, n);
        }
}

// Jobs

INLINE int64_t pitch_of(const struct experts *p) { return (p->F + PAIR - 1) / PAIR * PAIR; }
INLINE int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
// Dot products need the numbers of a column together, and pay off for few rows.
INLINE int few(const struct task *task, int64_t step) { return task->rows <= FEW && step == 1; }

// A piece [from, to) of ``columns``, in whole vectors.
INLINE void piece(int64_t columns, int64_t splits, int64_t i, int64_t *from, int64_t *to) {
    const int64_t each = ((columns + splits - 1) / splits + LANES - 1) / LANES * LANES;
    *from = i * each < columns ? i * each : columns;
    *to = *from + each < columns ? *from + each : columns;
}

static void work_on(struct run *run, int64_t index, int which) {
    const struct experts *p = run->p;
    const struct task *task = &run->tasks[index / run->splits];
    const int64_t pitch = pitch_of(p), rows = task->rows, K = (p->d + PAIR - 1) / PAIR * PAIR;
    num *const middle = run->middle[index / run->splits] ? run->middle[index / run->splits]
                                                         : malloc((size_t)(rows * pitch) * sizeof(num));
    const int copied = !DIRECT || K != p->d;
    num *const copy = which != 2 && copied ? calloc((size_t)(rows * K), sizeof(num)) : NULL;
    const int64_t floats = larger(KC * NR + BLOCK * NR, 2 * FEW * larger(p->F, p->o));
    float *const room = aligned_alloc(64, (size_t)(floats + 15) / 16 * 64);
    if (!middle || !room || (which != 2 && copied && !copy)) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
    } else {
        const num *a[BLOCK];
        int64_t from, to;
        if (which != 2) {
            for (int64_t r = 0; r < rows; r++) {
                const el *const x = p->x + run->order[task->first + r] / p->k * p->x_row;
                if (copied)
                    for (int64_t i = 0; i < p->d; i++) copy[r * K + i] = as_num(widen(x[i]));
                a[r] = copied ? copy + r * K : (const num *)x;
                if (pitch != p->F) middle[r * pitch + p->F] = 0;
            }
            piece(p->F, run->splits, index % run->splits, &from, &to);
            if (few(task, p->gate_up.step)) first_dots(p, task, a, from, to, middle, pitch, room);
            else first_product(p, task, a, from, to, middle, pitch, room, room + KC * NR);
        }
        if (which != 1) {
            const int last = run->splits > 1 || index + 1 == run->count;
            const int64_t after = last ? task->expert : task[1].expert;
            for (int64_t r = 0; r < rows; r++) a[r] = middle + r * pitch;
            piece(p->o, run->splits, index % run->splits, &from, &to);
            if (few(task, p->down.step)) second_dots(run, task, a, from, to, room);
            else second_product(run, task, a, from, to, room, room + KC * NR, after);
        }
    }
    free(room);
    free(copy);
    if (!run->middle[index / run->splits]) free(middle);
}

static void both_job(const void *context, int64_t index) { work_on((struct run *)context, index, 0); }
static void first_job(const void *context, int64_t index) { work_on((struct run *)context, index, 1); }
static void second_job(const void *context, int64_t index) { work_on((struct run *)context, index, 2); }

#define TOKENS 64  // of a job that sums slots
static void sum_slots(const struct experts *p, const float *slots, int64_t columns, el *out, int64_t index) {
    for (int64_t t = index * TOKENS; t < p->T && t < (index + 1) * TOKENS; t++)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t n = columns - c;
            vf sum = splat(0.0f);
            for (int64_t slot = t * p->k; slot < (t + 1) * p->k; slot++) {
                if (p->indices[slot] == p->E) continue;
                if (n >= LANES) sum += load(slots + slot * columns + c);
                else
                    for (int64_t i = 0; i < n; i++) ((float *)&sum)[i] += slots[slot * columns + c + i];
            }
            store_els(out + t * columns + c, sum, n);
        }
}
static void sum_job(const void *context, int64_t index) {
    const struct run *run = context;
    sum_slots(run->p, run->sums, run->p->o, run->p->out, index);
}

// Memory for results of several megabytes.
static void *room_for(int64_t bytes) {
    void *const p = malloc((size_t)bytes);
    expect(p, bytes);
    return p;
}

enum { DONE, OUT_OF_RANGE, NO_MEMORY };

// Slots by expert, in the order in which they came; offsets: (E + 2,).
static int sort(const struct experts *p, int64_t *offsets, int64_t *order) {
    const int64_t slots = p->T * p->k;
    for (int64_t e = 0; e < p->E + 2; e++) offsets[e] = 0;
    for (int64_t s = 0; s < slots; s++) {
        if (p->indices[s] < 0 || p->indices[s] > p->E) return OUT_OF_RANGE;
        offsets[p->indices[s] + 1]++;
    }
    for (int64_t e = 0; e < p->E + 1; e++) offsets[e + 1] += offsets[e];
    for (int64_t s = 0; s < slots; s++) order[offsets[p->indices[s]]++] = s;
    for (int64_t e = p->E + 1; e > 0; e--) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    return DONE;
}

static int64_t divide(const struct experts *p, const int64_t *offsets, struct task *tasks) {
    int64_t count = 0;
    for (int64_t e = 0; e < p->E; e++) {
        const int64_t rows = offsets[e + 1] - offsets[e], blocks = (rows + BLOCK - 1) / BLOCK;
        const int64_t each = blocks ? ((rows + blocks - 1) / blocks + MR - 1) / MR * MR : 0;
        for (int64_t first = 0; first < rows; first += each)
            tasks[count++] = (struct task){e, offsets[e] + first, rows - first < each ? rows - first : each};
    }
    return count;
}

static int run_all(struct run *run, int64_t tasks) {
    const struct experts *p = run->p;
    run->count = tasks;
    if (tasks >= p->threads || p->threads == 1) {
        parallel(both_job, run, tasks, p->threads);
        return run->failed ? NO_MEMORY : DONE;
    }
    run->splits = tasks ? (p->threads + tasks - 1) / tasks : 1;
    for (int64_t i = 0; i < tasks; i++)
        run->middle[i] = malloc((size_t)(run->tasks[i].rows * pitch_of(p)) * sizeof(num));
    for (int64_t i = 0; i < tasks; i++) run->failed |= !run->middle[i];
    if (!run->failed) parallel(first_job, run, tasks * run->splits, p->threads);
    if (!run->failed) parallel(second_job, run, tasks * run->splits, p->threads);
    for (int64_t i = 0; i < tasks; i++) free(run->middle[i]);
    return run->failed ? NO_MEMORY : DONE;
}

int forward(const struct experts *p) {
    const int64_t slots = p->T * p->k, most_tasks = p->E + slots / BLOCK + 1;
    const int apart = p->slots || p->k == 1;  // each slot has a place of its own in out
    int64_t *const offsets = malloc((size_t)(p->E + 2 + slots) * 8), *const order = offsets + p->E + 2;
    struct task *const tasks = malloc((size_t)(most_tasks < slots ? most_tasks : slots) * sizeof(struct task));
    num **const middle = calloc((size_t)(most_tasks < slots ? most_tasks : slots), sizeof(num *));
    float *const sums = apart ? NULL : room_for(slots * p->o * 4);
    int result = offsets && tasks && middle && (apart || sums) ? sort(p, offsets, order) : NO_MEMORY;
    expect(p->hidden, slots * width(p) * (int64_t)sizeof(el));
    if (result == DONE) {
        struct run run = {.p = p, .order = order, .tasks = tasks, .splits = 1, .sums = sums, .middle = middle};
        result = run_all(&run, divide(p, offsets, tasks));
        for (int64_t i = offsets[p->E]; i < slots; i++) {
            if (apart) memset(p->out + order[i] * p->o, 0, (size_t)p->o * sizeof(el));
            if (p->hidden) memset(p->hidden + i * width(p), 0, (size_t)width(p) * sizeof(el));
        }
        if (sums && result == DONE) parallel(sum_job, &run, (p->T + TOKENS - 1) / TOKENS, p->threads);
    }
    free(sums);
    free(middle);
    free(tasks);
    free(offsets);
    return result;
}
