/* NEON counts the bits of 16 bytes with one instruction; bytes are summed until they could pass 255. */
#include "engine.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <time.h>

#include "body.h"

#define TILE 4
#define FLUSH 31 /* words until a byte's sum of 8 each may pass 255 */

INLINE uint64_t word64(const float *x, const float *threshold, const uint32_t *flip, int n) {
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
PACK_PIXELS(word64)

/* P pixels by 8 channels. */
INLINE void tile_of(const uint64_t *const *base, const size_t *offsets, int segments, int length,
                    const uint64_t *weight, int32_t *counts, int stride, const int P) {
    uint32x4_t wide[TILE][4]; /* two 32-bit halves a channel */
    uint8x16_t sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) wide[p][i] = vdupq_n_u32(0), sum[p][i] = vdupq_n_u8(0);
    int room = FLUSH;
    for (int s = 0; s < segments; s++)
        for (int k = 0; k < length; k++, weight += 8) {
            uint64x2_t w[4];
            for (int i = 0; i < 4; i++) w[i] = vld1q_u64(weight + 2 * i);
            for (int p = 0; p < P; p++) {
                uint64x2_t a = vdupq_n_u64(base[p][offsets[s] + (size_t)k]);
                for (int i = 0; i < 4; i++)
                    sum[p][i] = vaddq_u8(sum[p][i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(a, w[i]))));
            }
            if (--room && !(s + 1 == segments && k + 1 == length)) continue;
            room = FLUSH;
            for (int p = 0; p < P; p++)
                for (int i = 0; i < 4; i++) {
                    wide[p][i] = vpadalq_u16(wide[p][i], vpaddlq_u8(sum[p][i]));
                    sum[p][i] = vdupq_n_u8(0);
                }
        }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2; i++)
            vst1q_s32(counts + p * stride + 4 * i,
                      vreinterpretq_s32_u32(vpaddq_u32(wide[p][2 * i], wide[p][2 * i + 1])));
}

static void count(const uint64_t *const *base, int tile, const size_t *offsets, int segments, int length,
                  const void *weight, int channels, int32_t *counts, int stride) {
    for (int c = 0; c < channels; c += 8) {
        const uint64_t *w = (const uint64_t *)weight + (size_t)c * (size_t)segments * (size_t)length;
        switch (tile) {
            case 1: tile_of(base, offsets, segments, length, w, counts + c, stride, 1); break;
            case 2: tile_of(base, offsets, segments, length, w, counts + c, stride, 2); break;
            case 3: tile_of(base, offsets, segments, length, w, counts + c, stride, 3); break;
            default: tile_of(base, offsets, segments, length, w, counts + c, stride, 4); break;
        }
    }
}

/* P pixels by 16 channels. */
INLINE void dot_tile(const float *const *base, const size_t *offsets, int segments, int length, const float *weight,
                     float *out, int stride, const int P) {
    float32x4_t sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) sum[p][i] = vdupq_n_f32(0.f);
    for (int s = 0; s < segments; s++)
        for (int k = 0; k < length; k++, weight += EL_REAL_BLOCK) {
            float32x4_t w[4];
            for (int j = 0; j < 4; j++) w[j] = vld1q_f32(weight + 4 * j);
            for (int p = 0; p < P; p++)
                for (int j = 0; j < 4; j++)
                    sum[p][j] = vfmaq_n_f32(sum[p][j], w[j], base[p][offsets[s] + (size_t)k]);
        }
    for (int p = 0; p < P; p++)
        for (int j = 0; j < 4; j++) vst1q_f32(out + p * stride + 4 * j, sum[p][j]);
}

static void dot(const float *const *base, int tile, const size_t *offsets, int segments, int length,
                const float *weight, int channels, float *out, int stride, const char *ahead, size_t ahead_bytes) {
    (void)ahead, (void)ahead_bytes;
    for (int c = 0; c < channels; c += 16) {
        const float *w = weight + (size_t)(c / EL_REAL_BLOCK) * EL_REAL_BLOCK * (size_t)segments * (size_t)length +
                         c % EL_REAL_BLOCK;
        switch (tile) {
            case 1: dot_tile(base, offsets, segments, length, w, out + c, stride, 1); break;
            case 2: dot_tile(base, offsets, segments, length, w, out + c, stride, 2); break;
            case 3: dot_tile(base, offsets, segments, length, w, out + c, stride, 3); break;
            default: dot_tile(base, offsets, segments, length, w, out + c, stride, 4); break;
        }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    int i = 0;
    for (; i + 4 <= c; i += 4) {
        float32x4_t sum = vdupq_n_f32(0.f);
        for (int t = 0; t < n_taps; t++)
            sum = vfmaq_f32(sum, vld1q_f32(taps[t] + i),
                                vld1q_f32(weight + (size_t)t * (size_t)weight_stride + i));
        vst1q_f32(out + i, sum);
    }
    for (; i < c; i++) {
        float sum = 0.f;
        for (int t = 0; t < n_taps; t++)
            sum = __builtin_fmaf(taps[t][i], weight[(size_t)t * (size_t)weight_stride + (size_t)i], sum);
        out[i] = sum;
    }
}

static int supported(void) { return (el_cpu() & EL_CPU_NEON) != 0; }

static double chip_rate(void) {
    enum { N = 16, ROUNDS = 2000000 };
    uint8x16_t sum[N], w = vdupq_n_u8(0x5a);
    for (int i = 0; i < N; i++) sum[i] = vdupq_n_u8((uint8_t)i);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < N; i++) {
            __asm__("" : "+w"(w));
            sum[i] = vaddq_u8(sum[i], vcntq_u8(veorq_u8(w, sum[(i + 5) % N])));
        }
    clock_gettime(CLOCK_MONOTONIC, &b);
    for (int i = 1; i < N; i++) sum[0] = vaddq_u8(sum[0], sum[i]);
    volatile int sink = vgetq_lane_u8(sum[0], 0);
    (void)sink;
    return (double)ROUNDS * N * 128 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}

const el_body el_body_neon = {
    "neon", TILE, TILE, supported, pack, abs_mean, weight_size, lay_out, count, count_depthwise, dot, dot_depthwise, pool,
    finish, chip_rate,
};
#endif
