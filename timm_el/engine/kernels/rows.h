/* What the files of the engine share: one layer of the work, and how a few of its rows are made. */
#ifndef TIMM_EL_ROWS_H
#define TIMM_EL_ROWS_H

#include "engine.h"

#define MOST_TILE 8

extern const el_body *el_body_active;

static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

static inline size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

static inline size_t image_size(int h, int w, int c) { return (size_t)h * (size_t)w * (size_t)c; }

static inline int is_depthwise(const el_plan *p) { return p->groups > 1 && p->groups == p->c_in && p->c_out == p->c_in; }

static inline int words_for(int bits) { return (bits + 63) / 64; }

/* Bits of one tap of one group, bits of one pixel, in words. */
static inline int tap_words(const el_plan *p) { return is_depthwise(p) ? words_for(p->c_in) : words_for(p->c_in / p->groups); }

static inline int pixel_words(const el_plan *p) { return is_depthwise(p) ? tap_words(p) : p->groups * tap_words(p); }

/* plan.c: nobody runs a plan that is bad. */
int el_is_bad(const el_plan *p);

/* One layer of the work: the same for all threads. */
typedef struct {
    const el_plan *p;
    int depthwise, copied;    /* copied: the band's input is in the scratch, padded; else it is read where it is */
    int by_tile;              /* copied, but a tile at a time: an output pixel's input is one pixel */
    int taps, tap, pixel;     /* words of a tap of a group, and of an input pixel; floats where real */
    int segments, length;     /* the runs of an output pixel's inputs */
    int left, width;          /* columns of zeros before a row, and columns of a row with its padding */
    int band_rows, in_rows;   /* output and input rows of a band */
    int chunk;                /* output channels at a time */
    size_t rows_at, k_at, base_at, scale_at, border_at, pooled_at, zeros_at, acc_at, correction_at, bytes;
    size_t offsets[EL_MAX_TAPS];
} layer;

/* One layer in one thread, in one image: where its rows are. Row r of x is at r % x_ring, and so on: all rows of an
 * image, or the last few. */
typedef struct {
    const layer *l;
    char *scratch;
    const float *x, *link, *added;
    float *y;
    int x_ring, link_ring, added_ring, y_ring;
    int taken_from, taken_to; /* input rows that are in the scratch */
    const char *ahead;        /* weights of the layer that comes next, to be fetched while this one runs */
    size_t ahead_bytes;
} stage;

/* rows.c */
void el_set_up(layer *l, const el_plan *p);
void el_prepare(stage *s, const layer *l, char *scratch);
/* Output rows from .. to of channels c0 .. c1. */
void el_run_rows(stage *s, int from, int to, int c0, int c1);

/* conv.c: a convolution or a pool on all threads; `next` is what runs after it, or NULL. */
int el_run_conv(const el_plan *p, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                int threads);

#endif
