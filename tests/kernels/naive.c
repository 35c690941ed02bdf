/* The interpreter: every number from its formula, one after the other. */
#include "net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static float *pixel(const image *v, int64_t n, int64_t y, int64_t x) {
    return v->at + ((n * v->h + y) * v->w + x) * v->c;
}

static image make(int64_t n, int64_t h, int64_t w, int64_t c) {
    image v = {n, h, w, c, NULL};
    if (n >= 0 && h >= 1 && w >= 1 && n * h * w * c <= 1 << 20) v.at = malloc((size_of(&v) + 1) * sizeof(float));
    return v;
}

/* For all pixels of an image y. */
#define PIXELS(v)                                  \
    for (int64_t b = 0; b < (v)->n; b++)           \
        for (int64_t oy = 0; oy < (v)->h; oy++)    \
            for (int64_t ox = 0; ox < (v)->w; ox++)

/* ------------------------------------------------------------------------------------------------------------------ */

static double naive_exp(double x) {
    if (x < -700) x = -700;
    if (x > 700) x = 700;
    if (isnan(x)) return x;
    const double k = rint(x * 1.4426950408889634);
    double r = x - k * 0.6931471803691238;
    r = r - k * 1.9082149292705877e-10;
    double factorials[12] = {1}, p;
    for (int i = 1; i < 12; i++) factorials[i] = factorials[i - 1] * i;
    p = 1. / factorials[11];
    for (int i = 10; i >= 0; i--) p = p * r, p = p + 1. / factorials[i];
    return ldexp(p, (int)k);
}

static double naive_erfc(double z) {
    static const double c[] = {-1.26551223, 1.00002368,  .37409196,  .09678418,  -.18628806,
                               .27886807,   -1.13520398, 1.48851587, -.82215223, .17087277};
    const double t = 1 / (1 + 0.5 * fabs(z));
    double poly = c[9];
    for (int i = 8; i >= 0; i--) poly = t * poly, poly = c[i] + poly;
    double power = -z * z;
    power = power + poly;
    const double v = t * naive_exp(power);
    return z >= 0 ? v : 2 - v;
}

static double naive_tanh(double x) { return 1 - 2 / (naive_exp(2 * x) + 1); }

static double hard(double x) {
    x = x / 6, x = x + 0.5;
    return x < 0 ? 0 : x > 1 ? 1 : x;
}

static float naive_unary(const el_step_record *s, float f) {
    const double x = f, e = naive_exp(x);
    const float a = s->constants[0], b = s->constants[1];
    double n, y;
    switch (s->ints[0]) {
        case EL_CLIP: f = f < a ? a : f; return f > b ? b : f;
        case EL_LEAKY: return f >= 0 ? f : f * a;
        case EL_ABS: return f < 0 || (f == 0 && signbit(f)) ? -f : f;
        case EL_SIGMOID: return (float)(1 / (1 + naive_exp(-x)));
        case EL_SILU: return (float)(x / (1 + naive_exp(-x)));
        case EL_HARDSIGMOID: return (float)hard(x);
        case EL_HARDSWISH: return (float)(x * hard(x));
        case EL_GELU: y = x * 0.5, y = y * naive_erfc(-x * 0.70710678118654752); return (float)y;
        case EL_GELU_TANH:
            n = x * x, n = n * x, n = 0.044715 * n, n = x + n, n = 0.7978845608028654 * n;
            y = x * 0.5, y = y * (1 + naive_tanh(n));
            return (float)y;
        case EL_TANH: return (float)naive_tanh(x);
        case EL_ELU: return (float)(x > 0 ? x : (double)a * (e - 1));
        case EL_MISH: n = e * e, n = n + 2 * e, y = x * n, y = y / (n + 2); return (float)(x > 20 ? x : y);
        case EL_EXP: return (float)e;
        case EL_SQRT: return (float)sqrt(x);
        default: return f * f;
    }
}

static float naive_binary(int op, float a, float b) {
    switch (op) {
        case EL_ADD: return a + b;
        case EL_SUB: return a - b;
        case EL_MUL: return a * b;
        case EL_DIV: return a / b;
        case EL_SUB_FROM: return b - a;
        default: return b / a;
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t k[2], s[2], p[2], d[2], end[2];
} window;

static window window_of(const int32_t *ints, const int32_t *end) {
    window w;
    for (int i = 0; i < 2; i++)
        w.k[i] = ints[i], w.s[i] = ints[2 + i], w.p[i] = ints[4 + i], w.d[i] = ints[6 + i],
        w.end[i] = end ? end[i] : 0;
    return w;
}

static int64_t size_along(window *w, int i, int64_t size, int ceil) {
    if (w->p[i] < 0) {
        const int64_t out = (size + w->s[i] - 1) / w->s[i],
                      total = (out - 1) * w->s[i] + (w->k[i] - 1) * w->d[i] + 1 - size;
        w->p[i] = total < 0 ? 0 : total / 2;
        return out;
    }
    const double room = (double)(size + w->p[i] + w->end[i] - w->d[i] * (w->k[i] - 1) - 1) / (double)w->s[i];
    int64_t out = (int64_t)(ceil ? -floor(-room) : floor(room)) + 1;
    if (ceil && (out - 1) * w->s[i] >= size + w->p[i]) out--;
    return out;
}

/* Pixels of a window inside of an image, in order. */
static int inside(const image *x, const window *w, int64_t b, int64_t oy, int64_t ox, const float **pixels) {
    int n = 0;
    for (int64_t ky = 0; ky < w->k[0]; ky++)
        for (int64_t kx = 0; kx < w->k[1]; kx++) {
            const int64_t iy = oy * w->s[0] - w->p[0] + ky * w->d[0], ix = ox * w->s[1] - w->p[1] + kx * w->d[1];
            if (iy >= 0 && iy < x->h && ix >= 0 && ix < x->w) pixels[n++] = pixel(x, b, iy, ix);
        }
    return n;
}

/* 0 if a window has no pixel. */
static int pool_into(const image *x, const window *w, int mode, image *y) {
    const float *pixels[EL_MAX_POOL];
    PIXELS(y) {
        const int n = inside(x, w, b, oy, ox, pixels);
        if (!n) return 0;
        for (int64_t c = 0; c < y->c; c++) {
            float v = pixels[0][c];
            for (int i = 1; i < n; i++)
                if (mode == EL_POOL_AVG) v = v + pixels[i][c];
                else if (pixels[i][c] > v || isnan(pixels[i][c])) v = pixels[i][c];
            pixel(y, b, oy, ox)[c] = mode == EL_POOL_AVG ? v / (float)n : v;
        }
    }
    return 1;
}

static image naive_pool(const image *x, const window *of, int mode, int64_t h, int64_t w) {
    image y = make(x->n, h, w, x->c);
    if (y.at && !pool_into(x, of, mode, &y)) free(y.at), y.at = NULL;
    return y;
}

static float abs_mean(const float *x, int64_t c) {
    float lanes[16] = {0};
    for (int64_t i = 0; i < c; i++) lanes[i % 16] += fabsf(x[i]);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0] / (float)c;
}

static float input_scale(const image *x, const window *w, int64_t b, int64_t oy, int64_t ox, int64_t from,
                         int64_t channels) {
    const float *pixels[EL_MAX_TAPS];
    const int n = inside(x, w, b, oy, ox, pixels);
    float sum = 0;
    for (int i = 0; i < n; i++) sum = sum + abs_mean(pixels[i] + from, channels);
    return sum / (float)(w->k[0] * w->k[1]);
}

/* The weight of output channel o, tap t, input channel i of the group, as layout.py stores it: a number, or a bit. */
static float weight_at(const el_step_record *s, const void *stored, int real, int64_t o, int64_t t, int64_t i) {
    const int64_t c_in = s->ints[EL_C_IN], c_out = s->ints[EL_C_OUT], groups = s->ints[EL_GROUPS],
                  taps = s->ints[2] * s->ints[3];
    const int64_t cg = c_in / groups, og = c_out / groups, words = (cg + 63) / 64, g = o / og, k = o % og;
    const int depthwise = groups > 1 && groups == c_in && c_in == c_out;
    if (real)
        return ((const float *)stored)[depthwise ? t * ((c_out + 15) / 16 * 16) + o
                                                 : (o / 64 * taps * cg + t * cg + i) * 64 + o % 64];
    const uint8_t *bytes = stored;
    const int64_t at =
        depthwise ? t * ((c_out + 63) / 64 * 8) + o / 8
                  : ((g * ((og + 7) / 8) + k / 8) * taps * words + t * words + i / 64) * 64 + k % 8 * 8 + i % 64 / 8;
    return bytes[at] >> ((depthwise ? o : i) % 8) & 1 ? 1 : -1;
}

static float link_of(const image *l, int kind, int64_t b, int64_t oy, int64_t ox, int64_t c, int64_t c_out) {
    const float *x = pixel(l, b, oy, ox);
    if (kind != EL_LINK_SQUEEZE) return x[c % l->c];
    float v = x[c];
    for (int64_t j = c_out; j < l->c; j += c_out) v = v + (j + c < l->c ? x[j + c] : 0);
    return v;
}

/* 127 / m for the inputs that share a scale with an output pixel, or 0 if they are taken for zeros; the scale. */
static float int8_inverse(const image *x, const window *w, int64_t b, int64_t oy, int64_t ox, float *k) {
    const int one = w->k[0] * w->k[1] == 1;
    const int64_t column = ox * w->s[1] - w->p[1], first = one ? column : 0, last = one ? column : x->w - 1;
    float m = 0;
    for (int64_t t = 0; t < w->k[0]; t++) {
        const int64_t iy = oy * w->s[0] - w->p[0] + t * w->d[0];
        for (int64_t ix = first; iy >= 0 && iy < x->h && ix >= 0 && ix < x->w && ix <= last; ix++)
            for (int64_t i = 0; i < x->c; i++) {
                const float a = fabsf(pixel(x, b, iy, ix)[i]);
                if (isnan(a)) return *k = NAN, 0;
                if (a > m) m = a;
            }
    }
    const float inverse = 127.f / m;
    *k = isinf(m) ? NAN : isinf(inverse) ? 0 : m / 127.f;
    return isinf(m) || isinf(inverse) ? 0 : inverse;
}

static float finish(const el_step_record *s, const float *table, float v, float k, float link, int64_t c) {
    const int64_t stride = (s->ints[EL_C_OUT] + 30) / 16 * 16;
    const float *row = table + c + stride;
#define NEXT (row += stride, row[-stride])
    v = v * k;
    v = v + NEXT;
    if (s->ints[EL_ACT] == EL_ACT_CLIP)
        v = v < s->constants[0] ? s->constants[0] : v, v = v > s->constants[1] ? s->constants[1] : v;
    if (s->ints[EL_ACT] == EL_ACT_PRELU) {
        const float slope = NEXT;
        v = v >= 0 ? v : v * slope;
    }
    if (s->ints[EL_HAS_AFFINE]) v = v * NEXT, v = v + NEXT;
    if (s->ints[EL_LINK]) link = link * s->constants[2], v = v + link;
    if (s->ints[EL_HAS_POST]) {
        v = v + NEXT;
        const float slope = NEXT;
        v = v >= 0 ? v : v * slope;
        v = v + NEXT;
    }
#undef NEXT
    return v;
}

/* The dot product of one output, before its scale. */
static float dot_of(const net *n, const el_step_record *s, const image *x, const window *w, int64_t b, int64_t oy,
                    int64_t ox, int64_t o, float *k) {
    const int int8 = n->tensors[s->tensors[0]].dtype == EL_INT8;
    const float inverse = int8 ? int8_inverse(x, w, b, oy, ox, k) : 0;
    int64_t sum = 0;
    const int real = n->tensors[s->tensors[0]].dtype == EL_FLOAT32;
    const void *weight = n->data[s->tensors[0]];
    const float *threshold = s->tensors[2] < 0 ? NULL : n->data[s->tensors[2]];
    const uint32_t *flip = s->tensors[3] < 0 ? NULL : n->data[s->tensors[3]];
    const int64_t cg = s->ints[EL_C_IN] / s->ints[EL_GROUPS],
                  first = o / (s->ints[EL_C_OUT] / s->ints[EL_GROUPS]) * cg;
    float v = 0;
    for (int64_t t = 0; t < w->k[0] * w->k[1]; t++) {
        const int64_t iy = oy * w->s[0] - w->p[0] + t / w->k[1] * w->d[0],
                      ix = ox * w->s[1] - w->p[1] + t % w->k[1] * w->d[1];
        const int is_in = iy >= 0 && iy < x->h && ix >= 0 && ix < x->w;
        for (int64_t i = 0; i < cg; i++) {
            float value = is_in ? pixel(x, b, iy, ix)[first + i] : 0;
            if (int8) {
                const int8_t by = ((const int8_t *)weight)[(o * w->k[0] * w->k[1] + t) * cg + i];
                sum += inverse > 0 ? (int64_t)nearbyintf(value * inverse) * by : 0;
                continue;
            }
            if (real) {
                v = fmaf(value, weight_at(s, weight, 1, o, t, i), v);
                continue;
            }
            if (flip && flip[first + i]) value = -value;
            const float sign = !is_in                                            ? (float)s->ints[EL_PAD_VALUE]
                               : value >= (threshold ? threshold[first + i] : 0) ? 1
                                                                                 : -1;
            v = v + sign * weight_at(s, weight, 0, o, t, i);
        }
    }
    return int8 ? (float)sum : v;
}

static image naive_conv(const net *n, const el_step_record *s, const image *values) {
    const int32_t *wires = n->wires + s->first_wire;
    const image *x = values + wires[0], *added = wires[2] < 0 ? NULL : values + wires[2];
    const float *table = n->data[s->tensors[1]];
    const int real = n->tensors[s->tensors[0]].dtype == EL_FLOAT32;
    window w = window_of(s->ints + EL_WINDOW, s->ints + EL_PAD_END);
    const int64_t h = size_along(&w, 0, x->h, 0), width = size_along(&w, 1, x->w, 0);
    image y = make(x->n, h, width, s->ints[EL_C_OUT]), pooled = {0};
    const image *link = wires[1] < 0 ? NULL : values + wires[1];
    if (y.at && link && s->ints[EL_LINK_POOL]) {
        const window of = window_of(s->ints + EL_LINK_WINDOW, NULL);
        pooled = naive_pool(link, &of, s->ints[EL_LINK_POOL], y.h, y.w);
        link = &pooled;
    }
    int fits = y.at && (!link || (link->at && link->h == y.h && link->w == y.w && link->n == y.n));
    fits = fits && (!added || (added->n == y.n && added->h == y.h && added->w == y.w && added->c == y.c));
    if (!fits) free(y.at), y.at = NULL;
    if (fits) PIXELS(&y) for (int64_t c = 0; c < y.c; c++) {
            float k = s->ints[EL_HAS_K] ? input_scale(x, &w, b, oy, ox, 0, x->c) : 1;
            const float dot = dot_of(n, s, x, &w, b, oy, ox, c, &k);
            const float l = link ? link_of(link, s->ints[EL_LINK], b, oy, ox, c, y.c) : 0;
            float v = finish(s, table, real ? dot : dot * table[c], k, l, c);
            if (added) v = v + pixel(added, b, oy, ox)[c];
            pixel(&y, b, oy, ox)[c] = v;
    }
    free(pooled.at);
    return y;
}

/* ------------------------------------------------------------------------------------------------------------------ */

static image naive_norm(const el_step_record *s, const image *x, const float *scale, const float *shift) {
    image y = make(x->n, x->h, x->w, x->c);
    const int64_t n = x->c / s->ints[0], pixels = s->ints[1] ? x->h * x->w : 1, parts = x->n * x->h * x->w / pixels;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t g = 0; g < s->ints[0]; g++) {
            const float *from = x->at + part * pixels * x->c + g * n;
            float *to = y.at + part * pixels * x->c + g * n;
            double stats[2] = {0, 0};
            for (int square = 0; square < 2; square++) {
                double lanes[8] = {0};
                for (int64_t p = 0; p < pixels; p++)
                    for (int64_t k = 0; k < n; k++) {
                        const double d = (double)from[p * x->c + k] - stats[0];
                        lanes[k % 8] += square ? d * d : from[p * x->c + k];
                    }
                stats[square] = (((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                                 ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])));
                stats[square] /= (double)(pixels * n);
            }
            for (int64_t p = 0; p < pixels; p++)
                for (int64_t k = 0; k < n; k++) {
                    double v = ((double)from[p * x->c + k] - stats[0]) / sqrt(stats[1] + (double)s->constants[0]);
                    if (scale) v = v * scale[g * n + k];
                    if (shift) v = v + shift[g * n + k];
                    to[p * x->c + k] = (float)v;
                }
        }
    return y;
}

static image naive_mean(const image *x) {
    image y = make(x->n, 1, 1, x->c);
    for (int64_t b = 0; b < x->n; b++)
        for (int64_t c = 0; c < x->c; c++) {
            double sum = 0;
            for (int64_t p = 0; p < x->h * x->w; p++) sum = sum + pixel(x, b, 0, p)[c];
            y.at[b * x->c + c] = (float)(sum / (double)(x->h * x->w));
        }
    return y;
}

static image naive_concat(const net *n, const el_step_record *s, const image *values) {
    const int32_t *wires = n->wires + s->first_wire;
    image y = values[wires[0]];
    for (int i = 1; i < s->n_wires; i++) y.c += values[wires[i]].c;
    y = make(y.n, y.h, y.w, y.c);
    PIXELS(&y) {
        float *to = pixel(&y, b, oy, ox);
        for (int i = 0; i < s->n_wires; to += values[wires[i++]].c)
            memcpy(to, pixel(values + wires[i], b, oy, ox), (size_t)values[wires[i]].c * sizeof *to);
    }
    return y;
}

/* What goes number by number. */
static image naive_each(const net *n, const el_step_record *s, const image *values) {
    const int32_t *wires = n->wires + s->first_wire;
    const image *x = values + wires[0], *other = s->kind == EL_BINARY ? values + wires[1] : NULL;
    const float *t[2];
    for (int i = 0; i < 2; i++) t[i] = s->tensors[i] < 0 ? NULL : n->data[s->tensors[i]];
    image y = make(x->n, x->h, x->w, x->c);
    PIXELS(&y) for (int64_t c = 0; c < y.c; c++) {
        float v = pixel(x, b, oy, ox)[c];
        if (s->kind == EL_UNARY) v = naive_unary(s, v);
        if (s->kind == EL_PRELU) v = v >= 0 ? v : v * t[0][c];
        if (s->kind == EL_AFFINE && t[0]) v = v * t[0][c];
        if (s->kind == EL_AFFINE && t[1]) v = v + t[1][c];
        if (other)
            v = naive_binary(s->ints[0], v,
                             pixel(other, other->n == 1 ? 0 : b, other->h == 1 ? 0 : oy,
                                   other->w == 1 ? 0 : ox)[c / (y.c / other->c)]);
        pixel(&y, b, oy, ox)[c] = v;
    }
    return y;
}

static image naive_channels(const image *x, const int32_t *index, int64_t n) {
    image y = make(x->n, x->h, x->w, n);
    PIXELS(&y) for (int64_t c = 0; c < n; c++) pixel(&y, b, oy, ox)[c] = pixel(x, b, oy, ox)[index[c]];
    return y;
}

static image naive_scale(const el_step_record *s, const image *x) {
    window w = window_of(s->ints, s->ints + EL_SCALE_END);
    const int64_t groups = s->ints[EL_SCALE_GROUPS], h = size_along(&w, 0, x->h, 0),
                  width = size_along(&w, 1, x->w, 0);
    image y = make(x->n, h, width, groups);
    if (y.at) PIXELS(&y) for (int64_t g = 0; g < groups; g++)
        pixel(&y, b, oy, ox)[g] = input_scale(x, &w, b, oy, ox, g * (x->c / groups), x->c / groups);
    return y;
}

static image naive_flatten(const image *x) {
    image y = make(x->n, 1, 1, x->c * x->h * x->w);
    for (int64_t b = 0; b < x->n; b++)
        for (int64_t c = 0; c < x->c; c++)
            for (int64_t p = 0; p < x->h * x->w; p++) y.at[b * y.c + c * x->h * x->w + p] = pixel(x, b, 0, p)[c];
    return y;
}

static image naive_pad(const el_step_record *s, const image *x) {
    image y = make(x->n, x->h + s->ints[2] + s->ints[3], x->w + s->ints[0] + s->ints[1], x->c);
    PIXELS(&y) for (int64_t c = 0; c < y.c; c++) {
        const int64_t iy = oy - s->ints[2], ix = ox - s->ints[0];
        pixel(&y, b, oy, ox)[c] =
            iy < 0 || iy >= x->h || ix < 0 || ix >= x->w ? s->constants[0] : pixel(x, b, iy, ix)[c];
    }
    return y;
}

image naive_step(const net *n, const el_step_record *s, const image *values) {
    const image *x = s->n_wires ? values + n->wires[s->first_wire] : NULL;
    const void *t[EL_TENSORS];
    for (int i = 0; i < EL_TENSORS; i++) t[i] = s->tensors[i] < 0 ? NULL : n->data[s->tensors[i]];
    switch (s->kind) {
        case EL_CONV: return naive_conv(n, s, values);
        case EL_POOL: {
            window w = window_of(s->ints, s->ints + EL_POOL_END);
            const int64_t h = size_along(&w, 0, x->h, s->ints[EL_POOL_CEIL]),
                          width = size_along(&w, 1, x->w, s->ints[EL_POOL_CEIL]);
            return naive_pool(x, &w, s->ints[EL_POOL_MODE], h, width);
        }
        case EL_MEAN: return naive_mean(x);
        case EL_NORM: return naive_norm(s, x, t[0], t[1]);
        case EL_CONCAT: return naive_concat(n, s, values);
        case EL_CHANNELS: return naive_channels(x, t[0], (int64_t)n->tensors[s->tensors[0]].bytes / 4);
        case EL_CONST: {
            image y = make(s->ints[0], s->ints[1], s->ints[2], s->ints[3]);
            memcpy(y.at, t[0], size_of(&y) * sizeof(float));
            return y;
        }
        case EL_INPUT_SCALE: return naive_scale(s, x);
        case EL_FLATTEN: return naive_flatten(x);
        case EL_PAD: return naive_pad(s, x);
        default: return naive_each(n, s, values);
    }
}
