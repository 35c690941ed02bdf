/* The body for any processor: plain C, and what the compiler makes of its vectors. */
#include "engine.h"

#include <math.h>
#include <time.h>

#include "body.h"

#define TILE 4

static void count(const uint64_t *const *pixels, int n, int words, const void *weight, int channels, int32_t *counts,
                  int stride) {
    const int blocks = (channels + 7) / 8;
    for (int b = 0; b < blocks; b++) {
        const uint64_t *w = (const uint64_t *)weight + (size_t)b * (size_t)words * 8;
        for (int p = 0; p < n; p++) {
            int32_t sum[8] = {0};
            for (int k = 0; k < words; k++)
                for (int i = 0; i < 8; i++) sum[i] += __builtin_popcountll(pixels[p][k] ^ w[k * 8 + i]);
            memcpy(counts + p * stride + 8 * b, sum, sizeof sum);
        }
    }
}

static void dot(const float *const *pixels, int n, int k, const float *weight, int channels, float *out, int stride) {
    for (int c = 0; c < channels; c += EL_REAL_BLOCK) {
        const float *w = weight + (size_t)c * (size_t)k;
        for (int p = 0; p < n; p++) {
            float sum[EL_REAL_BLOCK] = {0};
            for (int i = 0; i < k; i++)
                for (int j = 0; j < EL_REAL_BLOCK; j++) sum[j] = fmaf(pixels[p][i], w[i * EL_REAL_BLOCK + j], sum[j]);
            memcpy(out + p * stride + c, sum, sizeof sum);
        }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i++) {
        float sum = 0.f;
        for (int t = 0; t < n_taps; t++)
            if (taps[t]) sum = fmaf(taps[t][i], weight[(size_t)t * (size_t)weight_stride + (size_t)i], sum);
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
    "portable", TILE, TILE, supported, pack, abs_sum, weight_size, prepack, count, count_depthwise, dot, dot_depthwise,
    pool, finish, chip_rate,
};
