/* Run a program on an image and print what it says. See `usage`. */
#include "runner.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char usage[] =
    "usage: timm-el-run [--top K] [--bench N] [--threads T] [--isa NAME] [--verify] NET.program [IMAGE.npy]\n"
    "\n"
    "Print the outputs of a network that timm_el.export wrote. IMAGE.npy holds float32 (N, C, H, W) or (C, H, W), "
    "normalised\n"
    "as the network takes it, or uint8 (H, W, 3), a picture of the network's size.\n"
    "\n"
    "  --top K      print the K likeliest labels of each image and their probabilities, not all outputs\n"
    "  --bench N    run N times and print milliseconds\n"
    "  --threads T  threads (1)\n"
    "  --isa NAME   instruction set, instead of the best one that this processor runs\n"
    "  --verify     check the checksums of the whole file; alone, without an image, print what the file holds\n";

typedef struct {
    const char *program, *image, *isa;
    int top, bench, threads, verify;
} options;

int complain(const char *path, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "timm-el-run: %s: ", path);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return 0;
}

static int read_number(const char *name, const char *text, int *number) {
    char *after = NULL;
    const long n = text ? strtol(text, &after, 10) : 0;
    if (!text || after == text || *after || n < 1 || n > 1000000)
        return complain(name, "found %s, expected a number from 1 to 1000000", text ? text : "nothing");
    *number = (int)n;
    return 1;
}

static int read_options(int argc, char **argv, options *o) {
    const struct {
        const char *name;
        int *number;
    } numbers[] = {{"--top", &o->top}, {"--bench", &o->bench}, {"--threads", &o->threads}};
    for (int i = 1; i < argc; i++) {
        int known = 0;
        for (size_t j = 0; j < sizeof numbers / sizeof *numbers && !known; j++)
            if (!strcmp(argv[i], numbers[j].name)) {
                if (!read_number(numbers[j].name, argv[i + 1], numbers[j].number)) return 0;
                known = 1, i++;
            }
        if (known) continue;
        if (!strcmp(argv[i], "--verify")) o->verify = 1;
        else if (!strcmp(argv[i], "--isa") && argv[i + 1]) o->isa = argv[++i];
        else if (argv[i][0] == '-') return complain(argv[i], "this is no option\n%s", usage);
        else if (!o->program) o->program = argv[i];
        else if (!o->image) o->image = argv[i];
        else return complain(argv[i], "found a third file, expected a program and an image\n%s", usage);
    }
    if (!o->program || (!o->image && !o->verify))
        return complain("arguments", "expected a program and an image\n%s", usage);
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Label number i of the metadata, or its number. */
static void label_of(json metadata, int i, char *text, size_t bytes) {
    const json labels = json_get(metadata, "labels");
    json label = json_next(labels, (json){NULL, NULL});
    for (int j = 0; label.at && j < i; j++) label = json_next(labels, label);
    if (!json_text(label, text, bytes)) snprintf(text, bytes, "%d", i);
}

static void print_top(const float *row, int64_t n, int top, json metadata) {
    double sum = 0.;
    float most = row[0];
    unsigned char *taken = calloc((size_t)n, 1);
    for (int64_t i = 1; i < n; i++)
        if (row[i] > most) most = row[i];
    for (int64_t i = 0; i < n; i++) sum += exp((double)row[i] - (double)most);
    for (int k = 0; taken && k < top && k < n; k++) {
        char label[200];
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (!taken[i] && (best < 0 || row[i] > row[best])) best = i;
        taken[best] = 1;
        label_of(metadata, (int)best, label, sizeof label);
        printf("%-40s %.4f\n", label, exp((double)row[best] - (double)most) / sum);
    }
    free(taken);
}

/* One output, a line for each of its numbers, an empty line after it. */
static void print_output(const float *values, const int64_t *shape, int top, json metadata) {
    const int64_t row = shape[1] * shape[2] * shape[3];
    for (int64_t image = 0; image < shape[0]; image++, values += row) {
        if (top) print_top(values, row, top, metadata);
        else
            for (int64_t i = 0; i < row; i++) printf("%.9g\n", (double)values[i]);
        printf("\n");
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int print_times(const options *o, const el_ready *ready, const float *const *inputs, float *const *outputs) {
    double *times = malloc((size_t)o->bench * sizeof *times);
    if (!times) return complain("--bench", "there is no memory for %d times", o->bench);
    for (int i = -3; i < o->bench; i++) { /* a few to warm up */
        const double start = now();
        el_run_ready(ready, inputs, outputs);
        if (i >= 0) times[i] = now() - start;
    }
    qsort(times, (size_t)o->bench, sizeof *times, by_size);
    const double median = (times[(o->bench - 1) / 2] + times[o->bench / 2]) / 2;
    printf("median %.3f ms, min %.3f ms of %d runs, %d threads, %s\n", median, times[0], o->bench, o->threads,
           el_active());
    free(times);
    return 1;
}

static int run(const options *o, el_program *p, json metadata, const int64_t *shape, const float *images) {
    char error[300];
    const int n = el_outputs(p);
    int64_t *shapes = calloc((size_t)n, 4 * sizeof *shapes);
    float **outputs = calloc((size_t)n, sizeof *outputs);
    int fine = shapes && outputs;
    if (!fine) complain(o->program, "there is no memory");
    else if (el_inputs(p) != 1)
        fine = complain(o->program, "found %d inputs, expected one: use the C interface", el_inputs(p));
    else if (el_shapes(p, shape, shapes, error, sizeof error)) fine = complain(o->image, "%s", error);
    for (int i = 0; fine && i < n; i++) {
        const int64_t *s = shapes + 4 * i;
        outputs[i] = malloc((size_t)(s[0] * s[1] * s[2] * s[3]) * sizeof **outputs + 1);
        if (!outputs[i]) fine = complain(o->program, "there is no memory");
    }
    const el_ready *ready = fine ? el_make_ready(p, shape, o->threads, error, sizeof error) : NULL;
    if (fine && !ready) fine = complain(o->program, "%s", error);
    if (fine && el_run_ready(ready, &images, outputs))
        fine = complain(o->program, "it did not run: there is no memory");
    if (fine && o->bench) fine = print_times(o, ready, &images, outputs);
    for (int i = 0; i < n; i++) {
        if (fine && !o->bench) print_output(outputs[i], shapes + 4 * i, o->top, metadata);
        if (outputs) free(outputs[i]);
    }
    free(outputs), free(shapes);
    return fine;
}

static void print_inputs(const options *o, const el_program *p) {
    printf("%s: %d inputs, %d outputs, checksums right\n", o->program, el_inputs(p), el_outputs(p));
    for (int i = 0; i < el_inputs(p); i++) {
        int32_t c, h, w;
        el_input(p, i, &c, &h, &w);
        printf("input %d: %d channels, %d x %d pixels (0: any)\n", i, c, h, w);
    }
}

int main(int argc, char **argv) {
    options o = {.threads = 1};
    char error[300];
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) return fputs(usage, stdout) < 0;
    if (!read_options(argc, argv, &o)) return 1;
    if (o.isa && el_use(o.isa)) return !complain("--isa", "found %s, expected one of: %s", o.isa, el_bodies());
    el_program *p = el_open(o.program, o.verify, error, sizeof error);
    if (!p) return !complain(o.program, "%s", error);
    size_t bytes;
    const char *text = el_metadata(p, &bytes);
    const json metadata = {text, text ? text + bytes : NULL};
    int64_t shape[4];
    float *images = NULL;
    int fine = 1;
    if (o.image) fine = npy_read(o.image, metadata, shape, &images) && run(&o, p, metadata, shape, images);
    else print_inputs(&o, p);
    free(images);
    el_close(p);
    return !fine;
}
