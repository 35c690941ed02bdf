/* Steps that need whole images: means and norms over pixels, and rows of features. Each unit of work has a fixed order
 * of sums, so that the number of threads changes nothing. */
#include "program.h"

#include <math.h>
#include <string.h>

#define BLOCK 64 /* channels of a unit */

int el_is_over_images(const el_program_step *s) {
    const int kind = s->record->kind;
    return kind == EL_MEAN || kind == EL_FLATTEN || (kind == EL_NORM && s->record->ints[1]);
}

static int64_t units_of_image(const el_node *s, const el_value *values) {
    if (s->kind == EL_NORM) return s->step->record->ints[0];
    return (values[s->step->wires[0]].shape.c + BLOCK - 1) / BLOCK;
}

int64_t el_units(const el_node *s, const el_value *values) {
    return values[s->value].shape.n * units_of_image(s, values);
}

/* Means of up to BLOCK channels. */
static void mean(const float *x, size_t pixels, size_t c, int n, float *y) {
    double sums[BLOCK] = {0};
    for (size_t p = 0; p < pixels; p++, x += c)
        for (int k = 0; k < n; k++) sums[k] = sums[k] + (double)x[k];
    for (int k = 0; k < n; k++) y[k] = (float)(sums[k] / (double)pixels);
}

static void flatten(const float *x, size_t pixels, size_t c, int n, float *y) {
    for (int k = 0; k < n; k++, y += pixels)
        for (size_t p = 0; p < pixels; p++) y[p] = x[p * c + (size_t)k];
}

static double fold(double *lanes) {
    for (int half = 4; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] + lanes[i + half];
    return lanes[0];
}

/* Normalise `n` channels of some pixels that are `step` floats apart: lane i of 8 sums channels i, i + 8, ... */
void el_norm(const float *x, size_t pixels, size_t step, int n, const float *scale, const float *shift, float eps,
             float *y) {
    double sums[8] = {0}, squares[8] = {0};
    for (size_t p = 0; p < pixels; p++) {
        const float *from = x + p * step;
        int k = 0;
        for (; k + 8 <= n; k += 8)
            for (int i = 0; i < 8; i++) sums[i] = sums[i] + (double)from[k + i];
        for (int i = 0; k + i < n; i++) sums[i] = sums[i] + (double)from[k + i];
    }
    const double count = (double)pixels * (double)n, mean = fold(sums) / count;
    for (size_t p = 0; p < pixels; p++) {
        const float *from = x + p * step;
        int k = 0;
        for (; k + 8 <= n; k += 8)
            for (int i = 0; i < 8; i++) {
                const double d = (double)from[k + i] - mean;
                squares[i] = squares[i] + d * d;
            }
        for (int i = 0; k + i < n; i++) {
            const double d = (double)from[k + i] - mean;
            squares[i] = squares[i] + d * d;
        }
    }
    const double deviation = sqrt(fold(squares) / count + (double)eps);
    for (size_t p = 0; p < pixels; p++) {
        const float *from = x + p * step;
        float *to = y + p * step;
        for (int k = 0; k < n; k++) {
            double v = ((double)from[k] - mean) / deviation;
            if (scale) v = v * (double)scale[k];
            if (shift) v = v + (double)shift[k];
            to[k] = (float)v;
        }
    }
}

void el_run_units(const el_call *call, const el_node *s, int64_t from, int64_t to) {
    const el_value *values = call->ready->values, *source = values + s->step->wires[0], *result = values + s->value;
    const size_t pixels = (size_t)(source->shape.h * source->shape.w), c = (size_t)source->shape.c;
    const int64_t units = units_of_image(s, values);
    const float *scale = s->step->tensors[0], *shift = s->step->tensors[1];
    for (int64_t unit = from; unit < to; unit++) {
        const size_t image = (size_t)(unit / units), part = (size_t)(unit % units);
        const size_t width = s->kind == EL_NORM ? c / (size_t)units : BLOCK, first = part * width;
        const int n = (int)(c - first < width ? c - first : width);
        const float *x = el_address(call, s->step->wires[0]) + image * source->image + first;
        float *y = el_address(call, s->value) + image * result->image;
        switch (s->kind) {
            case EL_MEAN: mean(x, pixels, c, n, y + first); break;
            case EL_FLATTEN: flatten(x, pixels, c, n, y + first * pixels); break;
            default:
                el_norm(x, pixels, c, n, scale ? scale + first : NULL, shift ? shift + first : NULL,
                        s->step->record->constants[0], y + first);
        }
    }
}
