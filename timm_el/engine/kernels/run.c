/* One call: the groups of a program that was made ready, one after the other. */
#include "program.h"

#include <stdatomic.h>
#include <string.h>

float *el_address(const el_call *call, int value) {
    const el_value *v = call->ready->values + value;
    switch (v->where) { /* inputs and constants are only read */
        case EL_AT_INPUT: return (float *)(uintptr_t)call->inputs[v->at];
        case EL_AT_CONST: return (float *)(uintptr_t)v->fixed;
        case EL_AT_OUTPUT: return call->outputs[v->at];
        default: return (float *)(void *)(call->arena + v->at);
    }
}

/* Is in a ring of this thread, or whole; a value of one image serves all. */
row_view el_rows_of(const el_piece *piece, int value) {
    const el_ready *r = piece->call->ready;
    const el_value *v = r->values + value;
    if (v->node >= piece->group->first && v->node < piece->group->first + piece->group->n - 1) {
        const el_node *s = r->nodes + v->node;
        return view_of((float *)(void *)(piece->scratch + s->ring_at), s->ring, (int)v->shape.w, (int)v->shape.c);
    }
    const size_t image = v->shape.n == 1 ? 0 : (size_t)piece->image;
    return view_of(el_address(piece->call, value) + image * v->image, (int)v->shape.h, (int)v->shape.w,
                   (int)v->shape.c);
}

typedef struct {
    el_call call;
    const el_group *group;
    atomic_int failed;
} job;

static void begin_image(const el_piece *piece, stage *stages, int *have) {
    const el_ready *r = piece->call->ready;
    for (int i = 0; i < piece->group->n; i++) {
        const el_node *s = r->nodes + piece->group->first + i;
        const int32_t *wires = s->step->wires;
        have[i] = 0;
        if (!s->layer) continue;
        stage *t = stages + i;
        const int link = s->kind == EL_POOL ? wires[0] : wires[1], added = s->kind == EL_POOL ? -1 : wires[2];
        el_prepare(t, s->layer, piece->scratch + s->scratch_at);
        t->x = el_rows_of(piece, wires[0]);
        t->y = el_rows_of(piece, s->value);
        if (link >= 0) t->link = el_rows_of(piece, link);
        if (added >= 0) t->added = el_rows_of(piece, added);
    }
}

static void run_node(const el_piece *piece, const el_node *s, stage *stage, int from, int to) {
    const row_view y = el_rows_of(piece, s->value);
    if (s->layer) el_run_rows(stage, from, to, 0, s->plan.c_out);
    else el_step_rows(piece, s, &y, from, to);
}

/* Rows from .. to of the last node in one image, and of the others as much as that needs. */
static void run_image(const el_piece *piece, int from, int to) {
    const el_group *g = piece->group;
    const el_ready *r = piece->call->ready;
    stage stages[EL_MAX_RUN] = {{0}};
    int have[EL_MAX_RUN]; /* rows before this one were made */
    begin_image(piece, stages, have);
    for (int oy = from; oy < to; oy += g->band_rows) {
        const int end = oy + g->band_rows < to ? oy + g->band_rows : to;
        for (int i = 0; i < g->n; i++) {
            const el_node *s = r->nodes + g->first + i;
            const int64_t height = r->values[s->value].shape.h;
            const int64_t a = oy * s->need.stride - s->need.before, b = (end - 1) * s->need.stride + s->need.after + 1;
            const int last = (int)(b < height ? b : height);
            if (a > have[i]) have[i] = (int)a;
            if (have[i] >= last) continue;
            run_node(piece, s, stages + i, have[i], last);
            have[i] = last;
        }
    }
}

static void run_rows(void *context, int item) {
    job *j = context;
    const el_group *g = j->group;
    const el_shape *last = &j->call.ready->values[j->call.ready->nodes[g->first + g->n - 1].value].shape;
    el_piece piece = {&j->call, g, 0, el_scratch(EL_SLOT_BAND, g->scratch + 64)};
    if (!piece.scratch) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t rows = last->n * last->h, from = rows * item / g->items, to = rows * (item + 1) / g->items;
    for (int64_t row = from; row < to;) {
        piece.image = (int)(row / last->h);
        const int64_t first = row % last->h, left = to - row < last->h - first ? to - row : last->h - first;
        run_image(&piece, (int)first, (int)(first + left));
        row += left;
    }
}

static void run_units(void *context, int item) {
    job *j = context;
    const el_ready *r = j->call.ready;
    const el_node *s = r->nodes + j->group->first;
    const int64_t units = el_units(s, r->values);
    el_run_units(&j->call, s, units * item / j->group->items, units * (item + 1) / j->group->items);
}

/* A convolution or a pool alone: its threads share rows or channels, and the weights of what comes next are fetched. */
static int run_layer(const el_call *call, const el_node *s, const el_node *next) {
    const int32_t *wires = s->step->wires;
    const int link = s->kind == EL_POOL ? wires[0] : wires[1], added = s->kind == EL_POOL ? -1 : wires[2];
    return el_run_layer(s->layer, next && next->layer ? &next->plan : NULL, el_address(call, wires[0]),
                        link < 0 ? NULL : el_address(call, link), added < 0 ? NULL : el_address(call, added),
                        el_address(call, s->value), call->ready->threads);
}

static int run_group(const el_call *call, const el_group *g) {
    const el_ready *r = call->ready;
    const el_node *s = r->nodes + g->first;
    if (g->n == 1 && s->layer) return run_layer(call, s, g->first + 1 < r->n_nodes ? s + 1 : NULL);
    job j = {.call = *call, .group = g};
    atomic_init(&j.failed, 0);
    el_parallel(el_is_over_images(s->step) && g->n == 1 ? run_units : run_rows, &j, g->items,
                g->items > 1 ? r->threads : 1);
    return atomic_load(&j.failed) ? EL_NO_MEMORY : EL_OK;
}

int el_run_ready(const el_ready *r, const float *const *inputs, float *const *outputs) {
    el_call call = {r, inputs, outputs, NULL};
    if (r->instruction_set != el_active()) return EL_BAD_PLAN; /* weights are laid out for another one */
    if (r->arena && !(call.arena = el_scratch(EL_SLOT_ARENA, r->arena))) return EL_NO_MEMORY;
    for (int g = 0; g < r->n_groups; g++) {
        const int failed = run_group(&call, r->groups + g);
        if (failed) return failed;
    }
    for (int i = 0; i < r->program->n_outputs; i++) {
        const int value = r->program->outputs[i].value;
        const el_value *v = r->values + value;
        const float *from = el_address(&call, value);
        if (from != outputs[i] && v->shape.n) memcpy(outputs[i], from, (size_t)v->shape.n * v->image * sizeof(float));
    }
    return EL_OK;
}
