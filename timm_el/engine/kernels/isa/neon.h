/* Functions of neon.c that every counter of 64-bit ARM takes. */
#include "../isa.h"

void el_pack_neon(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c, char *bits,
                  size_t step);
void el_expand_neon(const uint64_t *bits, size_t words, char *bytes);
void el_count_depthwise_neon(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride);
