/* A convolution or a pool on all threads. */
#include "rows.h"

#include <stdatomic.h>

#define FEW_PIXELS 96 /* output pixels per thread, below which threads share output channels */

typedef struct {
    const layer *l;
    const float *x, *link, *added;
    float *y;
    const el_plan *next;   /* what runs after this, or NULL */
    int row_items, splits; /* items of work: runs of rows, times ranges of channels */
    atomic_int failed;
} conv_job;

/* Run an item of work. */
static void conv_piece(void *context, int item) {
    conv_job *j = context;
    const el_plan *p = j->l->p;
    char *scratch = el_scratch(EL_SLOT_BAND, j->l->bytes);
    if (!scratch) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t rows = (int64_t)p->n * p->oh;
    const int part = item / j->splits, split = item % j->splits;
    const int64_t from = rows * part / j->row_items, to = rows * (part + 1) / j->row_items;
    const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
    const int c0 = (int)((int64_t)blocks * split / j->splits) * EL_REAL_BLOCK;
    int c1 = (int)((int64_t)blocks * (split + 1) / j->splits) * EL_REAL_BLOCK;
    if (c1 > p->c_out) c1 = p->c_out;
    stage s = {.next = {NULL, 0}};
    if (j->next && j->next->weight && item == 0) s.next = (el_prefetch){j->next->weight, el_weight_size(j->next)};
    for (int64_t row = from; row < to;) {
        const size_t image = (size_t)(row / p->oh);
        const int oy0 = (int)(row % p->oh), oy1 = to - row < p->oh - oy0 ? oy0 + (int)(to - row) : p->oh;
        el_prepare(&s, j->l, scratch);
        s.x = view_of(j->x + image * image_size(p->h, p->w, p->c_in), p->h, p->w, p->c_in);
        s.y = view_of(j->y + image * image_size(p->oh, p->ow, p->c_out), p->oh, p->ow, p->c_out);
        if (p->link)
            s.link = view_of(j->link + image * image_size(p->link_h, p->link_w, p->link_c), p->link_h, p->link_w,
                             p->link_c);
        if (j->added) s.added = view_of(j->added + image * image_size(p->oh, p->ow, p->c_out), p->oh, p->ow, p->c_out);
        el_run_rows(&s, oy0, oy1, c0, c1);
        row += oy1 - oy0;
    }
}

int el_run_layer(const layer *l, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                 int threads) {
    const el_plan *p = l->p;
    conv_job j = {.l = l, .x = x, .link = link, .added = added, .y = y, .next = next, .row_items = 1, .splits = 1};
    atomic_init(&j.failed, 0);
    /* Few pixels: threads share the output channels. Many: they share the rows. */
    const int64_t rows = (int64_t)p->n * p->oh;
    const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
    if (threads > 1) {
        if (!l->depthwise && p->groups == 1 && rows * p->ow < (int64_t)FEW_PIXELS * threads && blocks >= threads)
            j.splits = threads;
        else j.row_items = (int)(rows < threads ? rows : threads);
    }
    el_parallel(conv_piece, &j, j.row_items * j.splits, threads);
    return atomic_load(&j.failed) ? EL_NO_MEMORY : EL_OK;
}

int el_run_conv(const el_plan *p, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                int threads) {
    if (el_is_bad(p) || !x || !y || (p->link && !link)) return EL_BAD_PLAN;
    if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    layer l;
    el_set_up(&l, p);
    return el_run_layer(&l, next, x, link, added, y, threads);
}

int el_conv(const el_plan *p, const float *x, const float *link, const float *added, float *y, int threads) {
    return el_run_conv(p, NULL, x, link, added, y, threads);
}

int el_differs(const int64_t *const *places, const int64_t *expected, int n) {
    int differs = 0;
    for (int i = 0; i < n; i++) differs |= *places[i] != expected[i];
    return differs;
}

void el_nhwc(const float *nchw, int n, int c, int64_t pixels, float *nhwc) {
    for (int i = 0; i < n; i++, nchw += (int64_t)c * pixels)
        for (int64_t p = 0; p < pixels; p++)
            for (int k = 0; k < c; k++) *nhwc++ = nchw[k * pixels + p];
}
