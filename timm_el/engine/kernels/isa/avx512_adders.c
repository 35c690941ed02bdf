/* The counter of processors with AVX-512 that have no popcount of vectors: Skylake-X, Cascade Lake. 64 output channels
 * lie side by side, a byte of each string, so that a byte's sum is a channel's count and nothing is added across a
 * register.
 *
 * Short strings are looked up, as in avx2.c. In long ones, the bits that differ go through carry-save adders: a
 * register of ones, one of twos and so on hold the sum of 8 bits a channel, bit by bit, and a full adder makes two bits
 * of the same weight and the one that is held to one that is held and a carry of twice the weight. Of 16 bits of weight
 * 1 only one of weight 16 comes out, and only these are counted as they come:
 *
 *     w0 ^ x0, w1 ^ x1 -> ones   a carry of 2 -+-> twos   a carry of 4 -+-> fours   a carry of 8 -+-> eights   a carry
 *     w2 ^ x2, w3 ^ x3 -> ones   a carry of 2 -+          another one --+           another one --+            of 16
 *
 * With vpternlogd an adder is two instructions, or three with the two xors in front of it, so that a byte of 64
 * channels costs 2.8 instructions; a look-up costs 4.5.
 */
#include "../isa.h"

#if defined(EL_X86)
#include "avx512.h"
#include "lookup.h"
#include "target.h"

#include <immintrin.h>
EL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")

#define LANES 16
#include "vectors.h"

#define BLOCK 64
#define TILE 6
#define FEW_BYTES 16   /* a string as long is looked up; a byte holds the counts of 31 */
#define ADDER_PIXELS 3 /* whose adders are in registers at once */
#define PIECE 36       /* words of a string added at once: a byte holds the 16s of 62 words */

/* Set 64 counts to ones + 16 * sixteens, or add that to them. */
INLINE void write_counts(__m512i ones, __m512i sixteens, int first, int32_t *counts) {
    const __m512i factors = _mm512_set1_epi16(0x1001), zero = _mm512_setzero_si512();
    const __m512i low = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(ones, sixteens), factors);
    const __m512i high = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(ones, sixteens), factors);
    const __m512i wide[4] = {_mm512_unpacklo_epi16(low, zero), _mm512_unpackhi_epi16(low, zero),
                             _mm512_unpacklo_epi16(high, zero), _mm512_unpackhi_epi16(high, zero)};
    for (int i = 0; i < 4; i++, counts += 16)
        _mm512_storeu_si512(counts, first ? wide[i] : _mm512_add_epi32(wide[i], _mm512_loadu_si512(counts)));
}

/* ------------------------------------------------------------------------------------------------------------------ */

INLINE __m512i table_of(int half, uint8_t byte) {
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)el_differing_bits[half][byte]));
}

/* P pixels by 64 channels. */
INLINE void look_up(const el_strings *in, const uint8_t *weight, int32_t *counts, int stride, const int P) {
    const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512i sum[TILE];
    for (int p = 0; p < P; p++) sum[p] = zero;
    for (int s = 0; s < in->segments; s++) {
        const uint8_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint8_t *)in->base[p] + in->offsets[s];
        for (int j = 0; j < in->length; j++, weight += BLOCK) {
            const __m512i both = _mm512_loadu_si512(weight), w = _mm512_and_si512(both, low);
            const __m512i h = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            for (int p = 0; p < P; p++)
                sum[p] = _mm512_add_epi8(sum[p], _mm512_add_epi8(_mm512_shuffle_epi8(table_of(0, run[p][j]), w),
                                                                 _mm512_shuffle_epi8(table_of(1, run[p][j]), h)));
        }
    }
    for (int p = 0; p < P; p++) write_counts(sum[p], zero, 1, counts + p * stride);
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Inputs of a pixel, each byte four times: an instruction takes 32 bits of memory for all lanes, but not 8. Their
 * number is no power of two, so that the lines of several pixels do not compete for a set of the cache. */
typedef uint32_t repeated[PIECE * 8 + 16];

/* Repeat n words of a pixel's string, from word `from` on. */
INLINE void repeat_bytes(const el_strings *in, int pixel, int from, int n, uint32_t *to) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101)); /* lane i: byte i, four times */
    const int words = in->length / 8;
    for (int s = from / words, k = from % words; n > 0; s++, k = 0) {
        const char *run = in->base[pixel] + in->offsets[s];
        for (; k + 2 <= words && n >= 2; k += 2, n -= 2, to += 16) {
            const __m128i two = _mm_loadu_si128((const __m128i *)(const void *)(run + 8 * k));
            _mm512_storeu_si512(to, _mm512_shuffle_epi8(_mm512_broadcast_i32x4(two), places));
        }
        for (; k < words && n > 0; k++, n--, to += 8) {
            const __m256i one = _mm256_set1_epi64x((long long)word_at(run + 8 * k));
            _mm256_storeu_si256((__m256i *)to, _mm256_shuffle_epi8(one, _mm512_castsi512_si256(places)));
        }
    }
}

INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
INLINE __m512i not_c_where_b(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x74); }
INLINE __m512i not_c_where_a_is_not_b(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0xd4);
}

/* What is held of each pixel. */
typedef struct {
    __m512i ones[ADDER_PIXELS], twos[ADDER_PIXELS], fours[ADDER_PIXELS], eights[ADDER_PIXELS];
} held;

/* Add two bytes of the strings: ones + 2 * carry = ones + (w0 ^ x0) + (w1 ^ x1). With a = ones ^ w0 ^ x0 and b, the new
 * ones, = a ^ w1 ^ x1: where a bit of a is 1, one of ones and w0 ^ x0 is 1, and the carry is w1 ^ x1 = ~b; elsewhere
 * they are equal, and the carry is ones. Each instruction overwrites an operand that is no longer needed. */
INLINE void add2(held *h, const uint8_t *w, const repeated *x, int j, __m512i *carry, const int P) {
    const __m512i w0 = _mm512_loadu_si512(w + j * BLOCK), w1 = _mm512_loadu_si512(w + (j + 1) * BLOCK);
    for (int p = 0; p < P; p++) {
        const __m512i a = xor3(w0, h->ones[p], _mm512_set1_epi32((int)x[p][j]));
        const __m512i b = xor3(w1, a, _mm512_set1_epi32((int)x[p][j + 1]));
        carry[p] = not_c_where_b(h->ones[p], a, b);
        h->ones[p] = b;
    }
}

/* sum + 2 * carry = sum + a + b. Where a and b differ, the carry is the old sum, which the new one is not. */
INLINE void full_add(__m512i *sum, const __m512i *a, const __m512i *b, __m512i *carry, const int P) {
    for (int p = 0; p < P; p++) {
        sum[p] = xor3(sum[p], a[p], b[p]);
        carry[p] = not_c_where_a_is_not_b(a[p], b[p], sum[p]);
    }
}

INLINE void add4(held *h, const uint8_t *w, const repeated *x, int j, __m512i *carry, const int P) {
    __m512i a[ADDER_PIXELS], b[ADDER_PIXELS];
    add2(h, w, x, j, a, P);
    add2(h, w, x, j + 2, b, P);
    full_add(h->twos, a, b, carry, P);
}

INLINE void add8(held *h, const uint8_t *w, const repeated *x, int j, __m512i *carry, const int P) {
    __m512i a[ADDER_PIXELS], b[ADDER_PIXELS];
    add4(h, w, x, j, a, P);
    add4(h, w, x, j + 4, b, P);
    full_add(h->fours, a, b, carry, P);
}

/* Return the number of bits of each byte. */
INLINE __m512i count_bits(__m512i v) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_set1_epi8(15);
    return _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                           _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
}

/* Count `words` words, at most PIECE, of P pixels and 64 channels. */
INLINE void add_up(const repeated *x, const uint8_t *weight, int words, int first, int32_t *counts, int stride,
                   const int P) {
    held h;
    __m512i sixteens[ADDER_PIXELS], a[ADDER_PIXELS], b[ADDER_PIXELS], carry[ADDER_PIXELS];
    for (int p = 0; p < P; p++) h.ones[p] = h.twos[p] = h.fours[p] = h.eights[p] = sixteens[p] = _mm512_setzero_si512();
    int j = 0;
    for (; j + 16 <= 8 * words; j += 16, weight += 16 * BLOCK) {
        const repeated *at = (const repeated *)((const uint32_t *)x + j);
        add8(&h, weight, at, 0, a, P);
        add8(&h, weight, at, 8, b, P);
        full_add(h.eights, a, b, carry, P);
        for (int p = 0; p < P; p++) sixteens[p] = _mm512_add_epi8(sixteens[p], count_bits(carry[p]));
    }
    if (j < 8 * words) { /* a last word: a half adder */
        add8(&h, weight, (const repeated *)((const uint32_t *)x + j), 0, a, P);
        for (int p = 0; p < P; p++) {
            sixteens[p] = _mm512_add_epi8(sixteens[p], count_bits(_mm512_and_si512(h.eights[p], a[p])));
            h.eights[p] = _mm512_xor_si512(h.eights[p], a[p]);
        }
    }
    for (int p = 0; p < P; p++) {
        __m512i n = count_bits(h.eights[p]);
        n = _mm512_add_epi8(_mm512_add_epi8(n, n), count_bits(h.fours[p]));
        n = _mm512_add_epi8(_mm512_add_epi8(n, n), count_bits(h.twos[p]));
        n = _mm512_add_epi8(_mm512_add_epi8(n, n), count_bits(h.ones[p]));
        write_counts(n, sixteens[p], first, counts + p * stride);
    }
}

static void count_long(const el_strings *in, int tile, const uint8_t *weight, int channels, int32_t *counts,
                       int stride) {
    const int words = in->segments * (in->length / 8);
    repeated x[TILE] __attribute__((aligned(64)));
    for (int from = 0; from < words; from += PIECE) {
        const int n = words - from < PIECE ? words - from : PIECE, first = from == 0;
        for (int p = 0; p < tile; p++) repeat_bytes(in, p, from, n, x[p]);
        for (int c = 0; c < channels; c += BLOCK) {
            const uint8_t *w = weight + ((size_t)c * (size_t)words + (size_t)from * BLOCK) * 8;
            for (int p = 0; p < tile; p += ADDER_PIXELS)
                WITH_PIXELS(tile - p < ADDER_PIXELS ? tile - p : ADDER_PIXELS, ADDER_PIXELS,
                            add_up(x + p, w, n, first, counts + p * stride + c, stride, P))
        }
    }
}

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const int bytes = in->segments * in->length;
    const uint8_t *w = weight;
    if (bytes > FEW_BYTES) count_long(in, tile, w, channels, counts, stride);
    else
        for (int c = 0; c < channels; c += BLOCK, w += (size_t)bytes * BLOCK)
            WITH_PIXELS(tile, TILE, look_up(in, w, counts + c, stride, P))
}

const el_counter el_counter_avx512_adders = {
    .tile_pixels = TILE,
    .layout = EL_BYTES_OF_64,
    .packed_bytes = el_bytes_of_words,
    .pack = el_pack_avx512,
    .count = count,
    .expand = el_expand_avx512,
    .count_depthwise = el_count_depthwise_avx512,
};

EL_END_TARGET
#endif
