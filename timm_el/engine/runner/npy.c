/* Images from a file of NumPy: float32 (N, C, H, W) or (C, H, W), as the network takes them, or bytes (H, W, 3), a
 * picture. */
#include "runner.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_NUMBERS ((int64_t)1 << 31)

typedef struct {
    int is_float, axes;
    int64_t shape[4], count;
} npy;

/* What follows 'key': in the header, a Python dictionary; NULL if it is not there. */
static const char *after_key(const char *header, const char *key) {
    const char *p = strstr(header, key);
    if (!p) return NULL;
    p += strlen(key);
    while (*p == ' ' || *p == ':') p++;
    return p;
}

static int read_shape(const char *p, npy *a) {
    a->axes = 0, a->count = 1;
    if (!p || *p++ != '(') return 0;
    while (*p != ')') {
        char *after;
        const long long n = strtoll(p, &after, 10);
        if (after == p || n < 0 || n > MOST_NUMBERS || a->axes == 4) return 0;
        a->shape[a->axes++] = n;
        a->count *= n;
        if (a->count > MOST_NUMBERS) return 0;
        for (p = after; *p == ',' || *p == ' '; p++) {}
    }
    return 1;
}

static int read_header(const char *path, FILE *f, npy *a) {
    unsigned char start[12];
    if (fread(start, 1, 10, f) != 10 || memcmp(start, "\x93NUMPY", 6) || start[6] < 1 || start[6] > 2)
        return complain(path, "this is no .npy file of version 1 or 2");
    uint32_t length = start[8] | (uint32_t)start[9] << 8;
    if (start[6] == 2) {
        if (fread(start + 10, 1, 2, f) != 2) return complain(path, "the header is cut off");
        length |= (uint32_t)start[10] << 16 | (uint32_t)start[11] << 24;
    }
    char header[4096];
    if (length >= sizeof header || fread(header, 1, length, f) != length)
        return complain(path, "found a header of %u bytes, expected fewer than %zu, and the file to have them", length,
                        sizeof header);
    header[length] = 0;
    const char *type = after_key(header, "'descr'"), *order = after_key(header, "'fortran_order'");
    a->is_float = type && !strncmp(type, "'<f4'", 5);
    if (!a->is_float && !(type && !strncmp(type, "'|u1'", 5)))
        return complain(path, "found the type %.12s, expected '<f4' (float32) or '|u1' (uint8)", type ? type : "none");
    if (!order || strncmp(order, "False", 5))
        return complain(path, "found Fortran's order, expected that of C: use numpy.ascontiguousarray");
    if (!read_shape(after_key(header, "'shape'"), a))
        return complain(path, "the shape is no tuple of up to 4 numbers");
    return 1;
}

static int read_floats(const char *path, FILE *f, const npy *a, int64_t *shape, float **images) {
    if (a->axes < 3) return complain(path, "found %d axes of float32, expected (N, C, H, W) or (C, H, W)", a->axes);
    const int64_t *s = a->shape + a->axes - 3, n = a->axes == 4 ? a->shape[0] : 1, pixels = s[1] * s[2];
    const int64_t sizes[4] = {n, s[1], s[2], s[0]};
    memcpy(shape, sizes, sizeof sizes);
    float *nchw = malloc((size_t)a->count * sizeof *nchw + 1),
          *y = *images = malloc((size_t)a->count * sizeof **images + 1);
    int fits = nchw && y;
    if (!fits) complain(path, "there is no memory for %lld numbers", (long long)a->count);
    else if (fread(nchw, sizeof *nchw, (size_t)a->count, f) != (size_t)a->count)
        fits = complain(path, "found fewer numbers than the shape says");
    for (int64_t i = 0; fits && a->count && i < n; i++)
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0; c < s[0]; c++) *y++ = nchw[(i * s[0] + c) * pixels + p];
    free(nchw);
    return fits;
}

/* (x / 255 - mean) / std of each colour. */
static int read_picture(const char *path, FILE *f, const npy *a, json metadata, int64_t *shape, float **images) {
    const json how = json_get(metadata, "preprocess");
    double size[2], mean[3], deviation[3];
    if (json_numbers(json_get(how, "size"), size, 2) != 2 || json_numbers(json_get(how, "mean"), mean, 3) != 3 ||
        json_numbers(json_get(how, "std"), deviation, 3) != 3)
        return complain(
            path,
            "found bytes, but the program does not say how a picture becomes numbers; expected float32 (N, C, H, W)");
    if (a->axes != 3 || a->shape[2] != 3 || (double)a->shape[0] != size[0] || (double)a->shape[1] != size[1])
        return complain(path,
                        "found %d axes of bytes, %lld x %lld x %lld, expected (%.0f, %.0f, 3): resize the picture",
                        a->axes, (long long)a->shape[0], (long long)(a->axes > 1 ? a->shape[1] : 0),
                        (long long)(a->axes > 2 ? a->shape[2] : 0), size[0], size[1]);
    const int64_t sizes[4] = {1, a->shape[0], a->shape[1], 3};
    memcpy(shape, sizes, sizeof sizes);
    float *y = *images = malloc((size_t)a->count * sizeof **images + 1);
    if (!y) return complain(path, "there is no memory for %lld numbers", (long long)a->count);
    for (int64_t i = 0; i < a->count; i++) {
        const int byte = fgetc(f);
        if (byte == EOF) return complain(path, "found fewer bytes than the shape says");
        *y++ = ((float)byte / 255.f - (float)mean[i % 3]) / (float)deviation[i % 3];
    }
    return 1;
}

int npy_read(const char *path, json metadata, int64_t *shape, float **images) {
    npy a = {0, 0, {0}, 0};
    *images = NULL;
    FILE *f = fopen(path, "rb");
    if (!f) return complain(path, "the file cannot be read");
    int fine = read_header(path, f, &a);
    if (fine)
        fine =
            a.is_float ? read_floats(path, f, &a, shape, images) : read_picture(path, f, &a, metadata, shape, images);
    fclose(f);
    if (!fine) free(*images), *images = NULL;
    return fine;
}
