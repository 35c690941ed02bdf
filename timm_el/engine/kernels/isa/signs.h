/* pack() of a counter, from signs_of_word(), which the including file defines. */

/* Return one sign, for what is left over where an instruction set takes several at a time. */
INLINE uint64_t sign_bit(const float *x, const float *threshold, const uint32_t *flip, int i) {
    uint32_t value;
    float v;
    memcpy(&value, x + i, 4);
    if (flip) value ^= flip[i];
    memcpy(&v, &value, 4);
    return v >= (threshold ? threshold[i] : 0.f);
}

/* Return the signs of n floats, 1 to 64, as the low bits of a word; the others are 0. */
INLINE uint64_t signs_of_word(const float *x, const float *threshold, const uint32_t *flip, int n);

/* Pack one pixel; whatever is constant is compiled away. */
INLINE void pack_pixel(const float *x, const float *threshold, const uint32_t *flip, int c, char *bits) {
    for (int i = 0; i < c; i += 64, bits += 8) {
        const uint64_t word =
            signs_of_word(x + i, threshold ? threshold + i : NULL, flip ? flip + i : NULL, c - i < 64 ? c - i : 64);
        memcpy(bits, &word, 8);
    }
}

static void pack(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c, char *bits,
                 size_t step) {
    const int plain = !flip && c % 64 == 0; /* the commonest ones */
    for (; n > 0; n--, x += x_step, bits += step)
        if (plain && !threshold) pack_pixel(x, NULL, NULL, c / 64 * 64, bits);
        else if (plain) pack_pixel(x, threshold, NULL, c / 64 * 64, bits);
        else pack_pixel(x, threshold, flip, c, bits);
}
