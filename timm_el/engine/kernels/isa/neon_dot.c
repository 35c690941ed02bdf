/* The counter of 64-bit ARM with dot products of bytes (FEAT_DotProd): counted bytes times ones are summed to 32 bits,
 * which hold any count, so that a tile has registers for 6 pixels and is never interrupted. */
#include "../isa.h"

#if defined(EL_ARM)
#include "neon.h"
#include "target.h"

#include <arm_neon.h>
#if defined(__clang__)
EL_TARGET("dotprod")
#else
EL_TARGET("arch=armv8.2-a+dotprod")
#endif

#define LANES 4
#include "vectors.h"

#define TILE 6

/* vdotq_u32 of a and ones: arm_neon.h of some compilers has it only where the whole file is built for it. */
INLINE uint32x4_t add_bytes(uint32x4_t sum, uint8x16_t a, uint8x16_t ones) {
    __asm__("udot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(ones));
    return sum;
}

/* P pixels by 8 channels: 24 sums in registers, two 32-bit halves a channel. */
INLINE void count_tile(const el_strings *in, const uint64_t *weight, int32_t *counts, int stride, const int P) {
    const uint8x16_t ones = vdupq_n_u8(1);
    uint32x4_t sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) sum[p][i] = vdupq_n_u32(0);
    for (int s = 0; s < in->segments; s++) {
        const uint64_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint64_t *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 8; k++, weight += 8) {
            uint64x2_t w[4];
            for (int i = 0; i < 4; i++) w[i] = vld1q_u64(weight + 2 * i);
            for (int p = 0; p < P; p++) {
                const uint64x2_t a = vdupq_n_u64(run[p][k]);
                for (int i = 0; i < 4; i++)
                    sum[p][i] = add_bytes(sum[p][i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(a, w[i]))), ones);
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2; i++)
            vst1q_s32(counts + p * stride + 4 * i, vreinterpretq_s32_u32(vpaddq_u32(sum[p][2 * i], sum[p][2 * i + 1])));
}

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const size_t block = (size_t)in->segments * (size_t)in->length; /* words of 8 channels */
    const uint64_t *w = weight;
    for (int c = 0; c < channels; c += 8, w += block) WITH_PIXELS(tile, TILE, count_tile(in, w, counts + c, stride, P))
}

const el_counter el_counter_neon_dot = {
    .tile_pixels = TILE,
    .layout = EL_WORDS_OF_8,
    .packed_bytes = el_bytes_of_words,
    .pack = el_pack_neon,
    .count = count,
    .expand = el_expand_neon,
    .count_depthwise = el_count_depthwise_neon,
};

/* ------------------------------------------------------------------------------------------------------------------ */

#define INPUT int8_t
#define ZERO 0
#include "quantize.h"

#define INT8_TILE 4

/* vdotq_s32 of four channels' weights and the same four inputs. */
INLINE int32x4_t add_products(int32x4_t sum, int8x16_t w, int8x16_t x) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}

/* P pixels by 16 channels. */
INLINE void dot_tile(const uint8_t *q, size_t step, int fours, const int8_t *weight, int32_t *sums, int stride,
                     const int P) {
    int32x4_t sum[INT8_TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) sum[p][i] = vdupq_n_s32(0);
    for (int k = 0; k < fours; k++, weight += 256, q += 4) {
        int8x16_t w[4];
        for (int i = 0; i < 4; i++) w[i] = vld1q_s8(weight + 16 * i);
        for (int p = 0; p < P; p++) {
            int32_t four;
            memcpy(&four, q + (size_t)p * step, 4);
            const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
            for (int i = 0; i < 4; i++) sum[p][i] = add_products(sum[p][i], w[i], x);
        }
    }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) vst1q_s32(sums + p * stride + 4 * i, sum[p][i]);
}

static void dot_int8(const uint8_t *q, size_t step, int tile, int inputs, const void *weight, int channels,
                     int32_t *sums, int stride, el_prefetch next) {
    (void)next;
    for (int c = 0; c < (channels + 63) / 64 * 64; c += 16) {
        const int8_t *w =
            (const int8_t *)weight + (size_t)(c / 64) * el_int8_block_bytes(inputs) + (size_t)(c % 64) * 4;
        WITH_PIXELS(tile, INT8_TILE, dot_tile(q, step, (inputs + 3) / 4, w, sums + c, stride, P))
    }
}

const el_int8 el_int8_neon_dot = {
    .tile_pixels = INT8_TILE, .input_bytes = sizeof(INPUT), .largest = largest, .quantize = quantize, .dot = dot_int8};

EL_END_TARGET
#endif
