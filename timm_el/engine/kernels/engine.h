/* The interface of the engine: one plan for every convolution. Instruction sets are in isa.h.
 *
 * Plain C11 on raw pointers. Nothing here knows of torch or Python, so one library serves every version of both.
 *
 * Activations are float32 in NHWC. A convolution runs in bands of output rows:
 *
 *     pack   the band's input rows to bits (bit 1 where x >= threshold), 64 channels to a word     [binary only]
 *     count  the bits in which a few output pixels' inputs and each output channel's weight differ, or, where weights
 *            are real, take the dot product
 *     finish with scale, shift, activation, link and post-activation, and write the output pixel
 *
 * so that a value of x is read from memory once for its sign and, still in cache, once more for the link. */
#ifndef TIMM_EL_ENGINE_H
#define TIMM_EL_ENGINE_H

#include "timm_el.h"

#define EL_MAX_TAPS 1024 /* kernel height times width */
#define EL_MAX_POOL 64   /* kernel height times width of a link's pool */
#define EL_MAX_REACH (1 << 15) /* strides, padding, kernel times dilation */
#define EL_MAX_RUN 32    /* steps of which a few rows at a time are made */

enum { EL_ACT_NONE, EL_ACT_CLIP, EL_ACT_PRELU };
enum { EL_LINK_NONE, EL_LINK_IDENTITY, EL_LINK_SQUEEZE, EL_LINK_EXPAND };
enum { EL_POOL_NONE, EL_POOL_MAX, EL_POOL_AVG };

/* Rows of the table of per-channel constants: scale and shift, then those that the plan asks for, in this order: slope (act
 * is PRELU), scale2, shift2 (has_affine), post_in, post_slope, post_out (has_post). Each is `table_stride` floats long:
 * zero-filled, a multiple of 16, and 15 more than there are channels, because vectors of 16 may start at any of them. */

typedef struct {
    int32_t kh, kw, sh, sw, ph, pw, dh, dw;
} el_window;

/* One convolution with all that follows it. Everything but the pointers of x, link and y.
 *
 * With n = the number of differing bits, T = taps * channels of a group, taps outside of the image holding pad_value:
 *
 *     v = float(T - 2 n + what padding changes) * scale[c]        or float(int8 sum) * scale[c], or the real dot product
 *     v = v * K[pixel]                                            if has_k or int8, whose K is the scale of the inputs
 *     v = v + shift[c]
 *     v = min(max(v, lo), hi)  or  v >= 0 ? v : v * slope[c]      by act
 *     v = v * scale2[c] + shift2[c]                               if has_affine
 *     v = v + link[c] * inverse_gamma                             by link, pooled by link_pool
 *     v = v + post_in[c]; v = v >= 0 ? v : v * post_slope[c]; v = v + post_out[c]        if has_post
 *     v = v + added[c]                                            if another tensor is added: a block's shortcut
 *
 * in exactly this order, each operation rounded to float32, none contracted. A NaN stays a NaN. */
typedef struct {
    int32_t n, h, w, c_in, oh, ow, c_out;
    el_window conv;
    int32_t groups, pad_value, real;
    int32_t int8;    /* a real convolution in 8-bit integers, see int8.h */
    int32_t is_pool; /* v = link, pooled: there is no convolution, and the link is x */
    int32_t has_k, act, has_affine, has_post;
    int32_t link, link_pool, link_h, link_w, link_c;
    el_window pool;
    int32_t table_stride;
    float lo, hi, inverse_gamma;
    const float *table;
    const float *threshold;  /* c_in floats, or NULL for 0 */
    const uint32_t *flip;    /* c_in words, 0x80000000 where x and threshold change sign first, or NULL */
    const void *weight;      /* see layout.py; for a counter with another layout, from el_lay_out */
    const int32_t *tap_sums; /* taps rows of c_out: (pad_value + 1) * sum of the tap's weights; NULL without padding */
} el_plan;

#define EL_REAL_BLOCK 64   /* real channels per block */

/* threads.c: run(context, i) for i in 0 .. n-1, on up to `threads` threads, the caller's among them. */
void el_parallel(void (*run)(void *context, int i), void *context, int n, int threads);
/* memory.c: a block whose address is a multiple of `align`; NULL if there is none. Only el_aligned_free takes it back. */
void *el_aligned_alloc(size_t align, size_t bytes);
void el_aligned_free(void *block);
/* A block of memory that belongs to the calling thread, until it asks for the slot again; NULL if there is none. */
enum { EL_SLOT_BAND, EL_SLOT_ARENA, EL_SLOTS };
void *el_scratch(int slot, size_t bytes);

#define EL_HUGE_PAGE ((size_t)2 << 20)

/* cpu.c: what this processor and its operating system run. */
enum {
    EL_CPU_AVX2 = 1,       /* and FMA and POPCNT */
    EL_CPU_AVX512 = 2,     /* F, BW, VL and DQ, besides AVX2 */
    EL_CPU_VPOPCNTDQ = 4,  /* besides AVX512 */
    EL_CPU_VNNI = 8,       /* the same */
    EL_CPU_NEON = 16,
    EL_CPU_DOTPROD = 32
};

EL_API uint32_t el_cpu(void);                 /* bits of EL_CPU_... */
EL_API const char *el_hash(void);             /* EL_HASH, which the build defines: of the sources it was given */
EL_API size_t el_large_image(size_t bytes);   /* from which size on a few rows at a time are made; gives that of before */
EL_API double el_chip_rate(void);
EL_API int el_own_layout(void);               /* the active counter reads binary weights in another layout than the stored one */
EL_API size_t el_weight_size(const el_plan *plan);
EL_API void el_lay_out(const el_plan *plan, const void *stored, void *weight);
EL_API void el_tap_sums(const el_plan *plan, const void *stored, int32_t *sums);
EL_API void el_advise(const void *memory, size_t bytes); /* large pages, please */
/* x, link and added (or NULL), NHWC, to y. */
EL_API int el_conv(const el_plan *plan, const float *x, const float *link, const float *added, float *y, int threads);
/* Whether a number in memory is another one than expected. */
EL_API int el_differs(const int64_t *const *places, const int64_t *expected, int n);
/* NCHW to NHWC. */
EL_API void el_nhwc(const float *nchw, int n, int c, int64_t pixels, float *nhwc);
/* The counting alone, for a benchmark: repeats over `pixels` pixels of random words. Seconds for one pass. */
EL_API double el_count_time(int words, int channels, int pixels, int repeats);

#endif
