/* AVX2 has no popcount of vectors, but it looks up 32 values in a table of 16 with one instruction. So the popcount of
 * (weight xor activation), four bits at a time, is a look-up of the weight's four bits in the table that belongs to the
 * activation's four bits: 32 output channels side by side, one look-up and one add for 128 bits.
 *
 * Layout: blocks of 64 channels; in a block byte by byte of the bit string, 64 channels side by side.
 */
#include "engine.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,popcnt")
#endif
#include <immintrin.h>
#include <time.h>

#define BYTE_BLOCK 64
#define BYTE_PLACE(c) (c)
#define LANES 8
#include "body.h"

#define TILE 4
#define REAL_TILE 6
#define FLUSH 31 /* bytes of the bit string until a sum of 8 each may pass 255 */

INLINE uint64_t word64(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (flip) v = _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)(flip + i))));
        __m256 t = threshold ? _mm256_loadu_ps(threshold + i) : _mm256_setzero_ps();
        word |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_GE_OQ)) << i;
    }
    for (; i < n; i++) word |= sign_bit(x, threshold, flip, i) << i;
    return word;
}
PACK_PIXELS(word64)

/* tables[0][b] is popcount(i ^ low four bits of b) for i in 0 .. 15, tables[1][b] the same with b's high bits. */
#define P1(i, b) (uint8_t)((((i) ^ (b)) & 1) + (((i) ^ (b)) >> 1 & 1) + (((i) ^ (b)) >> 2 & 1) + (((i) ^ (b)) >> 3 & 1))
#define P16(b) {P1(0, b), P1(1, b), P1(2, b), P1(3, b), P1(4, b), P1(5, b), P1(6, b), P1(7, b), P1(8, b), P1(9, b), \
                P1(10, b), P1(11, b), P1(12, b), P1(13, b), P1(14, b), P1(15, b)}
#define LOW16 P16(0), P16(1), P16(2), P16(3), P16(4), P16(5), P16(6), P16(7), P16(8), P16(9), P16(10), P16(11), \
              P16(12), P16(13), P16(14), P16(15)
#define HIGH(b) P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), P16(b), \
                P16(b), P16(b), P16(b), P16(b)
static const uint8_t tables[2][256][16] __attribute__((aligned(64))) = {
    {LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16, LOW16},
    {HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6), HIGH(7), HIGH(8), HIGH(9), HIGH(10), HIGH(11),
     HIGH(12), HIGH(13), HIGH(14), HIGH(15)},
};

INLINE void tile_of(const uint64_t *const *base, const size_t *offsets, int segments, int length,
                    const uint8_t *weight, int32_t *counts, int stride, const int P) {
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i sum[TILE][2];
    int32_t *out[TILE];
    for (int p = 0; p < P; p++) {
        sum[p][0] = sum[p][1] = zero;
        out[p] = counts + p * stride;
        memset(out[p], 0, BYTE_BLOCK * sizeof(int32_t));
    }
    int room = FLUSH;
    for (int s = 0; s < segments; s++) {
        const uint8_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint8_t *)(base[p] + offsets[s]);
        for (int j = 0; j < length * 8;) {
            const int end = length * 8 - j > room ? j + room : length * 8;
            room -= end - j;
            for (; j < end; j++, weight += BYTE_BLOCK) {
                __m256i w0 = _mm256_loadu_si256((const __m256i *)weight);
                __m256i w1 = _mm256_loadu_si256((const __m256i *)(weight + 32));
                __m256i h0 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), low);
                __m256i h1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), low);
                w0 = _mm256_and_si256(w0, low);
                w1 = _mm256_and_si256(w1, low);
                for (int p = 0; p < P; p++) {
                    const uint8_t byte = run[p][j];
                    __m256i t0 = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)tables[0][byte]));
                    __m256i t1 = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)tables[1][byte]));
                    sum[p][0] = _mm256_add_epi8(
                        sum[p][0], _mm256_add_epi8(_mm256_shuffle_epi8(t0, w0), _mm256_shuffle_epi8(t1, h0)));
                    sum[p][1] = _mm256_add_epi8(
                        sum[p][1], _mm256_add_epi8(_mm256_shuffle_epi8(t0, w1), _mm256_shuffle_epi8(t1, h1)));
                }
            }
            if (room && !(s + 1 == segments && j == length * 8)) continue;
            room = FLUSH;
            for (int p = 0; p < P; p++)
                for (int i = 0; i < 8; i++) {
                    __m128i half = i & 2 ? _mm256_extracti128_si256(sum[p][i / 4], 1) : _mm256_castsi256_si128(sum[p][i / 4]);
                    __m256i wide = _mm256_cvtepu8_epi32(i & 1 ? _mm_srli_si128(half, 8) : half);
                    __m256i *to = (__m256i *)(out[p] + 8 * i);
                    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), wide));
                }
            for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = zero;
        }
    }
}

static void count(const uint64_t *const *base, int tile, const size_t *offsets, int segments, int length,
                  const void *weight, int channels, int32_t *counts, int stride) {
    for (int c = 0; c < channels; c += BYTE_BLOCK) {
        const uint8_t *w = (const uint8_t *)weight + (size_t)c * (size_t)segments * (size_t)length * 8;
        switch (tile) {
            case 1: tile_of(base, offsets, segments, length, w, counts + c, stride, 1); break;
            case 2: tile_of(base, offsets, segments, length, w, counts + c, stride, 2); break;
            case 3: tile_of(base, offsets, segments, length, w, counts + c, stride, 3); break;
            default: tile_of(base, offsets, segments, length, w, counts + c, stride, 4); break;
        }
    }
}

#define WEIGHTS_AHEAD 8 /* rows to fetch in advance: the processor does not see that every fourth line is read */

/* P pixels by 16 channels: 12 chains of fma in registers. */
INLINE void dot_tile(const float *const *base, const size_t *offsets, int segments, int length, const float *weight,
                     float *out, int stride, const char *ahead, size_t step, const int P) {
    __m256 sum[REAL_TILE][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = _mm256_setzero_ps();
    for (int s = 0; s < segments; s++) {
        const float *run[REAL_TILE];
        for (int p = 0; p < P; p++) run[p] = base[p] + offsets[s];
        for (int k = 0; k < length; k++, weight += EL_REAL_BLOCK, ahead += step) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            _mm_prefetch((const char *)(weight + WEIGHTS_AHEAD * EL_REAL_BLOCK), _MM_HINT_T0);
            __m256 w0 = _mm256_loadu_ps(weight), w1 = _mm256_loadu_ps(weight + 8);
            for (int p = 0; p < P; p++) {
                __m256 a = _mm256_broadcast_ss(run[p] + k);
                sum[p][0] = _mm256_fmadd_ps(a, w0, sum[p][0]);
                sum[p][1] = _mm256_fmadd_ps(a, w1, sum[p][1]);
            }
        }
    }
    for (int p = 0; p < P; p++) {
        _mm256_storeu_ps(out + p * stride, sum[p][0]);
        _mm256_storeu_ps(out + p * stride + 8, sum[p][1]);
    }
}

static void dot(const float *const *base, int tile, const size_t *offsets, int segments, int length,
                const float *weight, int channels, float *out, int stride, const char *ahead, size_t ahead_bytes) {
    const size_t block = (size_t)segments * (size_t)length, passes = (size_t)(channels + 15) / 16;
    const size_t step = ahead_bytes / (block * passes);
    for (int c = 0; c < channels; c += 16, ahead += block * step) {
        const float *w = weight + (size_t)(c / EL_REAL_BLOCK) * EL_REAL_BLOCK * block + c % EL_REAL_BLOCK;
        float *to = out + c;
        switch (tile) {
            case 1: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 1); break;
            case 2: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 2); break;
            case 3: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 3); break;
            case 4: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 4); break;
            case 5: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 5); break;
            default: dot_tile(base, offsets, segments, length, w, to, stride, ahead, step, 6); break;
        }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    int i = 0;
    for (; i + 8 <= c; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int t = 0; t < n_taps; t++)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(taps[t] + i),
                                  _mm256_loadu_ps(weight + (size_t)t * (size_t)weight_stride + i), sum);
        _mm256_storeu_ps(out + i, sum);
    }
    for (; i < c; i++) {
        float sum = 0.f;
        for (int t = 0; t < n_taps; t++)
            sum = __builtin_fmaf(taps[t][i], weight[(size_t)t * (size_t)weight_stride + (size_t)i], sum);
        out[i] = sum;
    }
}

static int supported(void) { return (el_cpu() & EL_CPU_AVX2) != 0; }

static double chip_rate(void) {
    enum { N = 12, ROUNDS = 2000000 };
    __m256i sum[N], table = _mm256_set1_epi8(3);
    for (int i = 0; i < N; i++) sum[i] = _mm256_set1_epi8((char)i);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            __asm__("" : "+x"(table));
            sum[i] = _mm256_add_epi8(sum[i], _mm256_shuffle_epi8(table, sum[(i + 5) % N]));
        }
    clock_gettime(CLOCK_MONOTONIC, &b);
    for (int i = 1; i < N; i++) sum[0] = _mm256_add_epi8(sum[0], sum[i]);
    volatile int sink = _mm256_extract_epi8(sum[0], 0);
    (void)sink;
    return (double)ROUNDS * N * 128 / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}

const el_body el_body_avx2 = {
    "avx2", TILE, REAL_TILE, supported, pack, abs_mean, weight_size, lay_out, count, count_depthwise, dot, dot_depthwise, pool,
    finish, chip_rate,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
