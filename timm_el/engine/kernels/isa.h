/* Instruction sets: what an implementation of the kernels supplies, and which one runs.
 *
 * A row of the table in isa.c pairs a counter, which does the binary work, with the real half, which does the float
 * work, and the int8 half. Each of them is a table of functions in a file of isa/; a new instruction set is one such
 * file and one row. All of them give the same bits. */
#ifndef TIMM_EL_ISA_H
#define TIMM_EL_ISA_H

#include "engine.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EL_X86
#elif defined(__aarch64__)
#define EL_ARM
#endif

#define MOST_TILE 8 /* pixels of a tile, in any instruction set */

/* Inputs of a tile of output pixels. Those of pixel p are `segments` runs of `length` bytes: run s starts at
 * base[p] + offsets[s]. The runs of a pixel, one after the other, are its string. */
typedef struct {
    const char *const *base;
    const size_t *offsets; /* bytes */
    int segments, length;  /* runs, bytes */
} el_strings;

/* Layouts of the weights of a full binary convolution, see weights.c. */
typedef enum {
    EL_WORDS_OF_8,  /* as they are stored: 8 channels side by side, a word of 64 bits of each */
    EL_BYTES_OF_16, /* 16 channels side by side, a byte of each */
    EL_BYTES_OF_64, /* 64 channels side by side, a byte of each */
    EL_LAYOUTS
} el_layout;

/* Memory that is needed next: whoever is given it reads it into a cache meanwhile, a little at a time. */
typedef struct {
    const char *at;
    size_t bytes;
} el_prefetch;

/* A counter: from floats to bits, and from bits to counts of differing bits. */
typedef struct {
    int tile_pixels;  /* pixels that `count` takes at once, at most MOST_TILE */
    el_layout layout; /* in which `count` reads weights */
    /* Return the bytes of the packed signs of `channels` channels of a pixel. */
    size_t (*packed_bytes)(int channels);
    /* Pack the signs of n pixels of c floats, x_step floats from pixel to pixel, to bits, step bytes from pixel to
     * pixel. Bits beyond the last channel are 0. */
    void (*pack)(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c, char *bits,
                 size_t step);
    /* Set counts[p * stride + c] to the number of bits in which the string of pixel p and channel c differ. Counts of
     * channels beyond the last, up to a multiple of 64, are undefined. */
    void (*count)(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride);
    /* Expand words of packed signs to 64 bytes each, in the order that `count_depthwise` reads: signs, or weights. */
    void (*expand)(const uint64_t *bits, size_t words, char *bytes);
    /* Set counts[p * stride + c] to the number of runs of pixel p in which channel c differs from its weight, which has
     * as many runs, one after the other. Both are expanded. */
    void (*count_depthwise)(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride);
} el_counter;

/* A tile of output pixels whose sums are complete, and what turns the channels c0 .. c1 of it into outputs. */
typedef struct {
    const el_plan *plan;
    int pixels, c0, c1;
    int stride;                 /* int32 or floats from row to row of sums and corrections, which start at channel c0 */
    int bits;                   /* of a string: what a count is subtracted from, twice */
    const void *sums;           /* counts of differing bits, dot products of int8 (int32), or dot products (float) */
    const int32_t *corrections; /* what padding adds to the dot products, or NULL */
    const float *k;             /* K of each pixel */
    const float *link, *added;  /* whole pixels, or NULL */
    float *y;                   /* whole pixels */
} el_tile;

typedef void el_epilogue(const el_tile *tile);

/* The real half: everything that is computed in floats, each operation rounded on its own. */
typedef struct {
    int tile_pixels; /* pixels that `dot` takes at once, at most MOST_TILE */
    /* Set means[i] to the mean of abs(x) of pixel i of n, c floats each: 16 lanes, of which lane i sums x[i],
     * x[16 + i], ... in order; then the sums of halves of 8, 4, 2 and 1 lanes. */
    void (*abs_mean)(const float *x, int n, int c, float *means);
    /* Set out[p * stride + c] to the chain of fused multiply-adds over the string of pixel p and weight[k][c], in
     * blocks of 64 channels. */
    void (*dot)(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next);
    /* Set out[c] to the chain of fused multiply-adds over taps[t][c] * weight[t * weight_stride + c]. */
    void (*dot_depthwise)(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out);
    /* Set out[c] to the largest of n pixels, or to their mean, by mode. */
    void (*pool)(const float *const *pixels, int n, int mode, int c, float *out);
    /* Set y to a function of each of n numbers; op is one of EL_CLIP ... of table.h, a and b are its constants. */
    void (*unary)(int op, float a, float b, const float *x, size_t n, float *y);
    /* Return the function that computes the epilogue of the plan for channels from c0 on. */
    el_epilogue *(*epilogue)(const el_plan *plan, int c0);
} el_real;

typedef struct el_int8 el_int8; /* real convolutions in 8-bit integers, see int8.h */

typedef struct {
    const char *name;
    uint32_t needs; /* bits of EL_CPU_..., all of them */
    const el_counter *counter;
    const el_real *real;
    const el_int8 *int8;
    double (*chip_rate)(void); /* see bench.c */
} el_isa;

extern const el_isa *el_isa_active;

/* isa/: one file each. */
extern const el_counter el_counter_portable, el_counter_avx2, el_counter_avx512_adders, el_counter_avx512_popcount;
extern const el_counter el_counter_neon, el_counter_neon_dot;
extern const el_real el_real_portable, el_real_avx2, el_real_avx512, el_real_neon;
extern const el_int8 el_int8_portable, el_int8_avx2, el_int8_avx512_vnni, el_int8_neon, el_int8_neon_dot;

/* bench.c: binary multiply-accumulates per second of the instructions of a counter on registers. */
double el_chip_rate_portable(void), el_chip_rate_avx2(void), el_chip_rate_avx512_adders(void);
double el_chip_rate_avx512_popcount(void), el_chip_rate_neon(void);

/* weights.c: bytes of the weights of a number of channels, `words` words of 64 bits each. */
size_t el_layout_bytes(el_layout layout, int words, int channels);
/* weights.c: copy weights from EL_WORDS_OF_8 to another layout. */
void el_copy_to_layout(el_layout layout, const uint64_t *stored, int words, int channels, void *weight);
/* weights.c: packed_bytes() of a bit per channel in words of 64 bits. */
size_t el_bytes_of_words(int channels);

#endif
