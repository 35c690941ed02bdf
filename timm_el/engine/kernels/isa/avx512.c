/* What all processors with AVX-512 (F, BW, VL, DQ) share: packing of signs, depthwise counting, the real half. */
#include "../isa.h"

#if defined(EL_X86)
#include "avx512.h"
#include "target.h"

#include <immintrin.h>
EL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")

#define LANES 16
#include "vectors.h"

#include "depthwise.h"
#include "depthwise_real.h"
#include "real.h"
#include "signs.h"
#include "unary.h"

INLINE __mmask16 first_lanes(int n) { return n < 16 ? (__mmask16)((1u << n) - 1) : 0xffff; }

INLINE uint64_t signs_of_word(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 mask = first_lanes(n - i);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        if (flip) v = _mm512_xor_ps(v, _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, flip + i)));
        const __m512 t = threshold ? _mm512_maskz_loadu_ps(mask, threshold + i) : _mm512_setzero_ps();
        word |= (uint64_t)_mm512_mask_cmp_ps_mask(mask, v, t, _CMP_GE_OQ) << i;
    }
    return word;
}

void el_pack_avx512(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c,
                    char *bits, size_t step) {
    pack(x, n, x_step, threshold, flip, c, bits, step);
}

void el_expand_avx512(const uint64_t *bits, size_t words, char *bytes) { expand(bits, words, bytes); }

void el_count_depthwise_avx512(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride) {
    count_depthwise(in, tile, weight, counts, stride);
}

#define TILE 6

/* P pixels by 64 channels: 24 chains of fused multiply-adds in registers. */
INLINE void dot_tile(const el_strings *in, const float *weight, float *out, int stride, const char *next, size_t step,
                     const int P) {
    __m512 sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) sum[p][b] = _mm512_setzero_ps();
    for (int s = 0; s < in->segments; s++) {
        const float *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const float *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 4; k++, weight += EL_REAL_BLOCK, next += step) {
            _mm_prefetch(next, _MM_HINT_T1);
            __m512 w[4];
            for (int b = 0; b < 4; b++) w[b] = _mm512_loadu_ps(weight + 16 * b);
            for (int p = 0; p < P; p++) {
                const __m512 a = _mm512_set1_ps(run[p][k]);
                for (int b = 0; b < 4; b++) sum[p][b] = _mm512_fmadd_ps(a, w[b], sum[p][b]);
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) _mm512_storeu_ps(out + p * stride + 16 * b, sum[p][b]);
}

static void dot(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next) {
    const size_t inputs = (size_t)in->segments * (size_t)(in->length / 4);
    const size_t blocks = (size_t)(channels + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK, step = next.bytes / (inputs * blocks);
    for (int c = 0; c < channels; c += EL_REAL_BLOCK, next.at += inputs * step)
        WITH_PIXELS(tile, TILE, dot_tile(in, weight + (size_t)c * inputs, out + c, stride, next.at, step, P))
}

const el_real el_real_avx512 = {
    .tile_pixels = TILE,
    .abs_mean = abs_mean,
    .dot = dot,
    .dot_depthwise = dot_depthwise,
    .pool = pool,
    .unary = unary,
    .epilogue = epilogue,
};

EL_END_TARGET
#endif
