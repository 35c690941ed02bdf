/* The body for any processor: plain C, and what the compiler makes of its vectors. */
#include "engine.h"

#include <math.h>
#include <time.h>

#include "body.h"

#define TILE 4

INLINE uint64_t word64(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    for (int i = 0; i < n; i++) word |= sign_bit(x, threshold, flip, i) << i;
    return word;
}
PACK_PIXELS(word64)

static void count(const uint64_t *const *base, int tile, const size_t *offsets, int segments, int length,
                  const void *weight, int channels, int32_t *counts, int stride) {
    const uint64_t *w = weight;
    for (int c = 0; c < channels; c += 8) {
        for (int p = 0; p < tile; p++) memset(counts + p * stride + c, 0, 8 * sizeof(int32_t));
        for (int s = 0; s < segments; s++)
            for (int k = 0; k < length; k++, w += 8)
                for (int p = 0; p < tile; p++)
                    for (int i = 0; i < 8; i++)
                        counts[p * stride + c + i] += __builtin_popcountll(base[p][offsets[s] + (size_t)k] ^ w[i]);
    }
}

static void dot(const float *const *base, int tile, const size_t *offsets, int segments, int length,
                const float *weight, int channels, float *out, int stride, const char *ahead, size_t ahead_bytes) {
    (void)ahead, (void)ahead_bytes;
    for (int c = 0; c < channels; c += EL_REAL_BLOCK) {
        for (int p = 0; p < tile; p++) memset(out + p * stride + c, 0, EL_REAL_BLOCK * sizeof(float));
        for (int s = 0; s < segments; s++)
            for (int k = 0; k < length; k++, weight += EL_REAL_BLOCK)
                for (int p = 0; p < tile; p++) {
                    const float x = base[p][offsets[s] + (size_t)k];
                    float *sum = out + p * stride + c;
                    for (int j = 0; j < EL_REAL_BLOCK; j++) sum[j] = fmaf(x, weight[j], sum[j]);
                }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i++) {
        float sum = 0.f;
        for (int t = 0; t < n_taps; t++)
            sum = fmaf(taps[t][i], weight[(size_t)t * (size_t)weight_stride + (size_t)i], sum);
        out[i] = sum;
    }
}

static int supported(void) { return 1; }

static double chip_rate(void) {
    enum { N = 4, ROUNDS = 20000000 };
    uint64_t sum[N] = {1, 2, 3, 4}, w = 0x123456789abcdef;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < N; i++) sum[i] += (uint64_t)__builtin_popcountll(w ^ sum[(i + 1) % N]);
    clock_gettime(CLOCK_MONOTONIC, &b);
    volatile uint64_t sink = sum[0] + sum[1] + sum[2] + sum[3];
    (void)sink;
    return (double)ROUNDS * N * 64 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}

const el_body el_body_portable = {
    "portable", TILE, TILE, supported, pack, abs_mean, weight_size, lay_out, count, count_depthwise, dot, dot_depthwise,
    pool, finish, chip_rate,
};
