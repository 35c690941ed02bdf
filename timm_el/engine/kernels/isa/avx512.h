/* Functions of avx512.c that every counter with AVX-512 takes. */
#include "../isa.h"

void el_pack_avx512(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c,
                    char *bits, size_t step);
void el_expand_avx512(const uint64_t *bits, size_t words, char *bytes);
void el_count_depthwise_avx512(const el_strings *in, int tile, const char *weight, int32_t *counts, int stride);
