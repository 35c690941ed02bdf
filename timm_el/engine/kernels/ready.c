/* What is decided once for one size of inputs: which steps run, which of them together, and where their values are.
 *
 * Steps that follow one another can run as a group, a few rows of each at a time, if of what they make before the last
 * nobody later reads. Of what lies between them only the rows that are still needed are kept, in rings. This pays
 * where images do not fit into a core's cache and threads have rows to share. */
#include "program.h"

#include <stdlib.h>
#include <string.h>

#define GROUP_BYTES 1500000 /* rows that a group keeps: they shall stay in a core's second cache */
#define MOST_REACH ((int64_t)1 << 24)
#define BAND_PIXELS 96
#define MOST_KEPT 16 /* sizes that el_run remembers of a program */

size_t el_large_image_bytes = 250000; /* measured: 100 to 500 kB are level, 1 MB is slower */

size_t el_large_image(size_t bytes) {
    const size_t before = el_large_image_bytes;
    el_large_image_bytes = bytes;
    return before;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Add to the reach of a value that of `need`, through a window of the given size; 0 if rows do not go hand in hand. */
static int extend(el_reach *r, el_reach need, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
    const el_reach more = {need.stride * stride, need.before * stride + padding,
                           need.after * stride + (taps - 1) * dilation - padding};
    if (r->stride && r->stride != more.stride) return 0;
    if (!r->stride || more.before > r->before) r->before = more.before;
    if (!r->stride || more.after > r->after) r->after = more.after;
    r->stride = more.stride;
    return r->stride <= MOST_REACH && r->before <= MOST_REACH && r->after <= MOST_REACH;
}

/* The node of a group that gives this value, or NULL: it is there before the group runs. */
static el_node *inside(const el_ready *r, int from, int value) {
    const int node = value < 0 ? -1 : r->values[value].node;
    return node >= from ? r->nodes + node : NULL;
}

/* Which rows of the values that it reads a node needs; 0 if they cannot be made a few at a time. */
static int extend_sources(el_ready *r, int from, const el_node *s) {
    const int32_t *wires = s->step->wires, *ints = s->step->record->ints;
    const el_shape *out = &r->values[s->value].shape;
    const el_window *k = &s->plan.conv, *pool = &s->plan.pool;
    for (int i = 0; i < s->step->record->n_wires; i++) {
        el_node *source = inside(r, from, wires[i]);
        if (!source) continue;
        const el_shape *x = &r->values[wires[i]].shape;
        int fits = x->n == out->n;
        if (s->kind == EL_POOL || (s->kind == EL_CONV && i == 0))
            fits = fits && extend(&source->need, s->need, k->kh, k->sh, k->ph, k->dh);
        else if (s->kind == EL_CONV && i == 1 && s->plan.link_pool)
            fits = fits && extend(&source->need, s->need, pool->kh, pool->sh, pool->ph, pool->dh);
        else if (s->kind == EL_INPUT_SCALE)
            fits = fits && extend(&source->need, s->need, k->kh, k->sh, k->ph, k->dh);
        else if (s->kind == EL_PAD)
            fits = fits && extend(&source->need, s->need, 1, 1, ints[2], 1);
        else
            fits = fits && x->h == out->h && extend(&source->need, s->need, 1, 1, 0, 1);
        if (!fits) return 0;
    }
    return 1;
}

static int band_rows(const el_shape *out) {
    const int64_t rows = (BAND_PIXELS + out->w - 1) / out->w;
    return (int)(rows < out->h ? rows : out->h);
}

/* Nodes from .. to as a group; 0 if they cannot be one, or keep too many rows. */
static int lay_out(el_ready *r, int from, int to, el_group *g) {
    const el_shape *last = &r->values[r->nodes[to - 1].value].shape;
    *g = (el_group){from, to - from, 1, band_rows(last), 0};
    if (to - from > EL_MAX_RUN) return 0;
    for (int i = from; i < to; i++) r->nodes[i].need = (el_reach){0, 0, 0};
    r->nodes[to - 1].need.stride = 1;
    size_t kept = 0;
    for (int i = to - 1; i >= from; i--) {
        el_node *s = r->nodes + i;
        const el_value *v = r->values + s->value;
        if (g->scratch > SIZE_MAX / 4) return 0;
        if (el_is_over_images(s->step) || v->shape.n != last->n || !extend_sources(r, from, s)) return 0;
        s->scratch_at = g->scratch;
        g->scratch += aligned(s->layer ? s->layer->bytes : el_step_scratch(s));
        s->ring_at = g->scratch;
        s->ring = (int)v->shape.h;
        if (i == to - 1) continue;
        const int64_t rows = (g->band_rows - 1) * s->need.stride + s->need.before + s->need.after + 1;
        if (rows < s->ring) s->ring = rows < 1 ? 1 : (int)rows;
        const size_t size = aligned((size_t)s->ring * (v->image / (size_t)v->shape.h) * sizeof(float));
        g->scratch += size;
        kept += size;
    }
    return kept <= GROUP_BYTES;
}

/* The nearest node after `to` at which a group that starts with `from` can end. */
static int next_end(const int *last_use, int from, int to) {
    int end = to + 1;
    for (int i = from; i + 1 < end; i++)
        if (last_use[i] >= end) end = last_use[i] + 1;
    return end;
}

static int is_large(const el_ready *r, int from, int to) {
    const el_shape *last = &r->values[r->nodes[to - 1].value].shape;
    size_t most = 0;
    for (int i = from; i < to; i++) {
        const size_t size = r->values[r->nodes[i].value].image;
        if (size > most) most = size;
    }
    return most * sizeof(float) > el_large_image_bytes &&
           (r->threads == 1 || last->n * last->h >= 8 * (int64_t)r->threads);
}

/* A node by itself: all of its rows at once. */
static el_group alone(el_ready *r, int node) {
    el_group g;
    lay_out(r, node, node + 1, &g);
    g.band_rows = (int)r->values[r->nodes[node].value].shape.h;
    return g;
}

/* How many parts a group has: a thread is not woken for what it takes a few microseconds to do. */
static int items_of(const el_ready *r, const el_group *g) {
    const el_node *last = r->nodes + g->first + g->n - 1;
    const el_value *v = r->values + last->value;
    const int64_t units = el_is_over_images(last->step) ? el_units(last, r->values) : v->shape.n * v->shape.h;
    const int is_small =
        g->n == 1 && !last->layer && (double)v->shape.n * (double)r->values[last->step->wires[0]].image < 30000.;
    return is_small ? 1 : (int)(units < r->threads ? units : r->threads);
}

/* Groups that together run all nodes. `last_use` has for each node the last one that reads its value. */
static void make_groups(el_ready *r, const int *last_use) {
    const int n = r->n_nodes;
    for (int from = 0, to; from < n; from = to) {
        el_group *g = r->groups + r->n_groups++;
        to = next_end(last_use, from, from);
        int fits = to <= n && to - from <= EL_MAX_RUN && is_large(r, from, to) && lay_out(r, from, to, g);
        while (fits && to < n) {
            const int next = next_end(last_use, from, to);
            if (next > n || next - from > EL_MAX_RUN || !is_large(r, to, next) || !lay_out(r, from, next, g)) break;
            to = next;
        }
        if (!fits || to - from == 1) *g = alone(r, from), to = from + 1;
        else lay_out(r, from, to, g);
        g->items = items_of(r, g);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* A part of the arena that holds a value until group `until` has run. */
typedef struct {
    size_t from, to;
    int until;
} block;

/* The first gap of `bytes` bytes between blocks, which are sorted; those that are over are taken out. */
static size_t first_fit(block *blocks, int *n, int group, size_t bytes, int until) {
    int kept = 0;
    for (int i = 0; i < *n; i++)
        if (blocks[i].until >= group) blocks[kept++] = blocks[i];
    size_t at = 0;
    int place = 0;
    while (place < kept && blocks[place].from - at < bytes) at = blocks[place++].to;
    memmove(blocks + place + 1, blocks + place, (size_t)(kept - place) * sizeof *blocks);
    blocks[place] = (block){at, at + bytes, until};
    *n = kept + 1;
    return at;
}

static int works_in_place(int kind) {
    return kind == EL_UNARY || kind == EL_AFFINE || kind == EL_PRELU || kind == EL_NORM || kind == EL_BINARY;
}

/* The value that a group may overwrite with what it makes, or NULL: it is as large, and nobody reads it any more. */
static const el_value *overwritten(const el_ready *r, const el_group *g, int number, const int *until) {
    const el_node *s = r->nodes + g->first;
    const el_value *out = r->values + s->value;
    if (g->n > 1 || !works_in_place(s->kind)) return NULL;
    for (int i = 0; i < s->step->record->n_wires; i++) {
        const el_value *v = r->values + s->step->wires[i];
        if (v->where == EL_AT_ARENA && v->node >= 0 && until[v->node] == number &&
            !memcmp(&v->shape, &out->shape, sizeof v->shape))
            return v;
    }
    return NULL;
}

/* Give each value that lies between groups its place; `until` has for each node the last group that reads its value.
 * Return 0 if there are not so many addresses: no value has more than an eighth of them, so that no sum overflows. */
static int lay_out_arena(el_ready *r, const int *until, block *blocks) {
    int n = 0;
    for (int g = 0; g < r->n_groups; g++) {
        const int node = r->groups[g].first + r->groups[g].n - 1;
        el_value *v = r->values + r->nodes[node].value;
        if (v->where != EL_AT_ARENA) continue;
        const el_value *old = overwritten(r, r->groups + g, g, until);
        if (old) {
            v->at = old->at;
            for (int i = 0; i < n; i++)
                if (blocks[i].from == old->at && blocks[i].until == g) blocks[i].until = until[node];
            continue;
        }
        const size_t bytes = aligned((size_t)v->shape.n * v->image * sizeof(float) + 1);
        v->at = first_fit(blocks, &n, g, bytes, until[node]);
        if (v->at + bytes > r->arena) r->arena = v->at + bytes;
        if (r->arena > SIZE_MAX / 2) return 0;
    }
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Where values are that the caller gives, takes or keeps; a value that is an output twice is at the first. Return 0 if
 * one is too large to have an address. */
static int find_places(el_ready *r, const el_shape *shapes) {
    const el_program *p = r->program;
    for (int i = 0; i < p->n_values; i++) {
        el_value *v = r->values + i;
        if ((double)shapes[i].n * (double)shapes[i].h * (double)shapes[i].w * (double)shapes[i].c * sizeof(float) >
            (double)(SIZE_MAX / 8))
            return 0;
        const el_program_step *s = i < p->n_inputs ? NULL : p->steps + i - p->n_inputs;
        *v = (el_value){.shape = shapes[i], .image = (size_t)(shapes[i].h * shapes[i].w * shapes[i].c), .node = -1};
        v->where = !s ? EL_AT_INPUT : s->record->kind == EL_CONST ? EL_AT_CONST : EL_AT_ARENA;
        v->at = s ? 0 : (size_t)i;
        if (v->where == EL_AT_CONST) v->fixed = s->tensors[0];
    }
    for (int i = 0; i < p->n_outputs; i++) {
        el_value *v = r->values + p->outputs[i].value;
        if (v->where == EL_AT_ARENA) v->where = EL_AT_OUTPUT, v->at = (size_t)i;
    }
    return 1;
}

/* The steps that an output needs, in order. */
static void find_nodes(el_ready *r, unsigned char *needed) {
    const el_program *p = r->program;
    for (int i = 0; i < p->n_outputs; i++) needed[p->outputs[i].value] = 1;
    for (int i = p->n_steps - 1; i >= 0; i--) {
        const el_program_step *s = p->steps + i;
        for (int j = 0; needed[p->n_inputs + i] && j < s->record->n_wires; j++)
            if (s->wires[j] >= 0) needed[s->wires[j]] = 1;
    }
    for (int i = 0; i < p->n_steps; i++) {
        const el_program_step *s = p->steps + i;
        const int value = p->n_inputs + i;
        if (!needed[value] || s->record->kind == EL_CONST || r->values[value].shape.n == 0) continue;
        r->values[value].node = r->n_nodes;
        r->nodes[r->n_nodes++] = (el_node){.step = s, .kind = s->record->kind, .value = value};
    }
}

static int make_plan(const el_shape *shapes, el_node *s, const el_error *e) {
    el_shape out;
    if (s->kind != EL_CONV && s->kind != EL_POOL && s->kind != EL_INPUT_SCALE) return EL_OK;
    if (el_plan_of(s->step, shapes, &out, &s->plan, e)) return EL_BAD_PLAN;
    if (s->kind == EL_INPUT_SCALE) return EL_OK;
    if (s->kind == EL_CONV) {
        const el_plan *p = &s->plan;
        const int end_h = (p->oh - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh >= p->h;
        const int end_w = (p->ow - 1) * p->conv.sw - p->conv.pw + (p->conv.kw - 1) * p->conv.dw >= p->w;
        s->plan.weight = s->step->weight;
        if (p->conv.ph || p->conv.pw || end_h || end_w) s->plan.tap_sums = s->step->tap_sums;
    }
    s->layer = malloc(sizeof *s->layer);
    if (!s->layer) return el_say_no_memory(e);
    el_set_up(s->layer, &s->plan);
    return EL_OK;
}

/* The last node that reads what a node gives; n_nodes for an output. */
static void find_last_use(const el_ready *r, int *last_use) {
    for (int i = 0; i < r->n_nodes; i++) {
        const el_node *s = r->nodes + i;
        last_use[i] = r->values[s->value].where == EL_AT_OUTPUT ? r->n_nodes : i;
        for (int j = 0; j < s->step->record->n_wires; j++) {
            const int node = s->step->wires[j] < 0 ? -1 : r->values[s->step->wires[j]].node;
            if (node >= 0 && last_use[node] < i) last_use[node] = i;
        }
    }
}

/* From nodes to groups. */
static void count_in_groups(const el_ready *r, int *last_use, int *group_of) {
    for (int g = 0; g < r->n_groups; g++)
        for (int i = 0; i < r->groups[g].n; i++) group_of[r->groups[g].first + i] = g;
    for (int i = 0; i < r->n_nodes; i++) last_use[i] = last_use[i] < r->n_nodes ? group_of[last_use[i]] : r->n_groups;
}

static int fill_ready(el_ready *r, const el_shape *shapes, char *room, const el_error *error) {
    const size_t n = (size_t)r->program->n_values + 1;
    int *last_use = (int *)(void *)room, *group_of = last_use + n;
    block *blocks = (block *)(void *)(group_of + n);
    el_error e = *error;
    if (!find_places(r, shapes)) return el_say_no_memory(&e);
    find_nodes(r, (unsigned char *)(blocks + n));
    for (int i = 0; i < r->n_nodes; i++) {
        e.step = r->nodes[i].value - r->program->n_inputs;
        e.kind = el_kind_names[r->nodes[i].kind];
        const int bad = make_plan(shapes, r->nodes + i, &e);
        if (bad) return bad;
    }
    find_last_use(r, last_use);
    make_groups(r, last_use);
    count_in_groups(r, last_use, group_of);
    return lay_out_arena(r, last_use, blocks) ? EL_OK : el_say_no_memory(error);
}

void el_free_ready(el_ready *r) {
    for (int i = 0; r->nodes && i < r->n_nodes; i++) free(r->nodes[i].layer);
    free(r->in), free(r->values), free(r->nodes), free(r->groups);
    free(r);
}

static el_ready *new_ready(const el_program *p, const int64_t *in, int threads, int *result, const el_error *e) {
    const size_t n = (size_t)p->n_values + 1, in_bytes = 4 * sizeof *in * (size_t)p->n_inputs;
    el_ready *r = calloc(1, sizeof *r);
    el_shape *shapes = malloc(n * sizeof *shapes);
    char *room = calloc(n, 2 * sizeof(int) + sizeof(block) + 1);
    int bad = EL_NO_MEMORY;
    if (r && shapes && room) {
        r->program = p, r->threads = threads, r->instruction_set = el_active(), r->large_image = el_large_image_bytes;
        r->in = malloc(in_bytes), r->values = calloc(n, sizeof *r->values);
        r->nodes = calloc(n, sizeof *r->nodes), r->groups = calloc(n, sizeof *r->groups);
        if (r->in && r->values && r->nodes && r->groups) {
            memcpy(r->in, in, in_bytes);
            for (int i = 0; i < p->n_inputs; i++)
                shapes[i] = (el_shape){in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]};
            bad = el_infer(p, shapes, e);
            if (!bad) bad = el_lay_out_weights((el_program *)p, e);
            if (!bad) bad = fill_ready(r, shapes, room, e);
        } else {
            el_say_no_memory(e);
        }
    } else {
        el_say_no_memory(e);
    }
    free(shapes), free(room);
    if (bad && r) el_free_ready(r), r = NULL;
    *result = bad;
    return r;
}

/* Guards what is ready of all programs. A process forks only while nobody holds it, so that a child can go on. */
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

#if !defined(_WIN32) && !defined(__wasm__)
static void lock(void) { pthread_mutex_lock(&making); }
static void unlock(void) { pthread_mutex_unlock(&making); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(lock, unlock, unlock); }
#endif

/* What is ready for these sizes, which is made if need be; NULL and why otherwise. The caller holds `making`. */
static el_ready *find_ready(el_program *p, const int64_t *in, int threads, int *result, const el_error *e) {
    const int most = threads < 1 ? 1 : threads;
    el_ready *r = p->ready;
    while (r && (r->threads != most || r->instruction_set != el_active() || r->large_image != el_large_image_bytes ||
                 memcmp(r->in, in, 4 * sizeof *in * (size_t)p->n_inputs)))
        r = r->next;
    if (!r && (r = new_ready(p, in, most, result, e))) r->next = p->ready, p->ready = r;
    return r;
}

/* Free the oldest that no caller holds and no run uses, but for a few. */
static void forget_oldest(el_program *p) {
    int kept = 0;
    for (el_ready **at = &p->ready; *at;) {
        el_ready *r = *at;
        if (r->is_held || r->runs || ++kept <= MOST_KEPT) {
            at = &r->next;
            continue;
        }
        *at = r->next;
        el_free_ready(r);
    }
}

el_ready *el_make_ready(el_program *p, const int64_t *in, int threads, char *text, size_t bytes) {
    const el_error e = {text, bytes, -1, ""};
    int result = EL_OK;
    pthread_mutex_lock(&making);
    el_ready *r = find_ready(p, in, threads, &result, &e);
    if (r) r->is_held = 1;
    pthread_mutex_unlock(&making);
    return r;
}

int el_run(el_program *p, const int64_t *in, const float *const *inputs, float *const *outputs, int threads,
           char *text, size_t bytes) {
    const el_error e = {text, bytes, -1, ""};
    int result = EL_OK;
    pthread_mutex_lock(&making);
    el_ready *r = find_ready(p, in, threads, &result, &e);
    if (r) r->runs++;
    pthread_mutex_unlock(&making);
    if (!r) return result;
    result = el_run_ready(r, inputs, outputs);
    pthread_mutex_lock(&making);
    r->runs--;
    forget_oldest(p);
    pthread_mutex_unlock(&making);
    if (result == EL_NO_MEMORY) el_say_no_memory(&e);
    if (result == EL_BAD_PLAN) el_say(&e, "another instruction set was chosen meanwhile");
    return result;
}
