/* One layer of the work, what it needs, and how a few of its rows are made: for the files that run layers. */
#ifndef TIMM_EL_ROWS_H
#define TIMM_EL_ROWS_H

#include "int8.h"

static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

static inline size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

static inline size_t image_size(int h, int w, int c) { return (size_t)h * (size_t)w * (size_t)c; }

static inline int is_depthwise(const el_plan *p) {
    return p->groups > 1 && p->groups == p->c_in && p->c_out == p->c_in;
}

static inline int words_for(int bits) { return (bits + 63) / 64; }

/* Return the words of a tap of a group of binary weights. */
static inline int tap_words(const el_plan *p) {
    return is_depthwise(p) ? words_for(p->c_in) : words_for(p->c_in / p->groups);
}

/* Return the inputs of an output pixel of a full convolution. */
static inline int64_t el_inputs_of(const el_plan *p) { return (int64_t)p->conv.kh * p->conv.kw * p->c_in; }

/* plan.c: return whether a plan is invalid. Nothing is computed with such a plan. */
int el_is_bad(const el_plan *p);

/* Rows of an image (height, width, channels) in memory: all of them, or a ring of the last few. */
typedef struct {
    float *base;
    int ring; /* rows in memory: row y is at y % ring */
    int width, channels;
} row_view;

static inline row_view view_of(const float *base, int ring, int width, int channels) {
    return (row_view){(float *)base, ring, width, channels}; /* of the views, only that of y is written */
}

static inline float *row_of(const row_view *v, int y) {
    return v->base + image_size(y % v->ring, v->width, v->channels);
}

/* One layer: the same for all threads. Sizes of inputs are bytes, because they are packed signs or floats. */
typedef struct {
    const el_plan *p;
    int depthwise;
    int copied;             /* the band's input is in the scratch, packed or padded; else it is read where it is */
    int by_tile;            /* copied, but a tile at a time: an output pixel's input is one pixel */
    int taps;               /* kernel height times width */
    size_t tap, pixel;      /* bytes of a tap of a group, and of an input pixel; binary depthwise: expanded */
    int segments, length;   /* runs of an output pixel's inputs, bytes of a run */
    int left, width;        /* columns of zeros before a row, and columns of a row with its padding */
    int band_rows, in_rows; /* output and input rows of a band */
    size_t quantized;       /* bytes of an output pixel's quantized inputs */
    size_t quantized_row;   /* and of a row of the input */
    int chunk;              /* output channels at a time */
    size_t bytes;           /* of scratch */
    size_t offsets[EL_MAX_TAPS];
} layer;

/* Memory that a layer needs while it runs. */
typedef struct {
    char *rows;           /* input rows of a band, as the kernels read them */
    float *means;         /* of abs(x), of the pixels of these rows */
    const char **inputs;  /* of each output pixel of a band: its first input */
    float *k;             /* K of each output pixel of a band */
    uint8_t *border;      /* of each output pixel of a band: whether padding changes its dot products */
    float *pooled;        /* the pooled link of a band */
    float *zeros;         /* an input pixel outside of the image */
    char *expanded;       /* binary depthwise weights, a byte each */
    uint8_t *quantized;   /* int8: of each output pixel of a band, its inputs */
    uint8_t *quantized_rows; /* int8, more than one tap: the rows of a window */
    char *sums;           /* of a tile: counts, or dot products */
    int32_t *corrections; /* of a tile: what padding adds */
} scratch;

/* One layer in one thread, in one image. */
typedef struct {
    const layer *l;
    scratch s;
    row_view x, link, added, y; /* without a base where there is none */
    int taken_from, taken_to;   /* input rows that are in the scratch */
    el_prefetch next;           /* weights of the layer that comes next */
} stage;

/* Return the bytes of the weights of a channel of a full real convolution. */
static inline size_t channel_bytes(const layer *l) {
    const el_plan *p = l->p;
    return (p->int8 ? el_int8_block_bytes((int)el_inputs_of(p)) / EL_REAL_BLOCK : (size_t)l->taps * l->tap);
}

/* layer.c */
void el_set_up(layer *l, const el_plan *p);
/* Begin a layer in an image, with l->bytes of memory. */
void el_prepare(stage *s, const layer *l, char *memory);

/* rows.c: make output rows from .. to of channels c0 .. c1. */
void el_run_rows(stage *s, int from, int to, int c0, int c1);

/* int8.c: quantize the inputs of output rows oy0 .. oy1, those of a band, which are located. */
void el_quantize(const stage *s, int oy0, int oy1);

/* conv.c: run a convolution or a pool on all threads; `next` is what runs after it, or NULL. The first trusts the
 * layer. */
int el_run_layer(const layer *l, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                 int threads);
int el_run_conv(const el_plan *p, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                int threads);

#endif
