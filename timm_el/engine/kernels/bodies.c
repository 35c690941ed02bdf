/* Which body runs, and how fast it is. */
#include "rows.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

const el_body *el_body_active = &el_body_portable;

static const el_body *const bodies[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &el_body_avx512, &el_body_avx2,
#elif defined(__aarch64__)
    &el_body_neon,
#endif
    &el_body_portable,
};
#define N_BODIES ((int)(sizeof bodies / sizeof *bodies))

#ifndef EL_HASH
#define EL_HASH ""
#endif

const char *el_hash(void) { return EL_HASH; }

const char *el_bodies(void) {
    static char names[64];
    names[0] = 0;
    for (int i = 0; i < N_BODIES; i++)
        if (bodies[i]->supported()) {
            if (names[0]) strcat(names, " ");
            strcat(names, bodies[i]->name);
        }
    return names;
}

int el_use(const char *name) {
    for (int i = 0; i < N_BODIES; i++)
        if (!strcmp(bodies[i]->name, name) && bodies[i]->supported()) {
            el_body_active = bodies[i];
            return EL_OK;
        }
    return EL_BAD_PLAN;
}

const char *el_active(void) { return el_body_active->name; }

double el_chip_rate(void) { return el_body_active->chip_rate(); }

double el_count_time(int words, int channels, int pixels, int repeats) {
    if (words < 1 || channels < 1 || pixels < 1 || repeats < 1) return 0.;
    const int stride = round_up(channels, EL_REAL_BLOCK);
    const size_t start = 0;
    uint64_t *rows = malloc(((size_t)channels + (size_t)pixels) * (size_t)words * 8);
    void *weight = el_aligned_alloc(64, el_body_active->weight_size(words, channels));
    int32_t *counts = malloc((size_t)MOST_TILE * (size_t)stride * sizeof(int32_t));
    double seconds = 0.;
    if (rows && weight && counts) {
        uint64_t seed = 88172645463325252u;
        for (size_t i = 0; i < ((size_t)channels + (size_t)pixels) * (size_t)words; i++) {
            seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
            rows[i] = seed;
        }
        if (el_body_active->lay_out) el_body_active->lay_out(rows, words, channels, weight);
        else memcpy(weight, rows, (size_t)channels / 8 * 8 * (size_t)words * 8);
        const uint64_t *x = rows + (size_t)channels * (size_t)words;
        struct timespec a, b;
        for (int r = 0; r < repeats; r++) {
            clock_gettime(CLOCK_MONOTONIC, &a);
            for (int i = 0; i < pixels; i += el_body_active->tile_pixels) {
                const uint64_t *strings[MOST_TILE];
                const int m = pixels - i < el_body_active->tile_pixels ? pixels - i : el_body_active->tile_pixels;
                for (int q = 0; q < m; q++) strings[q] = x + (size_t)(i + q) * (size_t)words;
                el_body_active->count(strings, m, &start, 1, words, weight, channels, counts, stride);
            }
            clock_gettime(CLOCK_MONOTONIC, &b);
            const double now = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
            if (r == 0 || now < seconds) seconds = now;
        }
    }
    free(rows);
    el_aligned_free(weight);
    free(counts);
    return seconds;
}
