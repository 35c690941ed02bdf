/* The layout of int8 weights, see int8.h. */
#include "int8.h"

#include <string.h>

size_t el_int8_bytes(int inputs, int channels) { return (size_t)((channels + 63) / 64) * el_int8_block_bytes(inputs); }

void el_int8_lay_out(const int8_t *stored, int inputs, int channels, void *weight) {
    const size_t block = el_int8_block_bytes(inputs);
    memset(weight, 0, el_int8_bytes(inputs, channels));
    for (int c = 0; c < channels; c++, stored += inputs) {
        int8_t *to = (int8_t *)weight + (size_t)(c / 64) * block + (size_t)(c % 64) * 4;
        int32_t sum = 0;
        for (int i = 0; i < inputs; i++) {
            to[(size_t)(i / 4) * 256 + (size_t)(i % 4)] = stored[i];
            sum += stored[i];
        }
        memcpy((int8_t *)weight + (size_t)(c / 64 + 1) * block - (size_t)(64 - c % 64) * 4, &sum, 4);
    }
}
