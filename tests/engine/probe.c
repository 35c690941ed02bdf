/* A program that knows nothing of the library but engine.h: it loads it, runs a few convolutions, prints their bits.
 *
 *     cc -I KERNELS probe.c -o probe && ./probe LIBRARY
 *
 * The same numbers on every platform are what a wheel promises. Weights, images and constants come from one generator.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <windows.h>
#define OPEN(path) ((void *)LoadLibraryA(path))
#define FIND(library, name) ((void *)GetProcAddress((HMODULE)library, name))
#else
#include <dlfcn.h>
#define OPEN(path) dlopen(path, RTLD_NOW)
#define FIND(library, name) dlsym(library, name)
#endif

static uint64_t state = 88172645463325252u;

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static float *reals(size_t n) {
    float *x = malloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = (float)((int)(draw() >> 40) - (1 << 23)) / (float)(1 << 21);
    return x;
}

int main(int argc, char **argv) {
    void *library = argc == 2 ? OPEN(argv[1]) : NULL;
    if (!library) return fprintf(stderr, "probe: cannot open the library\n"), 2;
    const char *(*hash)(void) = NULL, *(*bodies)(void) = NULL;
    int (*use)(const char *) = NULL, (*own_layout)(void) = NULL;
    int (*conv)(const el_plan *, const float *, const float *, const float *, float *, int) = NULL;
    size_t (*weight_size)(const el_plan *) = NULL;
    void (*lay_out)(const el_plan *, const void *, void *) = NULL;
    void (*tap_sums)(const el_plan *, const void *, int32_t *) = NULL;
    const struct { const char *name; void *to; } names[] = {
        {"el_hash", &hash}, {"el_bodies", &bodies}, {"el_use", &use}, {"el_own_layout", &own_layout}, {"el_conv", &conv},
        {"el_weight_size", &weight_size}, {"el_lay_out", &lay_out}, {"el_tap_sums", &tap_sums}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *found = FIND(library, names[i].name);
        if (!found) return fprintf(stderr, "probe: no %s\n", names[i].name), 2;
        memcpy(names[i].to, &found, sizeof found);
    }
    printf("%s\n", hash());
    char known[256];
    snprintf(known, sizeof known, "%s", bodies());
    for (char *name = strtok(known, " "); name; name = strtok(NULL, " ")) {
        if (use(name)) return fprintf(stderr, "probe: %s cannot be used\n", name), 2;
        uint64_t sum = 14695981039346656037u; /* FNV-1a over the bytes of all outputs */
        state = 88172645463325252u;
        for (int i = 0; i < 12; i++) {
            const int c = 16 + 24 * (i % 4), o = i % 3 ? 64 : 40, k = i % 2 ? 3 : 1, real = i % 4 == 3, h = 9, w = 11;
            el_plan p = {.n = 1, .h = h, .w = w, .c_in = c, .oh = h, .ow = w, .c_out = o, .groups = 1, .real = real,
                         .conv = {k, k, 1, 1, k / 2, k / 2, 1, 1}, .pool = {1, 1, 1, 1, 0, 0, 1, 1}, .has_k = !real && i % 5 == 0,
                         .act = EL_ACT_CLIP, .lo = 0.f, .hi = 6.f, .inverse_gamma = 1.f, .table_stride = (o + 30) / 16 * 16};
            float *table = calloc((size_t)(2 * p.table_stride), sizeof(float)), *constants = reals((size_t)(2 * o));
            for (int r = 0; r < 2; r++) memcpy(table + r * p.table_stride, constants + r * o, (size_t)o * sizeof(float));
            p.table = table;
            const size_t words = (size_t)((c + 63) / 64), taps = (size_t)(k * k), blocks = (size_t)((o + 7) / 8);
            void *stored, *ready = NULL;
            int32_t *sums = NULL;
            if (real) {
                stored = reals((size_t)((o + 63) / 64) * taps * (size_t)c * 64);
            } else { /* see layout.py; bits beyond the channels are zero */
                uint64_t *bits = stored = calloc(blocks * taps * words * 8, 8);
                for (size_t j = 0; j < blocks * taps * words * 8; j++) {
                    const size_t word = j / 8 % words, left = (size_t)c - 64 * word;
                    bits[j] = draw() & (left >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << left) - 1);
                }
            }
            p.weight = stored;
            if (!real && k > 1) {
                sums = calloc(taps * (size_t)p.table_stride, sizeof(int32_t));
                tap_sums(&p, stored, sums);
                p.tap_sums = sums;
            }
            if (!real && own_layout()) {
                ready = calloc(weight_size(&p) + 64, 1);
                lay_out(&p, stored, (void *)(((uintptr_t)ready + 63) / 64 * 64));
                p.weight = (void *)(((uintptr_t)ready + 63) / 64 * 64);
            }
            float *x = reals((size_t)(h * w * c)), *y = calloc((size_t)(h * w * o), sizeof(float));
            if (conv(&p, x, NULL, NULL, y, 1 + i % 2)) return fprintf(stderr, "probe: case %d is refused\n", i), 2;
            for (size_t j = 0; j < (size_t)(h * w * o) * sizeof(float); j++) sum = (sum ^ ((uint8_t *)y)[j]) * 1099511628211u;
            free(table), free(constants), free(stored), free(ready), free(sums), free(x), free(y);
        }
        printf("%s %016llx\n", name, (unsigned long long)sum);
    }
    return 0;
}
