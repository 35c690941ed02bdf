/* The int8 half of processors with AVX512_VNNI. vpdpbusd multiplies unsigned by signed bytes, so inputs are stored as
 * q + 128, and 128 times the sum of a channel's weights is taken off at the end. */
#include "../isa.h"

#if defined(EL_X86)
#include "target.h"

#include <immintrin.h>
EL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,popcnt")

#define LANES 16
#include "vectors.h"

#define INPUT int8_t
#define ZERO 128
#include "quantize.h"

#define TILE 6

/* _mm512_dpbusd_epi32, around which gcc 12 copies all sums of a tile from register to register. */
INLINE __m512i add_products(__m512i sum, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
}

/* P pixels by 64 channels: 24 sums in registers. */
INLINE void dot_tile(const uint8_t *q, size_t step, int fours, const int8_t *weight, int32_t *sums, int stride,
                     const char *next, size_t next_step, const int P) {
    __m512i sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) sum[p][b] = _mm512_setzero_si512();
    for (int k = 0; k < fours; k++, weight += 256, q += 4, next += next_step) {
        _mm_prefetch(next, _MM_HINT_T1);
        __m512i w[4];
        for (int b = 0; b < 4; b++) w[b] = _mm512_loadu_si512(weight + 64 * b);
        for (int p = 0; p < P; p++) {
            int32_t four;
            memcpy(&four, q + (size_t)p * step, 4);
            const __m512i a = _mm512_set1_epi32(four);
            for (int b = 0; b < 4; b++) sum[p][b] = add_products(sum[p][b], a, w[b]);
        }
    }
    for (int b = 0; b < 4; b++) {
        const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(weight + 64 * b), 7);
        for (int p = 0; p < P; p++)
            _mm512_storeu_si512(sums + p * stride + 16 * b, _mm512_sub_epi32(sum[p][b], offset));
    }
}

static void dot(const uint8_t *q, size_t step, int tile, int inputs, const void *weight, int channels, int32_t *sums,
                int stride, el_prefetch next) {
    const int fours = (inputs + 3) / 4;
    const size_t next_step = next.bytes / ((size_t)fours * (size_t)((channels + 63) / 64));
    const int8_t *w = weight;
    for (int c = 0; c < channels; c += 64, w += el_int8_block_bytes(inputs), next.at += (size_t)fours * next_step)
        WITH_PIXELS(tile, TILE, dot_tile(q, step, fours, w, sums + c, stride, next.at, next_step, P))
}

const el_int8 el_int8_avx512_vnni = {.tile_pixels = TILE,
                                     .input_bytes = sizeof(INPUT),
                                     .zero = ZERO,
                                     .largest = largest,
                                     .quantize = quantize,
                                     .dot = dot};

EL_END_TARGET
#endif
