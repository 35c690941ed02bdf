/* The layout of int8 weights, and the inputs of a band in int8, see int8.h. */
#include "rows.h"

#include <math.h>
#include <string.h>

size_t el_int8_bytes(int inputs, int channels) { return (size_t)((channels + 63) / 64) * el_int8_block_bytes(inputs); }

void el_int8_lay_out(const int8_t *stored, int inputs, int channels, void *weight) {
    const size_t block = el_int8_block_bytes(inputs);
    memset(weight, 0, el_int8_bytes(inputs, channels));
    for (int c = 0; c < channels; c++, stored += inputs) {
        int8_t *to = (int8_t *)weight + (size_t)(c / 64) * block + (size_t)(c % 64) * 4;
        int32_t sum = 0;
        for (int i = 0; i < inputs; i++) {
            to[(size_t)(i / 4) * 256 + (size_t)(i % 4)] = stored[i];
            sum += stored[i];
        }
        memcpy((int8_t *)weight + (size_t)(c / 64 + 1) * block - (size_t)(64 - c % 64) * 4, &sum, 4);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

#define LARGEST_FLOAT 3.402823466e38f

float el_int8_inverse(float m, float *k) {
    const float inverse = 127.f / m;
    const int finite = m <= LARGEST_FLOAT, fits = inverse <= LARGEST_FLOAT;
    *k = !finite ? NAN : fits ? m / 127.f : 0.f;
    return finite && fits ? inverse : 0.f;
}

static void quantize(const float *x, size_t n, float inverse, uint8_t *q) {
    const el_int8 *int8 = el_isa_active->int8;
    if (inverse > 0.f) int8->quantize(x, n, inverse, q);
    else memset(q, int8->zero, n * (size_t)int8->input_bytes);
}

/* Copy `bytes` bytes, and up to 15 behind them. */
static void copy(uint8_t *to, const uint8_t *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 16) memcpy(to + i, from + i, 16);
}

/* Output pixels of a band, each with a scale of its own. */
static void quantize_pixels(const stage *s, int pixels) {
    const layer *l = s->l;
    const size_t c_in = (size_t)l->p->c_in;
    uint8_t *q = s->s.quantized;
    for (int i = 0; i < pixels; i++, q += l->quantized) {
        const float *x = (const float *)(const void *)s->s.inputs[i];
        quantize(x, c_in, el_int8_inverse(el_isa_active->int8->largest(x, c_in, 0.f), s->s.k + i), q);
    }
}

/* The rows of a window are quantized, and put together for each output pixel of row oy of the band from oy0 on. */
static void quantize_row(const stage *s, int oy0, int oy) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const el_int8 *int8 = el_isa_active->int8;
    const size_t bytes = (size_t)int8->input_bytes, floats = (size_t)l->width * (size_t)p->c_in;
    const size_t run = (size_t)l->length / sizeof(float) * bytes;
    const int runs = l->segments / w->kh; /* of a row of the kernel */
    float m = 0.f, k;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        if (y >= 0 && y < p->h) m = int8->largest(row_of(&s->x, y), (size_t)p->w * (size_t)p->c_in, m);
    }
    const float inverse = el_int8_inverse(m, &k);
    const char *rows = s->s.rows + (size_t)((oy - oy0) * w->sh) * (size_t)l->width * l->pixel;
    for (int ky = 0; ky < w->kh; ky++)
        quantize((const float *)(const void *)(rows + l->offsets[ky * runs]), floats, inverse,
                 s->s.quantized_rows + (size_t)ky * l->quantized_row);
    const size_t first = (size_t)(oy - oy0) * (size_t)p->ow;
    uint8_t *q = s->s.quantized + first * l->quantized;
    for (int ox = 0; ox < p->ow; ox++, q += l->quantized) {
        uint8_t *to = q;
        for (int i = 0; i < l->segments; i++, to += run)
            copy(to,
                 s->s.quantized_rows + (size_t)(i / runs) * l->quantized_row +
                     (size_t)(ox * w->sw + i % runs * w->dw) * (size_t)p->c_in * bytes,
                 run);
        s->s.k[first + (size_t)ox] = k;
    }
}

void el_quantize(const stage *s, int oy0, int oy1) {
    const layer *l = s->l;
    const int pixels = (oy1 - oy0) * l->p->ow;
    const size_t inputs = (size_t)el_inputs_of(l->p) * (size_t)el_isa_active->int8->input_bytes;
    if (l->taps == 1) quantize_pixels(s, pixels);
    else
        for (int oy = oy0; oy < oy1; oy++) quantize_row(s, oy0, oy);
    for (int i = 0; i < pixels && inputs < l->quantized; i++)
        memset(s->s.quantized + (size_t)i * l->quantized + inputs, el_isa_active->int8->zero, l->quantized - inputs);
}
