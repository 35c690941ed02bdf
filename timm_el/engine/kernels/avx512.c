/* AVX-512 with VPOPCNTDQ. Eight channels of 64 bits fill a register; a tile of 6 pixels by 32 channels keeps its 24 sums
 * in registers and costs xor, popcount and add for 512 bits. */
#include "engine.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,popcnt,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <time.h>

#define OWN_PACK
#define OWN_DEPTHWISE
#include "body.h"

#define TILE 6

INLINE uint64_t signs16(const float *x, const float *threshold, const uint32_t *flip, __mmask16 mask) {
    __m512 v = _mm512_maskz_loadu_ps(mask, x);
    if (flip) v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_maskz_loadu_epi32(mask, flip)));
    __m512 t = threshold ? _mm512_maskz_loadu_ps(mask, threshold) : _mm512_setzero_ps();
    return _mm512_mask_cmp_ps_mask(mask, v, t, _CMP_GE_OQ);
}

static void pack(const float *x, const float *threshold, const uint32_t *flip, int c, uint64_t *bits) {
    int i = 0;
    for (; i + 64 <= c; i += 64) {
        uint64_t word = 0;
        for (int j = 0; j < 4; j++)
            word |= signs16(x + i + 16 * j, threshold ? threshold + i + 16 * j : NULL,
                            flip ? flip + i + 16 * j : NULL, 0xffff) << (16 * j);
        bits[i / 64] = word;
    }
    if (i < c) {
        uint64_t word = 0;
        for (int j = 0; i + 16 * j < c; j++) {
            int n = c - i - 16 * j < 16 ? c - i - 16 * j : 16;
            word |= signs16(x + i + 16 * j, threshold ? threshold + i + 16 * j : NULL,
                            flip ? flip + i + 16 * j : NULL, (__mmask16)((1u << n) - 1)) << (16 * j);
        }
        bits[i / 64] = word;
    }
}

/* P pixels by B blocks of 8 channels. */
INLINE void tile(const uint64_t *const *pixels, int words, const uint64_t *weight, int32_t *counts, int stride,
                 const int P, const int B) {
    __m512i sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < B; b++) sum[p][b] = _mm512_setzero_si512();
    const size_t step = (size_t)words * 8;
    for (int k = 0; k < words; k++) {
        __m512i w[4];
        for (int b = 0; b < B; b++) w[b] = _mm512_loadu_si512(weight + (size_t)b * step + (size_t)k * 8);
        for (int p = 0; p < P; p++) {
            __m512i a = _mm512_set1_epi64((long long)pixels[p][k]);
            for (int b = 0; b < B; b++)
                sum[p][b] = _mm512_add_epi64(sum[p][b], _mm512_popcnt_epi64(_mm512_xor_si512(a, w[b])));
        }
    }
    for (int p = 0; p < P; p++)
        for (int b = 0; b < B; b++)
            _mm256_storeu_si256((__m256i *)(counts + p * stride + 8 * b), _mm512_cvtepi64_epi32(sum[p][b]));
}

#define TILES(B)                                                                   \
    switch (n) {                                                                   \
        case 1: tile(pixels, words, w, counts + 8 * b, stride, 1, B); break;       \
        case 2: tile(pixels, words, w, counts + 8 * b, stride, 2, B); break;       \
        case 3: tile(pixels, words, w, counts + 8 * b, stride, 3, B); break;       \
        case 4: tile(pixels, words, w, counts + 8 * b, stride, 4, B); break;       \
        case 5: tile(pixels, words, w, counts + 8 * b, stride, 5, B); break;       \
        default: tile(pixels, words, w, counts + 8 * b, stride, 6, B); break;      \
    }

static void count(const uint64_t *const *pixels, int n, int words, const void *weight, int channels, int32_t *counts,
                  int stride) {
    const int blocks = (channels + 7) / 8;
    int b = 0;
    for (; b + 4 <= blocks; b += 4) {
        const uint64_t *w = (const uint64_t *)weight + (size_t)b * (size_t)words * 8;
        TILES(4)
    }
    for (; b < blocks; b++) {
        const uint64_t *w = (const uint64_t *)weight + (size_t)b * (size_t)words * 8;
        TILES(1)
    }
}

static void count_depthwise(const uint64_t *const *taps, int n_taps, const uint64_t *weight, int words,
                            int32_t *counts) {
    const __m512i one = _mm512_set1_epi8(1);
    for (int w = 0; w < words; w++) {
        __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                           _mm512_setzero_si512()};
        for (int t = 0; t < n_taps;) {
            int end = n_taps - t > 255 ? t + 255 : n_taps; /* a byte holds 255 */
            __m512i bytes = _mm512_setzero_si512();
            for (; t < end; t++)
                bytes = _mm512_mask_add_epi8(
                    bytes, (__mmask64)(taps[t][w] ^ weight[(size_t)t * (size_t)words + (size_t)w]), bytes, one);
            sums[0] = _mm512_add_epi32(sums[0], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 0)));
            sums[1] = _mm512_add_epi32(sums[1], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 1)));
            sums[2] = _mm512_add_epi32(sums[2], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 2)));
            sums[3] = _mm512_add_epi32(sums[3], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 3)));
        }
        for (int j = 0; j < 4; j++) _mm512_storeu_si512(counts + 64 * w + 16 * j, sums[j]);
    }
}

/* P pixels by 64 channels: 24 chains of fma in registers. */
INLINE void dot_tile(const float *const *pixels, int k, const float *weight, float *out, int stride, const int P) {
    __m512 sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) sum[p][b] = _mm512_setzero_ps();
    for (int i = 0; i < k; i++) {
        __m512 w[4];
        for (int b = 0; b < 4; b++) w[b] = _mm512_loadu_ps(weight + (size_t)i * EL_REAL_BLOCK + 16 * b);
        for (int p = 0; p < P; p++) {
            __m512 a = _mm512_set1_ps(pixels[p][i]);
            for (int b = 0; b < 4; b++) sum[p][b] = _mm512_fmadd_ps(a, w[b], sum[p][b]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) _mm512_storeu_ps(out + p * stride + 16 * b, sum[p][b]);
}

static void dot(const float *const *pixels, int n, int k, const float *weight, int channels, float *out, int stride) {
    for (int c = 0; c < channels; c += EL_REAL_BLOCK) {
        const float *w = weight + (size_t)c * (size_t)k;
        switch (n) {
            case 1: dot_tile(pixels, k, w, out + c, stride, 1); break;
            case 2: dot_tile(pixels, k, w, out + c, stride, 2); break;
            case 3: dot_tile(pixels, k, w, out + c, stride, 3); break;
            case 4: dot_tile(pixels, k, w, out + c, stride, 4); break;
            case 5: dot_tile(pixels, k, w, out + c, stride, 5); break;
            default: dot_tile(pixels, k, w, out + c, stride, 6); break;
        }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i += 16) {
        __mmask16 mask = c - i < 16 ? (__mmask16)((1u << (c - i)) - 1) : 0xffff;
        __m512 sum = _mm512_setzero_ps();
        for (int t = 0; t < n_taps; t++)
            if (taps[t])
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, taps[t] + i),
                                      _mm512_loadu_ps(weight + (size_t)t * (size_t)weight_stride + i), sum);
        _mm512_storeu_ps(out + i, sum);
    }
}

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
}

static double chip_rate(void) {
    enum { N = 24, ROUNDS = 2000000 };
    __m512i sum[N], w = _mm512_set1_epi64(0x123456789abcdef);
    for (int i = 0; i < N; i++) sum[i] = _mm512_setzero_si512();
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 24
        for (int i = 0; i < N; i++) {
            __asm__("" : "+v"(w)); /* a new value, for all that the compiler knows */
            sum[i] = _mm512_add_epi64(sum[i], _mm512_popcnt_epi64(_mm512_xor_si512(w, sum[(i + 7) % N])));
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    for (int i = 1; i < N; i++) sum[0] = _mm512_add_epi64(sum[0], sum[i]);
    volatile long long sink = _mm512_reduce_add_epi64(sum[0]);
    (void)sink;
    return (double)ROUNDS * N * 512 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}

const el_body el_body_avx512 = {
    "avx512", TILE, TILE, supported, pack, abs_sum, weight_size, prepack, count, count_depthwise, dot, dot_depthwise, pool,
    finish, chip_rate,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
