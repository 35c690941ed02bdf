/* Several convolutions, a few rows of each at a time. */
#include "rows.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static size_t large_image_bytes = 1000000; /* half of what a core's second cache has these days */

void el_large_image(size_t bytes) { large_image_bytes = bytes; }

typedef struct {
    layer l[EL_MAX_CHAIN];
    size_t scratch_at[EL_MAX_CHAIN], out_at[EL_MAX_CHAIN], bytes;
    int out_rows[EL_MAX_CHAIN]; /* rows that the output buffer of a layer holds */
    int n, row_items;
    const float *x, *added;
    float *y;
    atomic_int failed;
} chain_job;

/* Input rows that output rows from .. to need. */
static void rows_for(const el_plan *p, int from, int to, int *first, int *last) {
    const el_window *w = &p->conv;
    *first = from * w->sh - w->ph;
    *last = (to - 1) * w->sh - w->ph + (w->kh - 1) * w->dh + 1;
    if (p->link) {
        int a = from, b = to;
        if (p->link_pool) {
            a = from * p->pool.sh - p->pool.ph;
            b = (to - 1) * p->pool.sh - p->pool.ph + (p->pool.kh - 1) * p->pool.dh + 1;
        }
        if (a < *first) *first = a;
        if (b > *last) *last = b;
    }
    if (*first < 0) *first = 0;
    if (*last > p->h) *last = p->h;
}

/* Input rows that any `rows` output rows need, at most. */
static int rows_span(const el_plan *p, int rows) {
    const el_window *w = &p->conv, *pool = &p->pool;
    int before = w->ph, after = (w->kh - 1) * w->dh - w->ph;
    if (p->link) {
        const int link_before = p->link_pool ? pool->ph : 0, link_after = p->link_pool ? (pool->kh - 1) * pool->dh - pool->ph : 0;
        if (link_before > before) before = link_before;
        if (link_after > after) after = link_after;
    }
    const int span = (rows - 1) * w->sh + before + after + 1;
    return span < p->h ? span : p->h;
}

/* Make output rows from .. to of layer i, and all that they need; rows that are there are kept. */
static void make_rows(chain_job *j, stage *stages, int *have, int i, int from, int to) {
    stage *s = stages + i;
    const el_plan *p = s->l->p;
    const size_t row = (size_t)p->ow * (size_t)p->c_out;
    if (i + 1 < j->n) { /* the output is a window of rows: y_row0 .. have[i] */
        if (from > s->y_row0) {
            if (have[i] > from)
                memmove(s->y, s->y + (size_t)(from - s->y_row0) * row, (size_t)(have[i] - from) * row * sizeof(float));
            else
                have[i] = from;
            s->y_row0 = from;
        }
        if (have[i] >= to) return;
        from = have[i];
        if (to - s->y_row0 > j->out_rows[i]) { /* cannot be: rows_span() says so */
            atomic_store(&j->failed, 1);
            return;
        }
    }
    if (i > 0) {
        int first, last;
        rows_for(p, from, to, &first, &last);
        make_rows(j, stages, have, i - 1, first, last);
        s->x = s->link = stages[i - 1].y;
        s->x_row0 = s->link_row0 = stages[i - 1].y_row0;
    }
    el_run_rows(s, from, to, 0, p->c_out);
    have[i] = to;
}

static void chain_piece(void *context, int item) {
    chain_job *j = context;
    const el_plan *first = j->l[0].p, *last = j->l[j->n - 1].p;
    char *scratch = el_scratch(EL_SLOT_BAND, j->bytes);
    if (!scratch) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t rows = (int64_t)last->n * last->oh;
    const int64_t from = rows * item / j->row_items, to = rows * (item + 1) / j->row_items;
    stage stages[EL_MAX_CHAIN] = {{0}};
    int have[EL_MAX_CHAIN];
    for (int64_t row = from; row < to;) {
        const size_t image = (size_t)(row / last->oh), out = image * image_size(last->oh, last->ow, last->c_out);
        const int oy0 = (int)(row % last->oh), oy1 = to - row < last->oh - oy0 ? oy0 + (int)(to - row) : last->oh;
        for (int i = 0; i < j->n; i++) {
            el_prepare(stages + i, j->l + i, scratch + j->scratch_at[i]);
            stages[i].y = (float *)(void *)(scratch + j->out_at[i]);
            stages[i].y_row0 = have[i] = 0;
        }
        stages[0].x = stages[0].link = j->x + image * image_size(first->h, first->w, first->c_in);
        stages[j->n - 1].y = j->y + out;
        if (j->added) stages[j->n - 1].added = j->added + out;
        const int step = j->l[j->n - 1].band_rows;
        for (int oy = oy0; oy < oy1; oy += step)
            make_rows(j, stages, have, j->n - 1, oy, oy + step < oy1 ? oy + step : oy1);
        row += oy1 - oy0;
    }
}

/* A few rows of each layer at a time pay where images do not fit into a core's cache and threads have rows to share. */
static int is_large(const el_plan *const *plans, int n, int threads) {
    size_t most = image_size(plans[0]->h, plans[0]->w, plans[0]->c_in);
    for (int i = 0; i < n; i++) {
        const size_t size = image_size(plans[i]->oh, plans[i]->ow, plans[i]->c_out);
        if (size > most) most = size;
    }
    for (int i = 0; i < n; i++) /* rows of input and link go hand in hand */
        if (plans[i]->link && plans[i]->conv.sh != (plans[i]->link_pool ? plans[i]->pool.sh : 1)) return 0;
    const el_plan *last = plans[n - 1];
    return most * sizeof(float) > large_image_bytes && (threads == 1 || (int64_t)last->n * last->oh >= 8 * threads);
}

static int run_as_one(const el_plan *const *plans, int n, const float *x, const float *added, float *y, int threads) {
    chain_job *j = malloc(sizeof *j);
    if (!j) return EL_NO_MEMORY;
    j->n = n;
    j->x = x;
    j->added = added;
    j->y = y;
    atomic_init(&j->failed, 0);
    int rows = 0;
    size_t at = 0;
    for (int i = n - 1; i >= 0; i--) {
        el_set_up(&j->l[i], plans[i]);
        j->scratch_at[i] = at, at += aligned(j->l[i].bytes);
        /* What layer i + 1 asks for at once, and what it may still hold of the call before. */
        j->out_at[i] = at;
        if (i + 1 < n) at += aligned((size_t)rows * (size_t)plans[i]->ow * (size_t)plans[i]->c_out * sizeof(float));
        else rows = j->l[i].band_rows;
        j->out_rows[i] = rows;
        rows = rows_span(plans[i], rows);
    }
    j->bytes = at + 64;
    const int64_t all = (int64_t)plans[n - 1]->n * plans[n - 1]->oh;
    j->row_items = (int)(all < threads ? all : threads);
    el_parallel(chain_piece, j, j->row_items, threads);
    const int failed = atomic_load(&j->failed);
    free(j);
    return failed ? EL_NO_MEMORY : EL_OK;
}

int el_chain(const el_plan *const *plans, int n, const float *x, const float *added, float *y, int threads) {
    if (n < 1 || n > EL_MAX_CHAIN || !x || !y) return EL_BAD_PLAN;
    for (int i = 0; i < n; i++) {
        const el_plan *p = plans[i], *before = plans[i ? i - 1 : 0];
        if (el_is_bad(p) || (p->link && (p->link_h != p->h || p->link_w != p->w || p->link_c != p->c_in))) return EL_BAD_PLAN;
        if (i && (p->n != before->n || p->h != before->oh || p->w != before->ow || p->c_in != before->c_out))
            return EL_BAD_PLAN;
        if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    }
    if (is_large(plans, n, threads)) return run_as_one(plans, n, x, added, y, threads);
    for (int i = 0; i < n; i++) {
        const el_plan *p = plans[i];
        float *out = y;
        if (i + 1 < n) {
            out = el_scratch(i % 2 ? EL_SLOT_ODD : EL_SLOT_EVEN,
                             (size_t)p->n * image_size(p->oh, p->ow, p->c_out) * sizeof(float));
            if (!out) return EL_NO_MEMORY;
        }
        const int failed = el_run_conv(p, i + 1 < n ? plans[i + 1] : NULL, x, x, i + 1 == n ? added : NULL, out, threads);
        if (failed) return failed;
        x = out;
    }
    return EL_OK;
}
