/* Write a random program with one input, an image for it, and what it gives: net.program, image.npy, expected.txt.
 *
 *     ./write FOLDER SEED */
#include "net.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *open_in(const char *folder, const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f) exit(2);
    return f;
}

/* Version 1.0, float32 (N, C, H, W). */
static void write_npy(FILE *f, const image *v) {
    char header[128];
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);
    const int n = snprintf(header + 10, 100, "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d, %d, %d), }",
                           (int)v->n, (int)v->c, (int)v->h, (int)v->w);
    header[10 + n] = ' ';
    header[127] = '\n';
    fwrite(header, 1, sizeof header, f);
    for (int64_t b = 0; b < v->n; b++)
        for (int64_t c = 0; c < v->c; c++)
            for (int64_t p = 0; p < v->h * v->w; p++)
                fwrite(v->at + (b * v->h * v->w + p) * v->c + c, sizeof(float), 1, f);
    fclose(f);
}

static net n;
static image values[MOST_NET_STEPS + 1];

static void draw_net(void) {
    values[0] = (image){1, pick(5, 20), pick(5, 20), pick(1, 40), NULL};
    values[0].at = reals(size_of(values));
    n.n_inputs = 1;
    n.inputs[0] = (el_input_record){(int32_t)values[0].c, (int32_t)values[0].h, (int32_t)values[0].w, 0};
    while (n.n_steps < 12) {
        const int steps = n.n_steps, wires = n.n_wires, tensors = n.n_tensors;
        if (!draw_step(&n, values)) continue;
        values[1 + steps] = naive_step(&n, n.steps + steps, values);
        if (values[1 + steps].at) continue;
        while (n.n_tensors > tensors) free(n.data[--n.n_tensors]);
        n.n_steps = steps, n.n_wires = wires;
    }
    net_output(&n, n.n_steps, EL_FORM_IMAGE);
}

static void discard(void) {
    for (int i = 0; i <= n.n_steps; i++) free(values[i].at);
    net_free(&n);
    memset(&n, 0, sizeof n);
}

/* It gives some numbers that are finite: a text has one way to write each of them. */
static int is_plain(void) {
    const image *y = values + n.n_steps;
    for (size_t i = 0; i < size_of(y); i++)
        if (!isfinite(y->at[i])) return 0;
    return size_of(y) >= 3;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    draw_from((uint64_t)atoll(argv[2]));
    for (draw_net(); !is_plain(); draw_net()) discard();
    size_t bytes;
    void *file =
        net_file(&n, "{\"name\": \"net, \\\"drawn\\\"\", \"labels\": [\"first\", \"s\\u00e9cond [2], {\", \"third \\ud83d\\ude00\"]}",
                 &bytes);
    FILE *f = open_in(argv[1], "net.program");
    fwrite(file, 1, bytes, f);
    fclose(f);
    write_npy(open_in(argv[1], "image.npy"), values);
    f = open_in(argv[1], "expected.txt");
    for (size_t i = 0; i < size_of(values + n.n_steps); i++) fprintf(f, "%.9g\n", (double)values[n.n_steps].at[i]);
    fprintf(f, "\n");
    fclose(f);
    free(file);
    discard();
    return 0;
}
