/* count_depthwise() of a counter without instructions of its own: bit-sliced sums of the bits of 64 channels, so that plane
 * j of 64 bits holds bit j of all 64 counts. Four planes hold the counts of 15 taps. */

#define TAPS_AT_ONCE 15

/* Add 64 counts, or write them if they are the first ones. The planes are interleaved, so that nibble i of every[j] is the
 * count of channel 4 i + j; a vector of them, shifted by a nibble at a time, then gives neighbours. */
INLINE void write_counts(const uint64_t *planes, int first, int32_t *counts) {
    const uint64_t bits = 0x5555555555555555, pairs = 0x3333333333333333;
    uint64_t even[2], odd[2], every[4];
    for (int i = 0; i < 2; i++) {
        const uint64_t low = planes[2 * i], high = planes[2 * i + 1];
        even[i] = (low & bits) | (high & bits) << 1;
        odd[i] = (low >> 1 & bits) | (high & ~bits);
    }
    every[0] = (even[0] & pairs) | (even[1] & pairs) << 2;
    every[1] = (odd[0] & pairs) | (odd[1] & pairs) << 2;
    every[2] = (even[0] >> 2 & pairs) | (even[1] & ~pairs);
    every[3] = (odd[0] >> 2 & pairs) | (odd[1] & ~pairs);
    for (int half = 0; half < 2; half++, counts += 32) {
        uint32_t lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = (uint32_t)(every[i % 4] >> (32 * half + i / 4 * 4));
        const vu nibbles = (vu)load_ints(lanes);
        for (int i = 0; i < 32; i += LANES) {
            const vi n = (vi)(nibbles >> i & 15);
            store_ints(counts + i, first ? n : n + load_ints(counts + i));
        }
    }
}

static void count_depthwise(const el_strings *in, int tile, const void *weight, int32_t *counts, int stride) {
    const int taps = in->segments, words = in->length / 8;
    for (int p = 0; p < tile; p++)
        for (int w = 0; w < words; w++) {
            const uint64_t *bits = (const uint64_t *)weight + w;
            const char *x = in->base[p] + 8 * w;
            for (int t = 0; t < taps;) {
                const int first = t == 0, end = taps - t > TAPS_AT_ONCE ? t + TAPS_AT_ONCE : taps;
                uint64_t planes[4] = {0};
                for (; t < end; t += 2) {
                    const uint64_t a = word_at(x + in->offsets[t]) ^ bits[(size_t)t * (size_t)words];
                    const uint64_t b = t + 1 < end ? word_at(x + in->offsets[t + 1]) ^ bits[(size_t)(t + 1) * (size_t)words] : 0;
                    const uint64_t differ = planes[0] ^ a, carry = (planes[0] & a) | (differ & b), more = planes[1] & carry;
                    planes[0] = differ ^ b;
                    planes[1] ^= carry;
                    planes[3] ^= planes[2] & more;
                    planes[2] ^= more;
                }
                t = end;
                write_counts(planes, first, counts + (size_t)p * (size_t)stride + 64 * w);
            }
        }
}
