/* expand() and count_depthwise() of a counter: a depthwise convolution has one bit per tap and channel, so its signs
 * and weights are bytes of -1 (for a bit of 1) and 0, and a register of bytes holds the counts of as many channels.
 *
 * Byte 4 i + j of a register belongs to channel j * LANES + i: the bytes j of its 32-bit lanes are then LANES channels
 * in order, and a shift and a mask make int32 of them. */

typedef int8_t vb __attribute__((vector_size(4 * LANES)));
typedef int8_t vb_loose __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

#define REGISTER (4 * LANES) /* channels, and bytes */

/* Return the register in which bit i of each byte of the 32-bit lane i is the bit of its channel, of channels
 * from part * REGISTER on. */
INLINE vu bits_in_lanes(uint64_t word, int part) {
#if LANES == 16
    (void)part;
    const __m512i bytes = _mm512_set1_epi64((long long)word); /* lanes 0 to 7: even bytes, 8 to 15: odd ones */
    const __m512i even = _mm512_shuffle_epi8(bytes, _mm512_set1_epi32(0x06040200));
    return (vu)_mm512_mask_shuffle_epi8(even, 0xffffffff00000000, bytes, _mm512_set1_epi32(0x07050301));
#elif LANES == 8
    return (vu){0} + (uint32_t)(word >> (32 * part));
#else
    uint32_t nibbles = (uint32_t)(word >> (16 * part) & 0xffff); /* one to each byte */
    nibbles = (nibbles | nibbles << 8) & 0x00ff00ff;
    nibbles = (nibbles | nibbles << 4) & 0x0f0f0f0f;
    return (vu){0} + nibbles;
#endif
}

static void expand(const uint64_t *bits, size_t words, char *bytes) {
    vu lane_bit;
    for (int i = 0; i < LANES; i++) lane_bit[i] = 0x01010101u << (i % 8);
    for (size_t w = 0; w < words; w++)
        for (int part = 0; part < 64 / REGISTER; part++, bytes += REGISTER) {
            const vb hit = (vb)((vb)(bits_in_lanes(bits[w], part) & lane_bit) == (vb)lane_bit);
            *(vb_loose *)(void *)bytes = hit;
        }
}

/* P pixels by REGISTER channels, which start at `at` bytes of a tap. */
INLINE void count_taps(const el_strings *in, size_t at, const char *weight, int32_t *counts, int stride, const int P) {
    const int taps = in->segments;
    for (int t = 0; t < taps;) {
        const int first = t == 0, end = taps - t > 255 ? t + 255 : taps; /* a byte holds 255 */
        vb sum[MOST_TILE];
        for (int p = 0; p < P; p++) sum[p] = (vb){0};
        for (; t < end; t++, weight += in->length) {
            const vb w = *(const vb_loose *)(const void *)(weight + at);
            for (int p = 0; p < P; p++)
                sum[p] -= *(const vb_loose *)(const void *)(in->base[p] + in->offsets[t] + at) ^ w;
        }
        for (int p = 0; p < P; p++)
            for (int j = 0; j < 4; j++) {
                int32_t *to = counts + (size_t)p * (size_t)stride + at + (size_t)(j * LANES);
                const vi n = (vi)((vu)sum[p] >> (8 * j) & 255);
                store_ints(to, first ? n : n + load_ints(to));
            }
    }
}

static void count_depthwise(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride) {
    for (int at = 0; at < in->length; at += REGISTER)
        WITH_PIXELS(tile, MOST_TILE, count_taps(in, (size_t)at, weight, counts, stride, P))
}
