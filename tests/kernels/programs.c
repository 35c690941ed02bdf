/* Random programs over all kinds of steps, on every instruction set and several numbers of threads, against the naive
 * interpreter; then several callers at once.
 *
 *     ./programs [cases [seed]] */
#include "net.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char sets[8][16];
static int n_sets, wrong, steps_seen[EL_KINDS];
static atomic_int runs; /* callers at once count, too */

static void report(const char *what, int number, int threads, const char *text) {
    printf("%s %d: differs, instruction set %s, %d threads: %s\n", what, number, el_active(), threads, text);
    wrong++;
}

typedef struct {
    net net;
    image values[MOST_NET_STEPS + MOST_NET_ENDS];
} subject;

static void draw_inputs(subject *s) {
    net *n = &s->net;
    n->n_inputs = pick(0, 3) ? 1 : 2;
    for (int i = 0; i < n->n_inputs; i++) {
        image *v = s->values + i;
        *v = i && pick(0, 1) ? s->values[0]
                             : (image){pick(0, 9) ? pick(1, 3) : 0, pick(1, 24), pick(1, 20), pick(1, 90), NULL};
        if (i) v->n = s->values[0].n;
        v->at = reals(size_of(v));
        n->inputs[i] = (el_input_record){(int32_t)v->c, pick(0, 1) ? 0 : (int32_t)v->h, 0, 0};
    }
}

/* Steps until there are as many as wanted; one that makes no sense is taken back. */
static void draw_subject(subject *s, int wanted) {
    net *n = &s->net;
    memset(s, 0, sizeof *s);
    draw_inputs(s);
    for (int tries = 0; n->n_steps < wanted && tries < 10 * wanted; tries++) {
        const int steps = n->n_steps, wires = n->n_wires, tensors = n->n_tensors;
        if (!draw_step(n, s->values)) continue;
        image y = naive_step(n, n->steps + steps, s->values);
        if (y.at) {
            s->values[n->n_inputs + steps] = y;
            steps_seen[n->steps[steps].kind]++;
            continue;
        }
        while (n->n_tensors > tensors) free(n->data[--n->n_tensors]);
        n->n_steps = steps, n->n_wires = wires;
    }
    const int values = n->n_inputs + n->n_steps, outputs = pick(1, 4);
    net_output(n, values - 1, EL_FORM_IMAGE);
    for (int i = 1; i < outputs; i++) net_output(n, pick(0, values - 1), EL_FORM_NHWC);
}

static void discard(subject *s) {
    for (int i = 0; i < s->net.n_inputs + s->net.n_steps; i++) free(s->values[i].at);
    net_free(&s->net);
}

static void sizes_of(const subject *s, int64_t *in) {
    for (int i = 0; i < s->net.n_inputs; i++) {
        const image *v = s->values + i;
        const int64_t sizes[4] = {v->n, v->h, v->w, v->c};
        memcpy(in + 4 * i, sizes, sizeof sizes);
    }
}

/* Make it ready and run it, or both in one call; compare all outputs; NULL or what is wrong. */
static const char *try(const subject *s, el_program *p, int threads, int at_once, char *text, size_t bytes) {
    const net *n = &s->net;
    int64_t in[4 * MOST_NET_ENDS], out[4 * MOST_NET_ENDS];
    const float *inputs[MOST_NET_ENDS];
    float *outputs[MOST_NET_ENDS];
    const char *bad = NULL;
    sizes_of(s, in);
    const el_ready *r = at_once ? NULL : el_make_ready(p, in, threads, text, bytes);
    if ((!r && !at_once) || el_shapes(p, in, out, text, bytes)) return text;
    for (int i = 0; i < n->n_inputs; i++) inputs[i] = s->values[i].at;
    for (int i = 0; i < n->n_outputs; i++) {
        const image *v = s->values + n->outputs[i].value;
        const int64_t sizes[4] = {v->n, v->h, v->w, v->c};
        if (memcmp(out + 4 * i, sizes, sizeof sizes)) bad = "the size of an output";
        outputs[i] = calloc(size_of(v) + 1, sizeof(float));
    }
    if (!bad && (at_once ? el_run(p, in, inputs, outputs, threads, text, bytes) : el_run_ready(r, inputs, outputs)))
        bad = "it does not run";
    for (int i = 0; i < n->n_outputs; i++) {
        const image *v = s->values + n->outputs[i].value;
        if (!bad && !same(outputs[i], v->at, size_of(v))) bad = "an output";
        free(outputs[i]);
    }
    atomic_fetch_add(&runs, 1);
    return bad;
}

static void describe(const net *n) {
    printf("  values:");
    for (int i = 0; i < n->n_steps; i++) {
        printf(" %d=%d(", n->n_inputs + i, n->steps[i].kind);
        for (int j = 0; j < n->steps[i].n_wires; j++) printf("%d ", n->wires[n->steps[i].first_wire + j]);
        printf(")");
    }
    printf(" outputs:");
    for (int i = 0; i < n->n_outputs; i++) printf(" %d", n->outputs[i].value);
    printf("\n");
}

static void one_program(int number) {
    subject *s = malloc(sizeof *s);
    char text[256];
    draw_subject(s, pick(0, 3) ? pick(1, 12) : 1);
    size_t bytes;
    void *table = net_table(&s->net, &bytes);
    const size_t some = sizeof(float) * size_of(s->values + pick(0, s->net.n_inputs + s->net.n_steps - 1));
    for (int b = 0; b < n_sets; b++) {
        el_use(sets[b]);
        el_program *p = el_program_new(table, bytes, (const void *const *)s->net.data, text, sizeof text);
        if (!p) report("program", number, 0, text);
        for (int threads = 1; p && threads <= 3; threads += 2)
            for (int large = 0; large < 3; large++) {
                el_large_image(large == 0 ? (size_t)1 << 40 : large == 1 ? 0 : some - 1);
                const char *bad = try(s, p, threads, large == 2, text, sizeof text);
                if (bad) report("program", number, threads, bad), describe(&s->net);
            }
        el_close(p);
    }
    free(table);
    discard(s);
    free(s);
}

/* ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    subject *s;
    el_program *p;
    const char *bad;
} caller;

static void *call(void *argument) {
    caller *c = argument;
    char text[256];
    for (int i = 0; i < 30 && !c->bad; i++)
        c->bad = try(c->s, c->p, 1 + i % 3, 0, text, sizeof text) ? "differs" : NULL;
    /* More than el_run remembers, while others run what it forgets. */
    for (int i = 0; i < 40 && !c->bad; i++)
        c->bad = try(c->s, c->p, 1 + i % 20, 1, text, sizeof text) ? "differs" : NULL;
    return NULL;
}

/* Four callers of one program at once, each with a thread of its own. */
static void callers_at_once(void) {
    subject *s = malloc(sizeof *s);
    caller c[4];
    pthread_t threads[4];
    char text[256];
    size_t bytes;
    draw_subject(s, 12);
    void *table = net_table(&s->net, &bytes);
    el_use(sets[0]);
    el_program *p = el_program_new(table, bytes, (const void *const *)s->net.data, text, sizeof text);
    for (int i = 0; i < 4; i++) {
        c[i] = (caller){s, p, NULL};
        pthread_create(&threads[i], NULL, call, &c[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        if (c[i].bad) report("callers at once", i, 3, c[i].bad);
    }
    el_close(p);
    free(table);
    discard(s);
    free(s);
}

int main(int argc, char **argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 200;
    if (argc > 2) draw_from((uint64_t)atoll(argv[2]));
    char names[64];
    strcpy(names, el_bodies());
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) strcpy(sets[n_sets++], name);
    for (int i = 0; i < cases; i++) one_program(i);
    for (int i = 0; i < 5; i++) callers_at_once();
    for (int k = 0; k < EL_KINDS; k++)
        if (cases >= 200 && steps_seen[k] < cases / 100) report("kind", k, steps_seen[k], "is drawn too seldom");
    printf("%d programs, %d runs, instruction sets %s: %d wrong\n", cases, atomic_load(&runs), el_bodies(), wrong);
    return wrong ? 1 : 0;
}
