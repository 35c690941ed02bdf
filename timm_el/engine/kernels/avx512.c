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

#define OWN_DEPTHWISE
#define LANES 16
#include "body.h"

#define TILE 6

INLINE uint64_t signs16(const float *x, const float *threshold, const uint32_t *flip, __mmask16 mask) {
    __m512 v = _mm512_maskz_loadu_ps(mask, x);
    if (flip) v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_maskz_loadu_epi32(mask, flip)));
    __m512 t = threshold ? _mm512_maskz_loadu_ps(mask, threshold) : _mm512_setzero_ps();
    return _mm512_mask_cmp_ps_mask(mask, v, t, _CMP_GE_OQ);
}

INLINE uint64_t word64(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    for (int j = 0; 16 * j < n; j++)
        word |= signs16(x + 16 * j, threshold ? threshold + 16 * j : NULL, flip ? flip + 16 * j : NULL,
                        n - 16 * j < 16 ? (__mmask16)((1u << (n - 16 * j)) - 1) : 0xffff) << (16 * j);
    return word;
}

PACK_PIXELS(word64)

/* P pixels by B blocks of 8 channels. */
INLINE void tile_of(const uint64_t *const *base, const size_t *offsets, int segments, int length,
                    const uint64_t *weight, size_t block, int32_t *counts, int stride, const int P, const int B) {
    __m512i sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < B; b++) sum[p][b] = _mm512_setzero_si512();
    for (int s = 0; s < segments; s++) {
        const uint64_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = base[p] + offsets[s];
        for (int k = 0; k < length; k++, weight += 8) {
            __m512i w[4];
            for (int b = 0; b < B; b++) w[b] = _mm512_loadu_si512(weight + (size_t)b * block);
            for (int p = 0; p < P; p++) {
                __m512i a = _mm512_set1_epi64((long long)run[p][k]);
                for (int b = 0; b < B; b++)
                    sum[p][b] = _mm512_add_epi64(sum[p][b], _mm512_popcnt_epi64(_mm512_xor_si512(a, w[b])));
            }
        }
    }
    /* The low halves of two blocks' sums, with one instruction: where words are few, this is what costs. */
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int p = 0; p < P; p++) {
        int b = 0;
        for (; b + 2 <= B; b += 2)
            _mm512_storeu_si512(counts + p * stride + 8 * b, _mm512_permutex2var_epi32(sum[p][b], low, sum[p][b + 1]));
        if (b < B) _mm256_storeu_si256((__m256i *)(counts + p * stride + 8 * b), _mm512_cvtepi64_epi32(sum[p][b]));
    }
}

#define BY_PIXELS(tile, f, ...)             \
    switch (tile) {                         \
        case 1: f(__VA_ARGS__, 1); break;   \
        case 2: f(__VA_ARGS__, 2); break;   \
        case 3: f(__VA_ARGS__, 3); break;   \
        case 4: f(__VA_ARGS__, 4); break;   \
        case 5: f(__VA_ARGS__, 5); break;   \
        default: f(__VA_ARGS__, 6); break;  \
    }
#define FOUR(...) tile_of(__VA_ARGS__, 4)
#define ONE(...) tile_of(__VA_ARGS__, 1)

static void count(const uint64_t *const *base, int tile, const size_t *offsets, int segments, int length,
                  const void *weight, int channels, int32_t *counts, int stride) {
    const int blocks = (channels + 7) / 8;
    const size_t block = (size_t)segments * (size_t)length * 8;
    int b = 0;
    for (; b + 4 <= blocks; b += 4)
        BY_PIXELS(tile, FOUR, base, offsets, segments, length, (const uint64_t *)weight + (size_t)b * block, block,
                  counts + 8 * b, stride)
    for (; b < blocks; b++)
        BY_PIXELS(tile, ONE, base, offsets, segments, length, (const uint64_t *)weight + (size_t)b * block, block,
                  counts + 8 * b, stride)
}

static void count_depthwise(const uint64_t *base, const size_t *offsets, int taps, int length, const uint64_t *weight,
                            int32_t *counts) {
    const __m512i one = _mm512_set1_epi8(1);
    for (int w = 0; w < length; w++) {
        __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                           _mm512_setzero_si512()};
        for (int t = 0; t < taps;) {
            int end = taps - t > 255 ? t + 255 : taps; /* a byte holds 255 */
            __m512i bytes = _mm512_setzero_si512();
            for (; t < end; t++)
                bytes = _mm512_mask_add_epi8(
                    bytes, (__mmask64)(base[offsets[t] + (size_t)w] ^ weight[(size_t)t * (size_t)length + (size_t)w]),
                    bytes, one);
            sums[0] = _mm512_add_epi32(sums[0], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 0)));
            sums[1] = _mm512_add_epi32(sums[1], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 1)));
            sums[2] = _mm512_add_epi32(sums[2], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 2)));
            sums[3] = _mm512_add_epi32(sums[3], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 3)));
        }
        for (int j = 0; j < 4; j++) _mm512_storeu_si512(counts + 64 * w + 16 * j, sums[j]);
    }
}

/* P pixels by 64 channels: 24 chains of fma in registers. */
INLINE void dot_tile(const float *const *base, const size_t *offsets, int segments, int length, const float *weight,
                     float *out, int stride, const char *ahead, size_t step, const int P) {
    __m512 sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) sum[p][b] = _mm512_setzero_ps();
    for (int s = 0; s < segments; s++) {
        const float *run[TILE];
        for (int p = 0; p < P; p++) run[p] = base[p] + offsets[s];
        for (int k = 0; k < length; k++, weight += EL_REAL_BLOCK, ahead += step) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            __m512 w[4];
            for (int b = 0; b < 4; b++) w[b] = _mm512_loadu_ps(weight + 16 * b);
            for (int p = 0; p < P; p++) {
                __m512 a = _mm512_set1_ps(run[p][k]);
                for (int b = 0; b < 4; b++) sum[p][b] = _mm512_fmadd_ps(a, w[b], sum[p][b]);
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int b = 0; b < 4; b++) _mm512_storeu_ps(out + p * stride + 16 * b, sum[p][b]);
}

static void dot(const float *const *base, int tile, const size_t *offsets, int segments, int length,
                const float *weight, int channels, float *out, int stride, const char *ahead, size_t ahead_bytes) {
    const size_t block = (size_t)segments * (size_t)length;
    const size_t steps = block * (size_t)((channels + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK), step = ahead_bytes / steps;
    for (int c = 0; c < channels; c += EL_REAL_BLOCK)
        BY_PIXELS(tile, dot_tile, base, offsets, segments, length, weight + (size_t)c * block, out + c, stride,
                  ahead + (size_t)(c / EL_REAL_BLOCK) * block * step, step)
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i += 16) {
        __mmask16 mask = c - i < 16 ? (__mmask16)((1u << (c - i)) - 1) : 0xffff;
        __m512 sum = _mm512_setzero_ps();
        for (int t = 0; t < n_taps; t++)
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, taps[t] + i),
                                  _mm512_loadu_ps(weight + (size_t)t * (size_t)weight_stride + i), sum);
        _mm512_storeu_ps(out + i, sum);
    }
}

static int supported(void) { return (el_cpu() & EL_CPU_VPOPCNTDQ) != 0; }

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
    "avx512", TILE, TILE, supported, pack, abs_mean, weight_size, lay_out, count, count_depthwise, dot, dot_depthwise, pool,
    finish, chip_rate,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
