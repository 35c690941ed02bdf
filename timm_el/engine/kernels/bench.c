/* Rates for benchmarks: of the counting kernel, and of a counter's instructions on registers. */
#include "isa.h"
#include "rows.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(EL_X86)
#include <immintrin.h>
#elif defined(EL_ARM)
#include <arm_neon.h>
#endif

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double el_count_time(int words, int channels, int pixels, int repeats) {
    if (words < 1 || channels < 1 || pixels < 1 || repeats < 1) return 0.;
    const el_counter *counter = el_isa_active->counter;
    const int stride = round_up(channels, EL_REAL_BLOCK);
    const size_t stored = el_layout_bytes(EL_WORDS_OF_8, words, channels), start = 0;
    uint64_t *bits = malloc(stored + (size_t)pixels * (size_t)words * 8);
    void *weight = el_aligned_alloc(64, el_layout_bytes(counter->layout, words, channels));
    int32_t *counts = malloc((size_t)MOST_TILE * (size_t)stride * sizeof(int32_t));
    double best = 0.;
    if (bits && weight && counts) {
        uint64_t seed = 88172645463325252u;
        for (size_t i = 0; i < stored / 8 + (size_t)pixels * (size_t)words; i++) {
            seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
            bits[i] = seed;
        }
        el_copy_to_layout(counter->layout, bits, words, channels, weight);
        const char *x = (const char *)bits + stored;
        for (int r = 0; r < repeats; r++) {
            const double before = seconds_now();
            for (int i = 0, n; i < pixels; i += n) {
                const char *base[MOST_TILE];
                n = pixels - i < counter->tile_pixels ? pixels - i : counter->tile_pixels;
                for (int q = 0; q < n; q++) base[q] = x + (size_t)(i + q) * (size_t)words * 8;
                const el_strings strings = {.base = base, .offsets = &start, .segments = 1, .length = words * 8};
                counter->count(&strings, n, weight, channels, counts, stride);
            }
            const double now = seconds_now() - before;
            if (r == 0 || now < best) best = now;
        }
    }
    free(bits);
    el_aligned_free(weight);
    free(counts);
    return best;
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Each loop keeps a few independent chains of the counter's instructions in registers. An empty asm statement stands
 * for a new value, for all that the compiler knows. */

double el_chip_rate(void) { return el_isa_active->chip_rate(); }

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint32_t quads __attribute__((vector_size(16)));

/* Vectors of the compiler: xor, and the popcount of bytes by shifts and masks. */
double el_chip_rate_portable(void) {
    enum { N = 4, ROUNDS = 5000000 };
    bytes sum[N] = {{1}, {2}, {3}, {4}}, word = {0};
    word = word + 0x5a;
    const double before = seconds_now();
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < N; i++) {
            bytes x = word ^ sum[(i + 1) % N];
            x = x - ((bytes)((quads)x >> 1) & 0x55);
            x = (x & 0x33) + ((bytes)((quads)x >> 2) & 0x33);
            sum[i] = sum[i] + ((x + (bytes)((quads)x >> 4)) & 0x0f);
        }
    const double seconds = seconds_now() - before;
    volatile int sink = (sum[0] + sum[1] + sum[2] + sum[3])[0];
    (void)sink;
    return (double)ROUNDS * N * 128 / seconds;
}

#if defined(EL_X86)
/* Look-up and add: 32 channels of 4 bits. */
__attribute__((target("avx2"))) double el_chip_rate_avx2(void) {
    enum { N = 12, ROUNDS = 2000000 };
    __m256i sum[N], table = _mm256_set1_epi8(3);
    for (int i = 0; i < N; i++) sum[i] = _mm256_set1_epi8((char)i);
    const double before = seconds_now();
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            __asm__("" : "+x"(table));
            sum[i] = _mm256_add_epi8(sum[i], _mm256_shuffle_epi8(table, sum[(i + 5) % N]));
        }
    const double seconds = seconds_now() - before;
    for (int i = 1; i < N; i++) sum[0] = _mm256_add_epi8(sum[0], sum[i]);
    volatile int sink = _mm256_extract_epi8(sum[0], 0);
    (void)sink;
    return (double)ROUNDS * N * 128 / seconds;
}

/* Carry-save adders: 45 instructions for 16 bytes of 64 channels, without the bits that are counted. */
__attribute__((target("avx512f"))) double el_chip_rate_avx512_adders(void) {
    enum { N = 12, ROUNDS = 2000000 };
    __m512i sum[N], w = _mm512_set1_epi64(0x123456789abcdef);
    for (int i = 0; i < N; i++) sum[i] = _mm512_set1_epi64(i);
    const double before = seconds_now();
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            __asm__("" : "+v"(w));
            sum[i] = _mm512_ternarylogic_epi32(sum[i], w, sum[(i + 7) % N], 0x96);
        }
    const double seconds = seconds_now() - before;
    for (int i = 1; i < N; i++) sum[0] = _mm512_xor_si512(sum[0], sum[i]);
    volatile long long sink = _mm512_reduce_add_epi64(sum[0]);
    (void)sink;
    return (double)ROUNDS * N * 512 * 16 / 45 / seconds;
}

/* Xor, popcount and add: 8 channels of 64 bits. */
__attribute__((target("avx512f,avx512vpopcntdq"))) double el_chip_rate_avx512_popcount(void) {
    enum { N = 24, ROUNDS = 2000000 };
    __m512i sum[N], w = _mm512_set1_epi64(0x123456789abcdef);
    for (int i = 0; i < N; i++) sum[i] = _mm512_setzero_si512();
    const double before = seconds_now();
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 24
        for (int i = 0; i < N; i++) {
            __asm__("" : "+v"(w));
            sum[i] = _mm512_add_epi64(sum[i], _mm512_popcnt_epi64(_mm512_xor_si512(w, sum[(i + 7) % N])));
        }
    const double seconds = seconds_now() - before;
    for (int i = 1; i < N; i++) sum[0] = _mm512_add_epi64(sum[0], sum[i]);
    volatile long long sink = _mm512_reduce_add_epi64(sum[0]);
    (void)sink;
    return (double)ROUNDS * N * 512 / seconds;
}
#elif defined(EL_ARM)
/* Xor, popcount and add: 16 bytes. */
double el_chip_rate_neon(void) {
    enum { N = 16, ROUNDS = 2000000 };
    uint8x16_t sum[N], w = vdupq_n_u8(0x5a);
    for (int i = 0; i < N; i++) sum[i] = vdupq_n_u8((uint8_t)i);
    const double before = seconds_now();
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < N; i++) {
            __asm__("" : "+w"(w));
            sum[i] = vaddq_u8(sum[i], vcntq_u8(veorq_u8(w, sum[(i + 5) % N])));
        }
    const double seconds = seconds_now() - before;
    for (int i = 1; i < N; i++) sum[0] = vaddq_u8(sum[0], sum[i]);
    volatile int sink = vgetq_lane_u8(sum[0], 0);
    (void)sink;
    return (double)ROUNDS * N * 128 / seconds;
}
#endif
