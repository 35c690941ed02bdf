/* The sizes of all values from those of the inputs, and the plan of each convolution and pool. */
#include "program.h"

#include <stdlib.h>
#include <string.h>

static int check_size(const el_shape *v, const el_error *e) {
    const int64_t most = EL_MAX_IMAGE_BYTES / (int64_t)sizeof(float);
    int fits =
        v->n >= 0 && v->h >= 1 && v->w >= 1 && v->c >= 1 && v->c <= EL_MAX_CHANNELS && v->h <= most && v->w <= most;
    fits = fits && v->h * v->w <= most && v->h * v->w * v->c <= most && v->n <= 0x7fffffff;
    fits = fits && v->n * (v->h * v->w * v->c) <= EL_MAX_VALUE_BYTES / (int64_t)sizeof(float);
    if (fits) return EL_OK;
    return el_say(e,
                  "found %lld images of %lld x %lld pixels of %lld channels, expected at least one pixel, at most %d "
                  "channels and %lld bytes in an image",
                  (long long)v->n, (long long)v->h, (long long)v->w, (long long)v->c, EL_MAX_CHANNELS,
                  (long long)EL_MAX_IMAGE_BYTES);
}

static int expect_channels(int64_t found, int64_t expected, const char *what, const el_error *e) {
    if (found == expected) return EL_OK;
    return el_say(e, "%s has %lld channels, expected %lld", what, (long long)found, (long long)expected);
}

/* Pixels of the output along one axis. Padding that depends on the image is as much as gives ceil(size / stride) of
 * them, the odd one after the last. With `ceil` there is one window more where pixels are left over, if it starts
 * inside the image or in the padding before it: torch's rule. */
static int window_size(int64_t size, int kernel, int stride, int dilation, int32_t *before, int end, int ceil,
                       int64_t *out, const el_error *e) {
    if (*before < 0) {
        *out = (size + stride - 1) / stride;
        const int64_t total = (*out - 1) * stride + 1 + (int64_t)(kernel - 1) * dilation - size;
        *before = total > 0 ? (int32_t)(total / 2) : 0;
        return EL_OK;
    }
    const int64_t room = size + *before + end - (int64_t)dilation * (kernel - 1) - 1 + (ceil ? stride - 1 : 0);
    if (room < 0)
        return el_say(e,
                      "found an image of %lld pixels on one side, fewer than a kernel of %d with dilation %d and this "
                      "padding covers",
                      (long long)size, kernel, dilation);
    *out = room / stride + 1;
    if (ceil && (*out - 1) * stride >= size + *before) --*out;
    return EL_OK;
}

static int window_sizes(const el_shape *x, el_window *k, const int32_t *end, int ceil, el_shape *out,
                        const el_error *e) {
    return window_size(x->h, k->kh, k->sh, k->dh, &k->ph, end[0], ceil, &out->h, e) ||
           window_size(x->w, k->kw, k->sw, k->dw, &k->pw, end[1], ceil, &out->w, e) ? EL_BAD_PLAN : EL_OK;
}

static void fill(el_plan *p, const el_shape *x, const el_shape *out) {
    p->n = (int32_t)x->n, p->h = (int32_t)x->h, p->w = (int32_t)x->w, p->c_in = (int32_t)x->c;
    p->oh = (int32_t)out->h, p->ow = (int32_t)out->w, p->c_out = (int32_t)out->c;
}

static void fill_link(el_plan *p, const el_shape *link) {
    p->link_h = (int32_t)link->h, p->link_w = (int32_t)link->w, p->link_c = (int32_t)link->c;
}

static int plan_pool(const el_program_step *s, const el_shape *x, el_shape *out, el_plan *p, const el_error *e) {
    const int32_t *ints = s->record->ints;
    el_window *k = &p->conv;
    memcpy(k, ints, sizeof *k);
    *out = *x;
    if (window_sizes(x, k, ints + EL_POOL_END, ints[EL_POOL_CEIL], out, e) || check_size(out, e)) return EL_BAD_PLAN;
    fill(p, x, out);
    fill_link(p, x);
    p->pool = *k;
    p->groups = p->real = p->is_pool = 1;
    p->link = EL_LINK_IDENTITY, p->link_pool = ints[EL_POOL_MODE], p->inverse_gamma = 1.f;
    if (el_is_bad(p))
        return el_say(e, "found an image of %lld x %lld pixels, at which a window has no pixel of it", (long long)x->h,
                      (long long)x->w);
    return EL_OK;
}

static int check_link(const el_plan *p, const el_shape *x, const el_shape *link, const el_error *e) {
    if (link->n == x->n && (p->link_pool || (link->h == p->oh && link->w == p->ow))) return EL_OK;
    return el_say(e, "the link has %lld images of %lld x %lld pixels, expected %d of %d x %d", (long long)link->n,
                  (long long)link->h, (long long)link->w, p->n, p->oh, p->ow);
}

static int plan_conv(const el_program_step *s, const el_shape *values, el_shape *out, el_plan *p, const el_error *e) {
    const int32_t *ints = s->record->ints;
    const el_shape *x = values + s->wires[0], *link = s->wires[1] < 0 ? NULL : values + s->wires[1];
    if (expect_channels(x->c, ints[EL_C_IN], "the input", e)) return EL_BAD_PLAN;
    memcpy(&p->conv, ints + EL_WINDOW, sizeof p->conv);
    *out = (el_shape){x->n, 0, 0, ints[EL_C_OUT]};
    if (window_sizes(x, &p->conv, ints + EL_PAD_END, 0, out, e) || check_size(out, e)) return EL_BAD_PLAN;
    fill(p, x, out);
    p->real = s->real, p->int8 = s->int8, p->groups = ints[EL_GROUPS], p->pad_value = ints[EL_PAD_VALUE], p->has_k = ints[EL_HAS_K],
    p->act = ints[EL_ACT];
    p->has_affine = ints[EL_HAS_AFFINE], p->has_post = ints[EL_HAS_POST];
    p->table_stride = (int32_t)(el_bytes_of_row(p->c_out) / (int64_t)sizeof(float));
    p->lo = s->record->constants[0], p->hi = s->record->constants[1], p->inverse_gamma = s->record->constants[2];
    p->table = s->tensors[1], p->threshold = s->tensors[2], p->flip = s->tensors[3];
    if (link) {
        if (expect_channels(link->c, ints[EL_LINK_C], "the link", e)) return EL_BAD_PLAN;
        p->link = ints[EL_LINK], p->link_pool = ints[EL_LINK_POOL];
        memcpy(&p->pool, ints + EL_LINK_WINDOW, sizeof p->pool);
        fill_link(p, link);
        if (check_link(p, x, link, e)) return EL_BAD_PLAN;
    }
    if (s->wires[2] >= 0 && memcmp(values + s->wires[2], out, sizeof *out)) {
        const el_shape *added = values + s->wires[2];
        return el_say(e, "what is added has shape %lld x %lld x %lld x %lld, expected %d x %d x %d x %d",
                      (long long)added->n, (long long)added->h, (long long)added->w, (long long)added->c, p->n, p->oh,
                      p->ow, p->c_out);
    }
    p->weight = s->tensors[0]; /* until it is laid out: a plan without one is bad */
    if (el_is_bad(p))
        return el_say(e, "the window of the link's pool has no pixel of its %d x %d pixels at some place", p->link_h,
                      p->link_w);
    return EL_OK;
}

static int plan_scale(const el_program_step *s, const el_shape *x, el_shape *out, el_plan *p, const el_error *e) {
    const int32_t *ints = s->record->ints;
    memcpy(&p->conv, ints, sizeof p->conv);
    p->groups = ints[EL_SCALE_GROUPS];
    *out = (el_shape){x->n, 0, 0, p->groups};
    if (x->c % p->groups)
        return el_say(e, "groups is %d, expected a divisor of %lld channels", p->groups, (long long)x->c);
    if (window_sizes(x, &p->conv, ints + EL_SCALE_END, 0, out, e) || check_size(out, e)) return EL_BAD_PLAN;
    fill(p, x, out);
    return EL_OK;
}

int el_plan_of(const el_program_step *s, const el_shape *values, el_shape *out, el_plan *p, const el_error *e) {
    const el_shape *x = values + s->wires[0];
    memset(p, 0, sizeof *p);
    switch (s->record->kind) {
        case EL_POOL: return plan_pool(s, x, out, p, e);
        case EL_INPUT_SCALE: return plan_scale(s, x, out, p, e);
        default: return plan_conv(s, values, out, p, e);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

static int is_factor(int64_t b, int64_t a) { return b == 1 || b == a; }

static int infer_binary(const el_program_step *s, const el_shape *values, el_shape *out, const el_error *e) {
    const el_shape *a = values + s->wires[0], *b = values + s->wires[1];
    *out = *a;
    if (is_factor(b->n, a->n) && is_factor(b->h, a->h) && is_factor(b->w, a->w) && a->c % b->c == 0) return EL_OK;
    return el_say(e,
                  "found %lld x %lld x %lld x %lld and %lld x %lld x %lld x %lld, expected sizes that are equal or 1, "
                  "and channels that divide those of the first",
                  (long long)a->n, (long long)a->h, (long long)a->w, (long long)a->c, (long long)b->n, (long long)b->h,
                  (long long)b->w, (long long)b->c);
}

static int infer_concat(const el_program_step *s, const el_shape *values, el_shape *out, const el_error *e) {
    for (int i = 1; i < s->record->n_wires; i++) {
        const el_shape *v = values + s->wires[i];
        if (v->n != out->n || v->h != out->h || v->w != out->w)
            return el_say(e, "source %d has %lld images of %lld x %lld pixels, expected %lld of %lld x %lld", i,
                          (long long)v->n, (long long)v->h, (long long)v->w, (long long)out->n, (long long)out->h,
                          (long long)out->w);
        out->c += v->c; /* at most 2^31 times 2^20 */
    }
    return EL_OK;
}

/* Tensors that hold a number for each channel. */
static int check_per_channel(const el_program_step *s, int64_t c, const el_error *e) {
    for (int i = 0; i < EL_TENSORS; i++)
        if (s->tensors[i] && s->bytes[i] != c * (int64_t)sizeof(float))
            return el_say(e, "tensor %d has %lld bytes, expected %lld, 4 for each channel", i, (long long)s->bytes[i],
                          (long long)(c * (int64_t)sizeof(float)));
    return EL_OK;
}

static int infer_step(const el_program_step *s, const el_shape *values, el_shape *out, const el_error *e) {
    const int32_t *ints = s->record->ints;
    el_plan plan;
    if (s->record->n_wires) *out = values[s->wires[0]];
    switch (s->record->kind) {
        case EL_CONV:
        case EL_INPUT_SCALE:
        case EL_POOL: return el_plan_of(s, values, out, &plan, e);
        case EL_MEAN: out->h = out->w = 1; break;
        case EL_BINARY: return infer_binary(s, values, out, e);
        case EL_AFFINE:
        case EL_PRELU: return check_per_channel(s, out->c, e);
        case EL_NORM:
            if (out->c % ints[0])
                return el_say(e, "groups is %d, expected a divisor of %lld channels", ints[0], (long long)out->c);
            return check_per_channel(s, out->c, e);
        case EL_CONCAT: return infer_concat(s, values, out, e);
        case EL_CHANNELS:
            if (s->last_channel >= out->c)
                return el_say(e, "index has channel %d, of %lld", s->last_channel, (long long)out->c);
            out->c = s->n_channels;
            break;
        case EL_CONST: *out = (el_shape){ints[0], ints[1], ints[2], ints[3]}; break;
        case EL_FLATTEN: out->c *= out->h * out->w, out->h = out->w = 1; break;
        case EL_PAD: out->w += (int64_t)ints[0] + ints[1], out->h += (int64_t)ints[2] + ints[3]; break;
    }
    return EL_OK;
}

static int check_inputs(const el_program *p, const el_shape *values, const el_error *e) {
    for (int i = 0; i < p->n_inputs; i++) {
        const el_input_record *r = p->inputs + i;
        const el_shape *v = values + i;
        if (v->c != r->channels || (r->height && v->h != r->height) || (r->width && v->w != r->width))
            return el_say(e, "input %d has %lld x %lld pixels of %lld channels, expected %d x %d of %d (0: any)", i,
                          (long long)v->h, (long long)v->w, (long long)v->c, r->height, r->width, r->channels);
        if (check_size(v, e)) return EL_BAD_PLAN;
    }
    return EL_OK;
}

int el_infer(const el_program *p, el_shape *values, const el_error *error) {
    el_error e = *error;
    e.step = -1;
    if (check_inputs(p, values, &e)) return EL_BAD_PLAN;
    for (int i = 0; i < p->n_steps; i++) {
        el_shape *out = values + p->n_inputs + i;
        e.step = i;
        e.kind = el_kind_names[p->steps[i].record->kind];
        if (infer_step(p->steps + i, values, out, &e) || check_size(out, &e)) return EL_BAD_PLAN;
    }
    e.step = -1;
    for (int i = 0; i < p->n_outputs; i++) {
        const el_shape *v = values + p->outputs[i].value;
        if (p->outputs[i].form == EL_FORM_ROWS && (v->h != 1 || v->w != 1))
            return el_say(&e, "output %d has %lld x %lld pixels, expected one for rows of features", i,
                          (long long)v->h, (long long)v->w);
    }
    return EL_OK;
}

static el_shape *shapes_for(const el_program *p, const int64_t *in, const el_error *e, int *result) {
    el_shape *values = malloc(((size_t)p->n_values + 1) * sizeof *values);
    *result = values ? EL_OK : el_say_no_memory(e);
    if (!values) return NULL;
    for (int i = 0; i < p->n_inputs; i++)
        values[i] = (el_shape){in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]};
    *result = el_infer(p, values, e);
    return values;
}

int el_shapes(el_program *p, const int64_t *in, int64_t *out, char *text, size_t bytes) {
    const el_error e = {text, bytes, -1, ""};
    int result;
    el_shape *values = shapes_for(p, in, &e, &result);
    for (int i = 0; result == EL_OK && i < p->n_outputs; i++) {
        const el_shape *v = values + p->outputs[i].value;
        const int64_t sizes[4] = {v->n, v->h, v->w, v->c};
        memcpy(out + 4 * i, sizes, sizeof sizes);
    }
    free(values);
    return result;
}
