/* The engine's own small language: one plan for every convolution, one table of functions for every body.
 *
 * Plain C11 on raw pointers. Nothing here knows of torch or Python, so one library serves every version of both.
 *
 * Activations are float32 in NHWC. A convolution runs in bands of output rows:
 *
 *     pack   the band's input rows to bits (bit 1 where x >= threshold), 64 channels to a word     [binary only]
 *     gather the taps of a few output pixels into one string of words, or floats, per pixel
 *     count  the bits in which that string and each output channel's weight differ, or take the dot product
 *     finish with scale, shift, activation, link and post-activation, and write the output pixel
 *
 * so that a value of x is read from memory once for its sign and, still in cache, once more for the link.
 */
#ifndef TIMM_EL_ENGINE_H
#define TIMM_EL_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#define EL_MAX_TAPS 4096 /* kernel height times width */
#define EL_MAX_POOL 64   /* the same of a link's pool */
#define EL_ABI 1         /* changes with el_plan */

enum { EL_OK = 0, EL_BAD_PLAN = 1, EL_NO_MEMORY = 2 };
enum { EL_ACT_NONE, EL_ACT_CLIP, EL_ACT_PRELU };
enum { EL_LINK_NONE, EL_LINK_IDENTITY, EL_LINK_SQUEEZE, EL_LINK_EXPAND };
enum { EL_POOL_NONE, EL_POOL_MAX, EL_POOL_AVG };

/* Rows of the table of per-channel constants, each `table_stride` floats long (a multiple of 16, zero-filled). */
enum { EL_SCALE, EL_SHIFT, EL_SLOPE, EL_SCALE2, EL_SHIFT2, EL_POST_IN, EL_POST_SLOPE, EL_POST_OUT, EL_ROWS };

typedef struct {
    int32_t kh, kw, sh, sw, ph, pw, dh, dw;
} el_window;

/* One convolution with all that follows it. Everything but the pointers of x, link and y.
 *
 * With n = the number of differing bits, T = taps * channels of a group, taps outside of the image holding pad_value:
 *
 *     v = float(T - 2 n + what padding changes) * scale[c]        or the real dot product
 *     v = v * K[pixel]                                            if has_k
 *     v = v + shift[c]
 *     v = min(max(v, lo), hi)  or  v >= 0 ? v : v * slope[c]      by act
 *     v = v * scale2[c] + shift2[c]                               if has_affine
 *     v = v + link[c] * inverse_gamma                             by link, pooled by link_pool
 *     v = v + post_in[c]; v = v >= 0 ? v : v * post_slope[c]; v = v + post_out[c]        if has_post
 *
 * in exactly this order, each operation rounded to float32, none contracted. A NaN stays a NaN.
 */
typedef struct {
    int32_t n, h, w, c_in, oh, ow, c_out;
    el_window conv;
    int32_t groups, pad_value, real;
    int32_t has_k, act, has_affine, has_post;
    int32_t link, link_pool, link_h, link_w, link_c;
    el_window pool;
    int32_t table_stride;
    float lo, hi, inverse_gamma;
    const float *table;
    const float *threshold;  /* c_in floats, or NULL for 0 */
    const uint32_t *flip;    /* c_in words, 0x80000000 where x and threshold change sign first, or NULL */
    const void *weight;      /* in the body's own layout, from el_prepack */
    const int32_t *tap_sums; /* taps rows of c_out: (pad_value + 1) * sum of the tap's weights; NULL without padding */
} el_plan;

typedef struct {
    const float *x; /* NHWC */
    const float *link;
    float *y;
} el_tensors;

/* What one body can do. A tile is up to tile_pixels pixels (real_tile_pixels for dot) by
 * any number of channels. */
typedef struct {
    const char *name;
    int tile_pixels, real_tile_pixels;
    int (*supported)(void);
    /* Signs of c floats as bits; tail bits are 0. */
    void (*pack)(const float *x, const float *threshold, const uint32_t *flip, int c, uint64_t *bits);
    /* Sum of abs(x): 16 lanes, lane i sums x[i], x[16 + i], ... in order, then halves are added: 8, 4, 2, 1. */
    float (*abs_sum)(const float *x, int c);
    /* Bytes of the layout, and the layout, of `channels` rows of `words` words. */
    size_t (*weight_size)(int words, int channels);
    void (*prepack)(const uint64_t *rows, int words, int channels, void *weight);
    /* counts[p * stride + c] = bits in which pixel p and channel c differ; channels beyond the last are scratch. */
    void (*count)(const uint64_t *const *pixels, int tile, int words, const void *weight, int channels,
                  int32_t *counts, int stride);
    /* counts[c] = taps in which channel c differs; words is that of one tap. */
    void (*count_depthwise)(const uint64_t *const *taps, int n_taps, const uint64_t *weight, int words,
                            int32_t *counts);
    /* out[p * stride + c] = fma chain over k of pixels[p][k] * weight[k][c]; weight from el_prepack_real. */
    void (*dot)(const float *const *pixels, int tile, int k, const float *weight, int channels, float *out,
                int stride);
    /* out[c] = fma chain over taps of taps[t][c] * weight[t * weight_stride + c]; a NULL tap is outside the image. */
    void (*dot_depthwise)(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out);
    /* out[c] = largest, or mean, of n pixels. */
    void (*pool)(const float *const *pixels, int n, int mode, int c, float *out);
    /* The epilogue for channels c0 .. c1 of one pixel; accumulators and corrections start at c0. */
    void (*finish)(const el_plan *plan, const void *acc, const int32_t *correction, int base, float k,
                   const float *link, int c0, int c1, float *y);
    double (*chip_rate)(void); /* binary MAC/s of xor, popcount and add on registers */
} el_body;

extern const el_body el_body_portable, el_body_avx2, el_body_avx512, el_body_neon;

#define EL_CHANNEL_BLOCK 8 /* binary channels per block of the 64-bit layouts */
#define EL_REAL_BLOCK 64   /* real channels per block */

#if defined(_WIN32)
#define EL_API __declspec(dllexport)
#else
#define EL_API __attribute__((visibility("default")))
#endif

/* threads.c: run(context, i) for i in 0 .. n-1, on up to `threads` threads, the caller's among them. */
void el_parallel(void (*run)(void *context, int i), void *context, int n, int threads);
/* A block of memory that belongs to the calling thread, until it asks again; NULL if there is none. */
void *el_scratch(size_t bytes);

EL_API int el_abi(void);
EL_API const char *el_bodies(void);           /* names of the bodies that this processor runs, best first */
EL_API int el_use(const char *name);          /* EL_BAD_PLAN if the processor does not run it */
EL_API const char *el_active(void);
EL_API double el_chip_rate(void);
EL_API size_t el_weight_size(const el_plan *plan);
EL_API int el_prepack(const el_plan *plan, const uint8_t *bits, void *weight, int32_t *tap_sums);
EL_API int el_prepack_real(const el_plan *plan, const float *oihw, float *weight);
EL_API int el_conv(const el_plan *plan, const el_tensors *tensors, int threads);
/* The counting alone, for a benchmark: repeats over `pixels` pixels of random words. Seconds for one pass. */
EL_API double el_count_time(int words, int channels, int pixels, int repeats);

#endif
