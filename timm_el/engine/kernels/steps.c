/* Steps that make one row from the rows it needs, and are neither convolution nor pool. */
#include "program.h"

#include <string.h>

/* A result may stand in the place of an argument, number for number: no later one depends on it. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

typedef struct {
    const el_piece *piece;
    const el_node *node;
    size_t w, c; /* of the output */
} row_job;

/* A value of one row serves all rows. */
static const float *source_row(const row_job *j, int wire, int64_t row, const el_shape **shape) {
    const int value = j->node->step->wires[wire];
    const row_view x = el_rows_of(j->piece, value);
    *shape = &j->piece->call->ready->values[value].shape;
    return row_of(&x, (*shape)->h == 1 ? 0 : (int)row);
}

/* ------------------------------------------------------------------------------------------------------------------ */

#define EACH(expression)                                     \
    INDEPENDENT for (size_t i = 0; i < n; i++) y[i] = (expression); \
    break

/* y[i] = a[i] op b[i], or op b[0] */
static void combine(int op, const float *a, const float *b, int one, size_t n, float *y) {
    const float f = *b;
    switch (one ? op + EL_BINARY_OPS : op) {
        case EL_ADD: EACH(a[i] + b[i]);
        case EL_SUB: EACH(a[i] - b[i]);
        case EL_MUL: EACH(a[i] * b[i]);
        case EL_DIV: EACH(a[i] / b[i]);
        case EL_SUB_FROM: EACH(b[i] - a[i]);
        case EL_DIV_INTO: EACH(b[i] / a[i]);
        case EL_BINARY_OPS + EL_ADD: EACH(a[i] + f);
        case EL_BINARY_OPS + EL_SUB: EACH(a[i] - f);
        case EL_BINARY_OPS + EL_MUL: EACH(a[i] * f);
        case EL_BINARY_OPS + EL_DIV: EACH(a[i] / f);
        case EL_BINARY_OPS + EL_SUB_FROM: EACH(f - a[i]);
        case EL_BINARY_OPS + EL_DIV_INTO: EACH(f / a[i]);
    }
}

/* Channel k of the first goes with channel k / (c / cb) of the second. */
static void binary_row(const row_job *j, int64_t row, float *y) {
    const el_shape *as, *bs;
    const float *a = source_row(j, 0, row, &as), *b = source_row(j, 1, row, &bs);
    const int op = j->node->step->record->ints[0];
    const size_t cb = (size_t)bs->c, share = j->c / cb;
    if (share == 1 && (size_t)bs->w == j->w) {
        combine(op, a, b, 0, j->w * j->c, y);
        return;
    }
    for (size_t x = 0; x < j->w; x++, b += bs->w == 1 ? 0 : cb)
        if (share == 1) combine(op, a + x * j->c, b, 0, j->c, y + x * j->c);
        else
            for (size_t k = 0; k < cb; k++)
                combine(op, a + x * j->c + k * share, b + k, 1, share, y + x * j->c + k * share);
}

static void unary_row(const row_job *j, int64_t row, float *y) {
    const el_step_record *s = j->node->step->record;
    const el_shape *shape;
    el_isa_active->real->unary(s->ints[0], s->constants[0], s->constants[1], source_row(j, 0, row, &shape), j->w * j->c,
                               y);
}

static void affine_row(const row_job *j, int64_t row, float *y) {
    const float *scale = j->node->step->tensors[0], *shift = j->node->step->tensors[1];
    const size_t n = j->c;
    const el_shape *shape;
    const float *x = source_row(j, 0, row, &shape);
    for (size_t at = 0; at < j->w; at++, x += n, y += n) switch ((scale ? 2 : 0) + (shift ? 1 : 0)) {
            case 3: EACH(x[i] * scale[i] + shift[i]);
            case 2: EACH(x[i] * scale[i]);
            case 1: EACH(x[i] + shift[i]);
            default: memmove(y, x, n * sizeof *y);
        }
}

static void prelu_row(const row_job *j, int64_t row, float *y) {
    const float *slope = j->node->step->tensors[0];
    const size_t n = j->c;
    const el_shape *shape;
    const float *x = source_row(j, 0, row, &shape);
    for (size_t at = 0; at < j->w; at++, x += n, y += n)
        INDEPENDENT for (size_t i = 0; i < n; i++) y[i] = x[i] >= 0.f ? x[i] : x[i] * slope[i];
}

static void norm_row(const row_job *j, int64_t row, float *y) {
    const el_program_step *s = j->node->step;
    const float *scale = s->tensors[0], *shift = s->tensors[1];
    const el_shape *shape;
    const float *x = source_row(j, 0, row, &shape);
    const size_t n = j->c / (size_t)s->record->ints[0];
    for (size_t at = 0; at < j->w; at++, x += j->c, y += j->c)
        for (size_t k = 0; k < j->c; k += n)
            el_norm(x + k, 1, j->c, (int)n, scale ? scale + k : NULL, shift ? shift + k : NULL,
                    s->record->constants[0], y + k);
}

/* ------------------------------------------------------------------------------------------------------------------ */

static void concat_row(const row_job *j, int64_t row, float *y) {
    for (int i = 0; i < j->node->step->record->n_wires; i++) {
        const el_shape *shape;
        const float *x = source_row(j, i, row, &shape);
        const size_t n = (size_t)shape->c;
        for (size_t at = 0; at < j->w; at++) memcpy(y + at * j->c, x + at * n, n * sizeof *y);
        y += n;
    }
}

static void channels_row(const row_job *j, int64_t row, float *y) {
    const el_program_step *s = j->node->step;
    const el_shape *shape;
    const float *x = source_row(j, 0, row, &shape);
    for (size_t at = 0; at < j->w; at++, x += shape->c)
        for (int i = 0; i < s->n_spans; i++) {
            const size_t n = (size_t)s->spans[i].count;
            const float *from = x + s->spans[i].from;
            if (n == 1) *y = *from;
            else memcpy(y, from, n * sizeof *y);
            y += n;
        }
}

static void pad_row(const row_job *j, int64_t row, float *y) {
    const int32_t *ints = j->node->step->record->ints;
    const float value = j->node->step->record->constants[0];
    const el_shape *s = &j->piece->call->ready->values[j->node->step->wires[0]].shape;
    const size_t left = (size_t)ints[0] * j->c, middle = (size_t)s->w * j->c;
    if (row < ints[2] || row >= ints[2] + s->h) {
        for (size_t i = 0; i < j->w * j->c; i++) y[i] = value;
        return;
    }
    const float *x = source_row(j, 0, row - ints[2], &s);
    for (size_t i = 0; i < left; i++) y[i] = value;
    memcpy(y + left, x, middle * sizeof *y);
    for (size_t i = left + middle; i < j->w * j->c; i++) y[i] = value;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Means of abs(x) of each pixel and group of the input rows that an output row needs; rows outside of the image are
 * left out, and so are they of the sum: they are zeros. */
static void scale_row(const row_job *j, int64_t row, float *y) {
    const el_plan *p = &j->node->plan;
    const el_window *k = &p->conv;
    const int groups = p->groups, cg = p->c_in / groups;
    const size_t width = (size_t)p->w * (size_t)groups;
    float *means = (float *)(void *)(j->piece->scratch + j->node->scratch_at);
    for (int ky = 0; ky < k->kh; ky++) {
        const int64_t at = row * k->sh - k->ph + (int64_t)ky * k->dh;
        if (at < 0 || at >= p->h) continue;
        const el_shape *shape;
        const float *x = source_row(j, 0, at, &shape);
        for (size_t i = 0; groups > 1 && i < width; i++)
            el_isa_active->real->abs_mean(x + i * (size_t)cg, 1, cg, means + (size_t)ky * width + i);
        if (groups == 1) el_isa_active->real->abs_mean(x, p->w, cg, means + (size_t)ky * width);
    }
    for (int ox = 0; ox < p->ow; ox++)
        for (int g = 0; g < groups; g++) {
            float sum = 0.f;
            for (int ky = 0; ky < k->kh; ky++) {
                const int64_t at = row * k->sh - k->ph + (int64_t)ky * k->dh;
                for (int kx = 0; at >= 0 && at < p->h && kx < k->kw; kx++) {
                    const int64_t x = (int64_t)ox * k->sw - k->pw + (int64_t)kx * k->dw;
                    if (x >= 0 && x < p->w)
                        sum = sum + means[(size_t)ky * width + (size_t)x * (size_t)groups + (size_t)g];
                }
            }
            *y++ = sum / (float)(k->kh * k->kw);
        }
}

size_t el_step_scratch(const el_node *s) {
    if (s->kind != EL_INPUT_SCALE) return 0;
    return (size_t)s->plan.conv.kh * (size_t)s->plan.w * (size_t)s->plan.groups * sizeof(float);
}

static void (*const row_makers[EL_KINDS])(const row_job *, int64_t, float *) = {
    [EL_BINARY] = binary_row,     [EL_UNARY] = unary_row,       [EL_AFFINE] = affine_row,
    [EL_PRELU] = prelu_row,       [EL_NORM] = norm_row,         [EL_CONCAT] = concat_row,
    [EL_CHANNELS] = channels_row, [EL_INPUT_SCALE] = scale_row, [EL_PAD] = pad_row,
};

void el_step_rows(const el_piece *piece, const el_node *node, const row_view *y, int from, int to) {
    const row_job j = {piece, node, (size_t)y->width, (size_t)y->channels};
    for (int row = from; row < to; row++) row_makers[node->kind](&j, row, row_of(y, row));
}
