/* The tables of lookup.h, 8 KB. */
#include "lookup.h"

uint8_t el_differing_bits[2][256][16] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0; i < 16; i++) {
            el_differing_bits[0][byte][i] = (uint8_t)__builtin_popcount((unsigned)(i ^ (byte & 15)));
            el_differing_bits[1][byte][i] = (uint8_t)__builtin_popcount((unsigned)(i ^ (byte >> 4)));
        }
}
