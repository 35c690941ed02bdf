/* NEON. It counts the bits of 16 bytes with one instruction; bytes are summed as long as they hold the sum. */
#include "../isa.h"

#if defined(EL_ARM)
#include "neon.h"

#include <arm_neon.h>

#define LANES 4
#include "vectors.h"

#include "depthwise.h"
#include "depthwise_real.h"
#include "real.h"
#include "signs.h"
#include "unary.h"

#define TILE 4
#define ROOM 31 /* words whose counts, of 8 at most a byte, a byte can hold */

INLINE uint64_t signs_of_word(const float *x, const float *threshold, const uint32_t *flip, int n) {
    static const uint32_t places[4] = {1, 2, 4, 8};
    const uint32x4_t place = vld1q_u32(places);
    uint64_t word = 0;
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32x4_t v = vreinterpretq_u32_f32(vld1q_f32(x + i));
        if (flip) v = veorq_u32(v, vld1q_u32(flip + i));
        float32x4_t t = threshold ? vld1q_f32(threshold + i) : vdupq_n_f32(0.f);
        uint32x4_t hit = vandq_u32(vcgeq_f32(vreinterpretq_f32_u32(v), t), place);
        word |= (uint64_t)vaddvq_u32(hit) << i;
    }
    for (; i < n; i++) word |= sign_bit(x, threshold, flip, i) << i;
    return word;
}

void el_pack_neon(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c, char *bits,
                  size_t step) {
    pack(x, n, x_step, threshold, flip, c, bits, step);
}

void el_expand_neon(const uint64_t *bits, size_t words, char *bytes) { expand(bits, words, bytes); }

void el_count_depthwise_neon(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride) {
    count_depthwise(in, tile, weight, counts, stride);
}

/* P pixels by 8 channels. */
INLINE void count_tile(const el_strings *in, const uint64_t *weight, int32_t *counts, int stride, const int P) {
    uint32x4_t wide[TILE][4]; /* two 32-bit halves a channel */
    uint8x16_t sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) wide[p][i] = vdupq_n_u32(0), sum[p][i] = vdupq_n_u8(0);
    int room = ROOM;
    const int words = in->length / 8;
    for (int s = 0; s < in->segments; s++) {
        const uint64_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint64_t *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < words; k++, weight += 8) {
            uint64x2_t w[4];
            for (int i = 0; i < 4; i++) w[i] = vld1q_u64(weight + 2 * i);
            for (int p = 0; p < P; p++) {
                const uint64x2_t a = vdupq_n_u64(run[p][k]);
                for (int i = 0; i < 4; i++)
                    sum[p][i] = vaddq_u8(sum[p][i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(a, w[i]))));
            }
            if (--room && !(s + 1 == in->segments && k + 1 == words)) continue;
            room = ROOM;
            for (int p = 0; p < P; p++)
                for (int i = 0; i < 4; i++) {
                    wide[p][i] = vpadalq_u16(wide[p][i], vpaddlq_u8(sum[p][i]));
                    sum[p][i] = vdupq_n_u8(0);
                }
        }
    }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2; i++)
            vst1q_s32(counts + p * stride + 4 * i,
                      vreinterpretq_s32_u32(vpaddq_u32(wide[p][2 * i], wide[p][2 * i + 1])));
}

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const size_t block = (size_t)in->segments * (size_t)in->length; /* words of 8 channels */
    const uint64_t *w = weight;
    for (int c = 0; c < channels; c += 8, w += block) WITH_PIXELS(tile, TILE, count_tile(in, w, counts + c, stride, P))
}

const el_counter el_counter_neon = {
    .tile_pixels = TILE,
    .layout = EL_WORDS_OF_8,
    .packed_bytes = el_bytes_of_words,
    .pack = pack,
    .count = count,
    .expand = expand,
    .count_depthwise = count_depthwise,
};

/* ------------------------------------------------------------------------------------------------------------------ */

/* P pixels by 16 channels. */
INLINE void dot_tile(const el_strings *in, const float *weight, float *out, int stride, const int P) {
    float32x4_t sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) sum[p][i] = vdupq_n_f32(0.f);
    for (int s = 0; s < in->segments; s++) {
        const float *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const float *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 4; k++, weight += EL_REAL_BLOCK) {
            float32x4_t w[4];
            for (int j = 0; j < 4; j++) w[j] = vld1q_f32(weight + 4 * j);
            for (int p = 0; p < P; p++)
                for (int j = 0; j < 4; j++) sum[p][j] = vfmaq_n_f32(sum[p][j], w[j], run[p][k]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int j = 0; j < 4; j++) vst1q_f32(out + p * stride + 4 * j, sum[p][j]);
}

static void dot(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next) {
    (void)next;
    const size_t inputs = (size_t)in->segments * (size_t)(in->length / 4);
    for (int c = 0; c < channels; c += 16) {
        const float *w = weight + (size_t)(c / EL_REAL_BLOCK) * EL_REAL_BLOCK * inputs + c % EL_REAL_BLOCK;
        WITH_PIXELS(tile, TILE, dot_tile(in, w, out + c, stride, P))
    }
}

const el_real el_real_neon = {
    .tile_pixels = TILE,
    .abs_mean = abs_mean,
    .dot = dot,
    .dot_depthwise = dot_depthwise,
    .pool = pool,
    .unary = unary,
    .epilogue = epilogue,
};

/* ------------------------------------------------------------------------------------------------------------------ */

#include "int8_floats.h"

const el_int8 el_int8_neon = {
    .tile_pixels = INT8_TILE, .input_bytes = sizeof(INPUT), .largest = largest, .quantize = quantize, .dot = dot_int8};
#endif
