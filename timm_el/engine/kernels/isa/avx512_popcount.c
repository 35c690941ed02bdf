/* The counter of processors with AVX512_VPOPCNTDQ. Eight channels of 64 bits fill a register; a tile of 6 pixels by 32
 * channels keeps its 24 sums in registers and costs xor, popcount and add for 512 bits. */
#include "../isa.h"

#if defined(EL_X86)
#include "avx512.h"
#include "target.h"

#include <immintrin.h>
EL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,popcnt")

#define LANES 16
#include "vectors.h"

#define TILE 6

/* P pixels by B blocks of 8 channels, `block` words from block to block. */
INLINE void count_tile(const el_strings *in, const uint64_t *weight, size_t block, int32_t *counts, int stride,
                       const int P, const int B) {
    __m512i sum[TILE][4];
    for (int p = 0; p < P; p++)
        for (int b = 0; b < B; b++) sum[p][b] = _mm512_setzero_si512();
    for (int s = 0; s < in->segments; s++) {
        const uint64_t *run[TILE];
        for (int p = 0; p < P; p++) run[p] = (const uint64_t *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 8; k++, weight += 8) {
            __m512i w[4];
            for (int b = 0; b < B; b++) w[b] = _mm512_loadu_si512(weight + (size_t)b * block);
            for (int p = 0; p < P; p++) {
                const __m512i a = _mm512_set1_epi64((long long)run[p][k]);
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

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const size_t block = (size_t)in->segments * (size_t)in->length; /* words of 8 channels */
    const uint64_t *w = weight;
    int c = 0;
    for (; c + 24 < channels; c += 32, w += 4 * block)
        WITH_PIXELS(tile, TILE, count_tile(in, w, block, counts + c, stride, P, 4))
    for (; c < channels; c += 8, w += block) WITH_PIXELS(tile, TILE, count_tile(in, w, block, counts + c, stride, P, 1))
}

const el_counter el_counter_avx512_popcount = {
    .tile_pixels = TILE,
    .layout = EL_WORDS_OF_8,
    .packed_bytes = el_bytes_of_words,
    .pack = el_pack_avx512,
    .count = count,
    .expand = el_expand_avx512,
    .count_depthwise = el_count_depthwise_avx512,
};

EL_END_TARGET
#endif
