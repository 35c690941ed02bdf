/* Numbers drawn, and programs put together. */
#include "net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

uint32_t el_crc32(uint32_t crc, const void *data, size_t bytes);

static uint64_t state = 88172645463325252u;

void draw_from(uint64_t seed) { state = seed * 2654435761u + 1; }

uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

int pick(int low, int high) { return low + (int)(draw() >> 33) % (high - low + 1); }

float real(void) {
    switch (pick(0, 80)) {
        case 0: return 0.f;
        case 1: return -0.f;
        case 2: return NAN;
        case 3: return INFINITY;
        case 4: return -INFINITY;
        case 5: return 1e-42f;
        case 6: return (float)pick(-1000, 1000);
    }
    return (float)(pick(-1000, 1000)) / 300.f;
}

float *reals(size_t n) {
    float *x = malloc((n ? n : 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = real();
    return x;
}

size_t size_of(const image *v) { return (size_t)v->n * (size_t)v->h * (size_t)v->w * (size_t)v->c; }

int same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, 4) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------------ */

el_step_record *net_step(net *n, int kind, int n_wires, const int32_t *wires) {
    el_step_record *s = n->steps + n->n_steps++;
    *s = (el_step_record){.kind = kind, .first_wire = n->n_wires, .n_wires = n_wires, .tensors = {-1, -1, -1, -1}};
    for (int i = 0; i < n_wires; i++) n->wires[n->n_wires + i] = wires[i];
    n->n_wires += n_wires;
    return s;
}

int net_tensor(net *n, int dtype, void *data, size_t bytes) {
    n->tensors[n->n_tensors] = (el_tensor_record){(uint32_t)dtype, 0, 0, bytes};
    n->data[n->n_tensors] = data;
    return n->n_tensors++;
}

void net_output(net *n, int value, int form) { n->outputs[n->n_outputs++] = (el_output_record){value, form, {0, 0}}; }

void net_free(net *n) {
    for (int i = 0; i < n->n_tensors; i++) free(n->data[i]);
}

static size_t append(char *to, size_t at, const void *from, size_t bytes) {
    if (to && bytes) memcpy(to + at, from, bytes);
    return at + bytes;
}

static size_t write_table(const net *n, const el_header *h, const el_tensor_record *tensors, char *to) {
    size_t at = append(to, 0, h, sizeof *h);
    at = append(to, at, n->inputs, (size_t)n->n_inputs * sizeof *n->inputs);
    at = append(to, at, n->outputs, (size_t)n->n_outputs * sizeof *n->outputs);
    at = append(to, at, n->steps, (size_t)n->n_steps * sizeof *n->steps);
    at = append(to, at, n->wires, (size_t)n->n_wires * sizeof *n->wires);
    at = append(to, at, "\0\0\0", (size_t)n->n_wires % 2 * 4);
    return append(to, at, tensors, (size_t)n->n_tensors * sizeof *tensors);
}

static el_header header_of(const net *n) {
    el_header h = {.magic = EL_MAGIC,
                   .version = EL_VERSION,
                   .n_inputs = (uint32_t)n->n_inputs,
                   .n_outputs = (uint32_t)n->n_outputs,
                   .n_steps = (uint32_t)n->n_steps,
                   .n_wires = (uint32_t)n->n_wires,
                   .n_tensors = (uint32_t)n->n_tensors};
    h.table_bytes = (uint32_t)write_table(n, &h, n->tensors, NULL);
    return h;
}

void *net_table(const net *n, size_t *bytes) {
    const el_header h = header_of(n);
    char *table = malloc(h.table_bytes);
    *bytes = write_table(n, &h, n->tensors, table);
    return table;
}

static size_t up(size_t n) { return (n + 63) / 64 * 64; }

void *net_file(const net *n, const char *metadata, size_t *bytes) {
    el_header h = header_of(n);
    el_tensor_record tensors[MOST_NET_TENSORS];
    h.meta_offset = h.table_bytes, h.meta_bytes = strlen(metadata),
    h.meta_crc = el_crc32(0, metadata, strlen(metadata));
    size_t at = up(h.table_bytes + h.meta_bytes);
    for (int i = 0; i < n->n_tensors; i++) {
        tensors[i] = n->tensors[i];
        tensors[i].offset = at;
        tensors[i].crc = el_crc32(0, n->data[i], tensors[i].bytes);
        at = up(at + tensors[i].bytes);
    }
    h.file_bytes = at;
    char *file = calloc(at, 1);
    write_table(n, &h, tensors, file);
    h.table_crc = el_crc32(0, file, h.table_bytes);
    memcpy(file, &h, sizeof h);
    memcpy(file + h.meta_offset, metadata, h.meta_bytes);
    for (int i = 0; i < n->n_tensors; i++) memcpy(file + tensors[i].offset, n->data[i], tensors[i].bytes);
    *bytes = at;
    return file;
}
