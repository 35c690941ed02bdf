/* Damage a program's file in many ways, open it, and run what opens. Nothing may happen but an error text: build it
 * with sanitizers.
 *
 *     ./damage NET.program [variants [seed]] */
#include "net.h"
#include "program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_WORK 2e7          /* multiply-accumulates of a variant that is run */
#define MOST_BYTES (64u << 20) /* and of its memory */

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static int opened, made_ready, ran, silent;

/* Checksums that are right again, so that what stands behind them is reached. */
static void mend(char *file, size_t bytes) {
    el_header h;
    memcpy(&h, file, sizeof h);
    const uint64_t records = (uint64_t)h.n_tensors * sizeof(el_tensor_record);
    if (h.table_bytes > bytes || h.table_bytes < sizeof h) return;
    for (uint64_t i = 0; records <= h.table_bytes - sizeof h && i < h.n_tensors; i++) {
        el_tensor_record t;
        char *at = file + (h.table_bytes - records) + i * sizeof t;
        memcpy(&t, at, sizeof t);
        if (t.bytes > bytes || t.offset > bytes - t.bytes) continue;
        t.crc = el_crc32(0, file + t.offset, t.bytes);
        memcpy(at, &t, sizeof t);
    }
    if (h.meta_bytes <= bytes && h.meta_offset <= bytes - h.meta_bytes)
        h.meta_crc = el_crc32(0, file + h.meta_offset, h.meta_bytes);
    h.table_crc = 0;
    memcpy(file, &h, sizeof h);
    h.table_crc = el_crc32(0, file, h.table_bytes);
    memcpy(file, &h, sizeof h);
}

static int32_t strange(int32_t was) {
    static const int32_t values[] = {0,   1,    -1,   2,     3,     7,     8,       63,      64,        65,
                                     255, 1023, 1024, 32767, 32768, 65536, 1 << 20, 1 << 24, INT32_MAX, INT32_MIN};
    switch (pick(0, 3)) {
        case 0: return (int32_t)((uint32_t)was + (uint32_t)pick(-3, 3));
        case 1: return (int32_t)((uint32_t)was << pick(0, 8));
        default: return values[pick(0, (int)(sizeof values / sizeof *values) - 1)];
    }
}

/* Some of the 32-bit words from `first` on, `words` of them, become others. */
static void change_words(char *file, size_t first, size_t words) {
    for (int n = pick(1, 3); n && words; n--) {
        int32_t word;
        char *at = file + first + 4 * (draw() % words);
        memcpy(&word, at, 4);
        word = strange(word);
        memcpy(at, &word, 4);
    }
}

/* One way of damaging it; the size that is left. */
static size_t spoil(char *file, size_t bytes) {
    el_header h;
    memcpy(&h, file, sizeof h);
    const size_t steps = sizeof h + sizeof(el_input_record) * h.n_inputs + sizeof(el_output_record) * h.n_outputs;
    const size_t tensors = h.table_bytes - sizeof(el_tensor_record) * h.n_tensors;
    const int way = pick(0, 7);
    if (way == 0 || way == 1)
        for (int n = pick(1, 8); n; n--) file[draw() % (way ? h.table_bytes : bytes)] ^= (char)(1 << pick(0, 7));
    if (way == 2) bytes = pick(0, 1) ? draw() % bytes : bytes - (size_t)pick(1, 200);
    if (way == 3) change_words(file, 8, sizeof h / 4 - 2);
    if (way == 4) change_words(file, sizeof h, h.table_bytes / 4 - sizeof h / 4);
    if (way == 5) change_words(file, steps, sizeof(el_step_record) / 4 * h.n_steps);
    if (way == 6) change_words(file, tensors, sizeof(el_tensor_record) / 4 * h.n_tensors);
    if (way == 7) change_words(file, h.table_bytes, (bytes - h.table_bytes) / 4);
    if (way == 2 && bytes >= sizeof h && pick(0, 1)) h.file_bytes = bytes, memcpy(file, &h, sizeof h);
    if (bytes >= sizeof h && pick(0, 6)) mend(file, bytes);
    return bytes;
}

/* It would run in reasonable time and memory. */
static int is_small(const el_ready *r) {
    double work = 0.;
    for (int i = 0; i < r->n_nodes; i++) {
        const el_node *s = r->nodes + i;
        const el_plan *p = &s->plan;
        work += (double)r->values[s->value].image;
        for (int j = 0; j < s->step->record->n_wires; j++)
            if (s->step->wires[j] >= 0) work += (double)r->values[s->step->wires[j]].image;
        if (s->kind == EL_CONV || s->kind == EL_INPUT_SCALE || s->kind == EL_POOL)
            work += (double)p->oh * p->ow * (p->conv.kh * p->conv.kw + p->pool.kh * p->pool.kw) * (1. + p->c_in) +
                    (double)p->oh * p->ow * p->c_out * (1. + p->conv.kh * p->conv.kw * (double)p->c_in / p->groups);
        if (s->layer && s->layer->bytes > MOST_BYTES) return 0;
    }
    for (int g = 0; g < r->n_groups; g++)
        if (r->groups[g].scratch > MOST_BYTES) return 0;
    return work < MOST_WORK && r->arena < MOST_BYTES;
}

static void run_it(el_program *p, int is_first, char *error, size_t error_bytes) {
    const int n_in = el_inputs(p), n_out = el_outputs(p);
    int64_t *in = calloc((size_t)n_in, 4 * sizeof *in), *out = calloc((size_t)n_out, 4 * sizeof *out);
    float **inputs = calloc((size_t)n_in, sizeof *inputs), **outputs = calloc((size_t)n_out, sizeof *outputs);
    int fits = 1;
    for (int i = 0; i < n_in; i++) {
        int32_t c, h, w;
        el_input(p, i, &c, &h, &w);
        const int64_t sizes[4] = {1, h ? h : 8, w ? w : 8, c};
        memcpy(in + 4 * i, sizes, sizeof sizes);
        fits = fits && (double)sizes[1] * (double)sizes[2] * (double)c < MOST_WORK;
    }
    const el_ready *r = fits ? el_make_ready(p, in, 1, error, error_bytes) : NULL;
    if (fits && !r && !*error) silent++;
    if (r && !el_shapes(p, in, out, error, error_bytes) && (is_first || is_small(r))) {
        made_ready++;
        for (int i = 0; i < n_in; i++)
            inputs[i] = reals((size_t)(in[4 * i] * in[4 * i + 1] * in[4 * i + 2] * in[4 * i + 3]));
        for (int i = 0; i < n_out; i++)
            outputs[i] =
                malloc((size_t)(out[4 * i] * out[4 * i + 1] * out[4 * i + 2] * out[4 * i + 3]) * sizeof(float));
        ran += !el_run_ready(r, (const float *const *)inputs, outputs);
    }
    for (int i = 0; i < n_in; i++) free(inputs[i]);
    for (int i = 0; i < n_out; i++) free(outputs[i]);
    free(in), free(out), free(inputs), free(outputs);
}

int main(int argc, char **argv) {
    const int variants = argc > 2 ? atoi(argv[2]) : 500;
    char error[200];
    if (argc > 3) draw_from((uint64_t)atoll(argv[3]));
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    if (!f) return 2;
    fseek(f, 0, SEEK_END);
    const size_t bytes = (size_t)ftell(f);
    char *whole = malloc(bytes);
    rewind(f);
    if (fread(whole, 1, bytes, f) != bytes) return 2;
    fclose(f);
    for (int i = 0; i < variants; i++) {
        char *file = malloc(bytes);
        memcpy(file, whole, bytes);
        const size_t left = i ? spoil(file, bytes) : bytes; /* the first is whole */
        char *exact = el_aligned_alloc(64, left ? left : 1);
        memcpy(exact, file, left);
        *error = 0;
        el_program *p = el_open_memory(exact, left, pick(0, 1), error, sizeof error);
        if (p) opened++, run_it(p, i == 0, error, sizeof error);
        else if (!*error) silent++;
        el_close(p);
        el_aligned_free(exact);
        free(file);
        if (i == 0 && !ran) {
            printf("the undamaged file does not run: %s\n", error);
            break;
        }
    }
    free(whole);
    printf("%d variants, %d opened, %d were made ready, %d ran, %d refused without a word\n", variants, opened,
           made_ready, ran, silent);
    return silent > 0 || !ran;
}
