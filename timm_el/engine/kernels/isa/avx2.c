/* AVX2. It has no popcount of vectors, but it looks up 32 values in a table of 16 with one instruction. So the popcount
 * of (weight xor activation), four bits at a time, is a look-up of the weight's four bits in the table that belongs to
 * the activation's four bits: 32 output channels side by side, one look-up and one add for 128 bits. */
#include "../isa.h"

#if defined(EL_X86)
#include "lookup.h"
#include "target.h"

#include <immintrin.h>
EL_TARGET("avx2,fma,popcnt")

#define LANES 8
#include "vectors.h"

#include "depthwise.h"
#include "depthwise_real.h"
#include "real.h"
#include "signs.h"
#include "unary.h"

INLINE uint64_t signs_of_word(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (flip) v = _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)(flip + i))));
        const __m256 t = threshold ? _mm256_loadu_ps(threshold + i) : _mm256_setzero_ps();
        word |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_GE_OQ)) << i;
    }
    for (; i < n; i++) word |= sign_bit(x, threshold, flip, i) << i;
    return word;
}

#define BLOCK 64
#define TILE 4
#define ROOM 31 /* bytes of a string whose counts, of 8 at most each, a byte can hold */

/* Write the counts of 64 channels, or add them: counts of the first 32 bytes of a block in bytes[0]. */
INLINE void write_counts_of_bytes(const __m256i *bytes, int first, int32_t *counts) {
    const __m256i zero = _mm256_setzero_si256();
    for (int i = 0; i < 2; i++, counts += 8) {
        const __m256i low = _mm256_unpacklo_epi8(bytes[i], zero), high = _mm256_unpackhi_epi8(bytes[i], zero);
        const __m256i wide[4] = {_mm256_unpacklo_epi16(low, zero), _mm256_unpackhi_epi16(low, zero),
                                 _mm256_unpacklo_epi16(high, zero), _mm256_unpackhi_epi16(high, zero)};
        for (int j = 0; j < 4; j++) {
            __m256i *to = (__m256i *)(counts + 16 * j);
            _mm256_storeu_si256(to, first ? wide[j] : _mm256_add_epi32(wide[j], _mm256_loadu_si256(to)));
        }
    }
}

INLINE __m256i table_of(int half, uint8_t byte) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)el_differing_bits[half][byte]));
}

/* P pixels by 64 channels. */
INLINE void count_tile(const el_strings *in, const uint8_t *weight, int32_t *counts, int stride, const int P) {
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i sum[TILE][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = zero;
    int room = ROOM, first = 1;
    for (int s = 0; s < in->segments; s++) {
        const uint8_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint8_t *)in->base[p] + in->offsets[s];
        for (int j = 0; j < in->length;) {
            const int end = in->length - j > room ? j + room : in->length;
            room -= end - j;
            for (; j < end; j++, weight += BLOCK) {
                __m256i w0 = _mm256_loadu_si256((const __m256i *)weight);
                __m256i w1 = _mm256_loadu_si256((const __m256i *)(weight + 32));
                const __m256i h0 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), low);
                const __m256i h1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), low);
                w0 = _mm256_and_si256(w0, low);
                w1 = _mm256_and_si256(w1, low);
                for (int p = 0; p < P; p++) {
                    const __m256i t0 = table_of(0, run[p][j]), t1 = table_of(1, run[p][j]);
                    sum[p][0] = _mm256_add_epi8(
                        sum[p][0], _mm256_add_epi8(_mm256_shuffle_epi8(t0, w0), _mm256_shuffle_epi8(t1, h0)));
                    sum[p][1] = _mm256_add_epi8(
                        sum[p][1], _mm256_add_epi8(_mm256_shuffle_epi8(t0, w1), _mm256_shuffle_epi8(t1, h1)));
                }
            }
            if (room && !(s + 1 == in->segments && j == in->length)) continue;
            for (int p = 0; p < P; p++) {
                write_counts_of_bytes(sum[p], first, counts + p * stride);
                sum[p][0] = sum[p][1] = zero;
            }
            room = ROOM;
            first = 0;
        }
    }
}

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const size_t block = (size_t)in->segments * (size_t)in->length * BLOCK;
    const uint8_t *w = weight;
    for (int c = 0; c < channels; c += BLOCK, w += block)
        WITH_PIXELS(tile, TILE, count_tile(in, w, counts + c, stride, P))
}

const el_counter el_counter_avx2 = {
    .tile_pixels = TILE,
    .layout = EL_BYTES_OF_64,
    .packed_bytes = el_bytes_of_words,
    .pack = pack,
    .count = count,
    .expand = expand,
    .count_depthwise = count_depthwise,
};

/* ------------------------------------------------------------------------------------------------------------------ */

#define REAL_TILE 6
#define WEIGHTS_AHEAD 8 /* rows to fetch in advance: the processor does not see that every fourth line is read */

/* P pixels by 16 channels: 12 chains of fused multiply-adds in registers. */
INLINE void dot_tile(const el_strings *in, const float *weight, float *out, int stride, const char *next, size_t step,
                     const int P) {
    __m256 sum[REAL_TILE][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = _mm256_setzero_ps();
    for (int s = 0; s < in->segments; s++) {
        const float *run[REAL_TILE];
        for (int p = 0; p < P; p++) run[p] = (const float *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 4; k++, weight += EL_REAL_BLOCK, next += step) {
            _mm_prefetch(next, _MM_HINT_T1);
            _mm_prefetch((const char *)(weight + WEIGHTS_AHEAD * EL_REAL_BLOCK), _MM_HINT_T0);
            const __m256 w0 = _mm256_loadu_ps(weight), w1 = _mm256_loadu_ps(weight + 8);
            for (int p = 0; p < P; p++) {
                const __m256 a = _mm256_broadcast_ss(run[p] + k);
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

static void dot(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next) {
    const size_t inputs = (size_t)in->segments * (size_t)(in->length / 4);
    const size_t step = next.bytes / (inputs * (size_t)((channels + 15) / 16));
    for (int c = 0; c < channels; c += 16, next.at += inputs * step) {
        const float *w = weight + (size_t)(c / EL_REAL_BLOCK) * EL_REAL_BLOCK * inputs + c % EL_REAL_BLOCK;
        WITH_PIXELS(tile, REAL_TILE, dot_tile(in, w, out + c, stride, next.at, step, P))
    }
}

const el_real el_real_avx2 = {
    .tile_pixels = REAL_TILE,
    .abs_mean = abs_mean,
    .dot = dot,
    .dot_depthwise = dot_depthwise,
    .pool = pool,
    .unary = unary,
    .epilogue = epilogue,
};

/* ------------------------------------------------------------------------------------------------------------------ */

/* Inputs are stored in 16 bits, for vpmaddwd. */
#define INPUT int16_t
#define ZERO 0
#include "quantize.h"

#define INT8_TILE 6

/* Add the products of 16 pairs. In two steps gcc takes all products first, and has no registers left for the sums. */
INLINE __m256i add_products(__m256i sum, __m256i w, __m256i x) {
    __m256i products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(w), "x"(x));
    return sum;
}

/* P pixels by 8 channels: 12 registers, of two sums a channel. */
INLINE void dot_int8_tile(const uint8_t *q, size_t step, int fours, const int8_t *weight, int32_t *sums, int stride,
                          const int P) {
    __m256i sum[INT8_TILE][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = _mm256_setzero_si256();
    for (int k = 0; k < fours; k++, weight += 256, q += 8) {
        _mm_prefetch((const char *)(weight + 256 * WEIGHTS_AHEAD), _MM_HINT_T0);
        const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weight));
        const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weight + 16)));
        for (int p = 0; p < P; p++) {
            const __m256i x = _mm256_set1_epi64x((long long)word_at(q + (size_t)p * step));
            sum[p][0] = add_products(sum[p][0], w0, x);
            sum[p][1] = add_products(sum[p][1], w1, x);
        }
    }
    for (int p = 0; p < P; p++) { /* channels 0 1 4 5 2 3 6 7 */
        const __m256i pairs = _mm256_hadd_epi32(sum[p][0], sum[p][1]);
        _mm256_storeu_si256((__m256i *)(sums + p * stride), _mm256_permute4x64_epi64(pairs, 0xd8));
    }
}

static void dot_int8(const uint8_t *q, size_t step, int tile, int inputs, const void *weight, int channels,
                     int32_t *sums, int stride, el_prefetch next) {
    (void)next;
    for (int c = 0; c < (channels + 63) / 64 * 64; c += 8) {
        const int8_t *w =
            (const int8_t *)weight + (size_t)(c / 64) * el_int8_block_bytes(inputs) + (size_t)(c % 64) * 4;
        WITH_PIXELS(tile, INT8_TILE, dot_int8_tile(q, step, (inputs + 3) / 4, w, sums + c, stride, P))
    }
}

const el_int8 el_int8_avx2 = {
    .tile_pixels = INT8_TILE, .input_bytes = sizeof(INPUT), .largest = largest, .quantize = quantize, .dot = dot_int8};

EL_END_TARGET
#endif
