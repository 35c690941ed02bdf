/* Several convolutions and pools, each of a value that x or a step before it gives. */
#include "rows.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define RUN_BYTES 1500000 /* rows that a run keeps: they shall stay in a core's second cache */
#define FIRST_VALUE 2     /* value 0 is x, value 1 the caller's other tensor */

extern size_t el_large_image_bytes; /* ready.c */

/* Output rows a .. b - 1 need rows a * stride - before .. (b - 1) * stride + after of a value; stride 0: none. */
typedef struct {
    int stride, before, after;
} reach;

/* Steps that go together, a few rows of each at a time. Of what lies between them only the rows that are still needed are
 * kept, in a ring. */
typedef struct {
    const el_step *steps;
    int n, first; /* how many, and which value the first of them gives */
    const float *const *values;
    float *y;
    layer l[EL_MAX_RUN];
    reach need[EL_MAX_RUN]; /* of what a step gives */
    int ring[EL_MAX_RUN];
    size_t scratch_at[EL_MAX_RUN], ring_at[EL_MAX_RUN], bytes;
    int row_items;
    atomic_int failed;
} run;

/* Add to the reach of a value that of `need`, through a window; 0 if rows do not go hand in hand. */
static int extend(reach *r, reach need, const el_window *w) {
    const int before = need.before * w->sh + w->ph, after = need.after * w->sh + (w->kh - 1) * w->dh - w->ph;
    if (r->stride && r->stride != need.stride * w->sh) return 0;
    if (!r->stride || before > r->before) r->before = before;
    if (!r->stride || after > r->after) r->after = after;
    r->stride = need.stride * w->sh;
    return 1;
}

/* Steps from .. to as a run; 0 if they cannot be one, or keep too many rows. */
static int lay_out(run *r, const el_step *steps, int from, int to) {
    static const el_window one = {.kh = 1, .kw = 1, .sh = 1, .sw = 1, .dh = 1, .dw = 1};
    const int n = to - from;
    if (n < 2 || n > EL_MAX_RUN) return 0;
    r->steps = steps + from;
    r->n = n;
    r->first = from + FIRST_VALUE;
    memset(r->need, 0, sizeof r->need);
    r->need[n - 1].stride = 1;
    size_t kept = 0;
    r->bytes = 0;
    for (int i = n - 1; i >= 0; i--) {
        const el_plan *p = r->steps[i].plan;
        const reach need = r->need[i];
        const int source = r->steps[i].source - r->first, added = r->steps[i].added - r->first;
        if (source >= 0 && !extend(&r->need[source], need, &p->conv)) return 0;
        if (source >= 0 && p->link && !extend(&r->need[source], need, p->link_pool ? &p->pool : &one)) return 0;
        if (added >= 0 && !extend(&r->need[added], need, &one)) return 0;
        el_set_up(&r->l[i], p);
        r->scratch_at[i] = r->bytes, r->bytes += aligned(r->l[i].bytes);
        r->ring_at[i] = r->bytes;
        r->ring[i] = p->oh;
        if (i == n - 1) continue;
        const int rows = (r->l[n - 1].band_rows - 1) * need.stride + need.before + need.after + 1;
        if (rows < p->oh) r->ring[i] = rows < 1 ? 1 : rows;
        const size_t size = aligned(image_size(r->ring[i], p->ow, p->c_out) * sizeof(float));
        r->bytes += size;
        kept += size;
    }
    return kept <= RUN_BYTES;
}

static void run_piece(void *context, int item) {
    run *r = context;
    const el_plan *last = r->steps[r->n - 1].plan;
    char *scratch = el_scratch(EL_SLOT_BAND, r->bytes + 64);
    if (!scratch) {
        atomic_store(&r->failed, 1);
        return;
    }
    const int64_t rows = (int64_t)last->n * last->oh;
    const int64_t from = rows * item / r->row_items, to = rows * (item + 1) / r->row_items;
    stage stages[EL_MAX_RUN] = {{0}};
    int have[EL_MAX_RUN]; /* rows before this one were made */
    for (int64_t row = from; row < to;) {
        const size_t image = (size_t)(row / last->oh);
        const int oy0 = (int)(row % last->oh), oy1 = to - row < last->oh - oy0 ? oy0 + (int)(to - row) : last->oh;
        for (int i = 0; i < r->n; i++) {
            const el_plan *p = r->steps[i].plan;
            const int source = r->steps[i].source, added = r->steps[i].added;
            stage *s = stages + i;
            el_prepare(s, r->l + i, scratch + r->scratch_at[i]);
            s->y = i + 1 < r->n ? view_of((float *)(void *)(scratch + r->ring_at[i]), r->ring[i], p->ow, p->c_out)
                                : view_of(r->y + image * image_size(p->oh, p->ow, p->c_out), p->oh, p->ow, p->c_out);
            s->x = source < r->first ? view_of(r->values[source] + image * image_size(p->h, p->w, p->c_in), p->h, p->w, p->c_in)
                                     : stages[source - r->first].y;
            s->link = s->x;
            if (added >= 0)
                s->added = added < r->first ? view_of(r->values[added] + image * image_size(p->oh, p->ow, p->c_out), p->oh, p->ow, p->c_out)
                                            : stages[added - r->first].y;
            have[i] = 0;
        }
        const int step = r->l[r->n - 1].band_rows;
        for (int oy = oy0; oy < oy1; oy += step) {
            const int end = oy + step < oy1 ? oy + step : oy1;
            for (int i = 0; i < r->n; i++) {
                const reach need = r->need[i];
                const int height = r->steps[i].plan->oh, a = oy * need.stride - need.before, b = (end - 1) * need.stride + need.after + 1;
                if (a > have[i]) have[i] = a;
                if (have[i] >= (b < height ? b : height)) continue;
                el_run_rows(stages + i, have[i], b < height ? b : height, 0, r->steps[i].plan->c_out);
                have[i] = b < height ? b : height;
            }
        }
        row += oy1 - oy0;
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* The nearest step after `to` at which a run that starts with `from` can end: of what it makes before, nobody later reads. */
static int next_end(const int *last_use, int from, int to) {
    int end = to + 1;
    for (int i = from; i + 1 < end; i++)
        if (last_use[i + FIRST_VALUE] >= end) end = last_use[i + FIRST_VALUE] + 1;
    return end;
}

/* A few rows of each step at a time pay where images do not fit into a core's cache and threads have rows to share. */
static int is_large(const el_step *steps, int from, int to, int threads) {
    const el_plan *last = steps[to - 1].plan;
    size_t most = 0;
    for (int i = from; i < to; i++) {
        const size_t size = image_size(steps[i].plan->oh, steps[i].plan->ow, steps[i].plan->c_out);
        if (size > most) most = size;
    }
    return most * sizeof(float) > el_large_image_bytes && (threads == 1 || (int64_t)last->n * last->oh >= 8 * threads);
}

static int same_size(const el_plan *p, int n, int h, int w, int c) { return p->n == n && p->oh == h && p->ow == w && p->c_out == c; }

/* Every step's values are there and have its shapes; when each is used last. */
static int is_bad_chain(const el_step *steps, int n, const float *other, int *last_use) {
    const el_plan *first = steps[0].plan;
    for (int i = 0; i < n + FIRST_VALUE; i++) last_use[i] = -1;
    for (int i = 0; i < n; i++) {
        const el_plan *p = steps[i].plan;
        const int source = steps[i].source, added = steps[i].added;
        if (el_is_bad(p) || (p->link && (p->link_h != p->h || p->link_w != p->w || p->link_c != p->c_in))) return 1;
        if (source < 0 || source == 1 || source >= i + FIRST_VALUE || added < -1 || added >= i + FIRST_VALUE) return 1;
        if (source == 0 && (p->n != first->n || p->h != first->h || p->w != first->w || p->c_in != first->c_in)) return 1;
        if (source && !same_size(steps[source - FIRST_VALUE].plan, p->n, p->h, p->w, p->c_in)) return 1;
        if (added == 0 && !same_size(p, first->n, first->h, first->w, first->c_in)) return 1;
        if (added == 1 && !other) return 1;
        if (added >= FIRST_VALUE && !same_size(steps[added - FIRST_VALUE].plan, p->n, p->oh, p->ow, p->c_out)) return 1;
        if (added >= 0 && p->is_pool) return 1;
        last_use[source] = i;
        if (added >= 0) last_use[added] = i;
    }
    for (int i = 0; i + 1 < n; i++)
        if (last_use[i + FIRST_VALUE] < 0) return 1;
    return steps[0].source != 0;
}

/* Memory for what step i gives: y if it is the last, else that of a value which nobody needs any more. */
static float *memory_for(const el_step *steps, int n, int i, const int *last_use, int *held, int from, float *y) {
    const el_plan *p = steps[i].plan;
    if (i == n - 1) return y;
    for (int slot = 0; slot < EL_MAX_VALUES; slot++)
        if (held[slot] < 0 || last_use[held[slot]] < from) {
            held[slot] = i + FIRST_VALUE;
            return el_scratch(EL_SLOT_VALUES + slot, (size_t)p->n * image_size(p->oh, p->ow, p->c_out) * sizeof(float));
        }
    return NULL;
}

static int run_all(const el_step *steps, int n, const float **values, const int *last_use, float *y, int threads) {
    int held[EL_MAX_VALUES], failed = EL_OK;
    for (int i = 0; i < EL_MAX_VALUES; i++) held[i] = -1;
    run *r = el_scratch(EL_SLOT_RUN, sizeof *r);
    if (!r) return EL_NO_MEMORY;
    for (int from = 0, to; from < n && !failed; from = to) {
        to = next_end(last_use, from, from);
        int large = is_large(steps, from, to, threads);
        while (large && to < n) {
            const int next = next_end(last_use, from, to);
            if (!is_large(steps, to, next, threads) || !lay_out(r, steps, from, next)) break;
            to = next;
        }
        const int together = large && lay_out(r, steps, from, to);
        for (int i = together ? to - 1 : from; i < to && !failed; i++) {
            const el_plan *p = steps[i].plan;
            float *out = memory_for(steps, n, i, last_use, held, together ? from : i, y);
            if (!out) return EL_NO_MEMORY;
            if (together) {
                const int64_t rows = (int64_t)p->n * p->oh;
                r->values = values;
                r->y = out;
                r->row_items = (int)(rows < threads ? rows : threads);
                atomic_init(&r->failed, 0);
                el_parallel(run_piece, r, r->row_items, threads);
                failed = atomic_load(&r->failed) ? EL_NO_MEMORY : EL_OK;
            } else {
                const float *x = values[steps[i].source], *added = steps[i].added < 0 ? NULL : values[steps[i].added];
                failed = el_run_conv(p, i + 1 < n ? steps[i + 1].plan : NULL, x, x, added, out, threads);
            }
            values[i + FIRST_VALUE] = out;
        }
    }
    return failed;
}

int el_chain(const el_step *steps, int n, const float *x, const float *other, float *y, int threads) {
    if (n < 1 || !steps || !x || !y) return EL_BAD_PLAN;
    const size_t count = (size_t)n + FIRST_VALUE;
    const float **values = calloc(count, sizeof *values + sizeof(int));
    if (!values) return EL_NO_MEMORY;
    int *last_use = (int *)(void *)(values + count), result = EL_BAD_PLAN;
    values[0] = x;
    values[1] = other;
    if (!is_bad_chain(steps, n, other, last_use)) {
        const el_plan *last = steps[n - 1].plan;
        result = (int64_t)last->n * last->oh * last->ow > 0 ? run_all(steps, n, values, last_use, y, threads) : EL_OK;
    }
    free(values);
    return result;
}
