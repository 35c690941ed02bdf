/* A program: its table, checked and taken apart, and its weights as the instruction set in use needs them. */
#include "program.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int el_say(const el_error *e, const char *format, ...) {
    if (!e->text || !e->bytes) return EL_BAD_PLAN;
    int at = 0;
    if (e->step >= 0) at = snprintf(e->text, e->bytes, "step %d (%s): ", e->step, e->kind);
    if (at < 0 || (size_t)at >= e->bytes) return EL_BAD_PLAN;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(e->text + at, e->bytes - (size_t)at, format, arguments);
    va_end(arguments);
    return EL_BAD_PLAN;
}

int el_say_no_memory(const el_error *e) {
    el_say(e, "there is no memory");
    return EL_NO_MEMORY;
}

/* ------------------------------------------------------------------------------------------------------------------ */

static int check_header(const el_header *h, size_t bytes, const el_error *e) {
    if (bytes < sizeof *h) return el_say(e, "found %zu bytes, expected a table of at least %zu", bytes, sizeof *h);
    if (memcmp(h->magic, EL_MAGIC, sizeof h->magic))
        return el_say(e, "this is no program: it does not begin with 'timm_el' and 1");
    if (h->version != EL_VERSION) return el_say(e, "the program has version %u, expected %d", h->version, EL_VERSION);
    if (h->n_inputs < 1 || h->n_inputs > EL_MAX_ENDS)
        return el_say(e, "found %u inputs, expected 1 to %d", h->n_inputs, EL_MAX_ENDS);
    if (h->n_outputs < 1 || h->n_outputs > EL_MAX_ENDS)
        return el_say(e, "found %u outputs, expected 1 to %d", h->n_outputs, EL_MAX_ENDS);
    if (h->n_steps > EL_MAX_STEPS) return el_say(e, "found %u steps, expected at most %d", h->n_steps, EL_MAX_STEPS);
    const uint64_t expected = sizeof *h + sizeof(el_input_record) * (uint64_t)h->n_inputs +
                              sizeof(el_output_record) * (uint64_t)h->n_outputs +
                              sizeof(el_step_record) * (uint64_t)h->n_steps + ((uint64_t)h->n_wires + 1) / 2 * 8 +
                              sizeof(el_tensor_record) * (uint64_t)h->n_tensors;
    if (h->table_bytes != expected || expected > bytes)
        return el_say(
            e, "the table says %u bytes, its numbers of records %llu, and there are %zu; expected them to agree",
            h->table_bytes, (unsigned long long)expected, bytes);
    return EL_OK;
}

static int check_ends(const el_program *p, const el_error *e) {
    for (int i = 0; i < p->n_inputs; i++) {
        const el_input_record *r = p->inputs + i;
        if (r->channels < 1 || r->channels > EL_MAX_CHANNELS || r->height < 0 || r->width < 0)
            return el_say(e, "input %d has %d channels, %d x %d pixels, expected 1 to %d channels, and 0 for any size",
                          i, r->channels, r->height, r->width, EL_MAX_CHANNELS);
    }
    for (int i = 0; i < p->n_outputs; i++) {
        const el_output_record *r = p->outputs + i;
        if (r->value < 0 || r->value >= p->n_values || r->form < 0 || r->form >= EL_FORMS)
            return el_say(e, "output %d is value %d in form %d, expected one of %d values and of %d forms", i,
                          r->value, r->form, p->n_values, EL_FORMS);
    }
    return EL_OK;
}

/* What must hold before a step's record can be read any further. */
static int take_step(el_program *p, int i, const el_step_record *r, const int32_t *wires, const void *const *tensors,
                     el_error *e) {
    el_program_step *s = p->steps + i;
    const el_header *h = &p->header;
    e->step = i;
    e->kind = r->kind >= 0 && r->kind < EL_KINDS ? el_kind_names[r->kind] : "unknown";
    if (r->kind < 0 || r->kind >= EL_KINDS) return el_say(e, "kind is %d, expected one of %d", r->kind, EL_KINDS);
    if (r->n_wires < 0 || r->first_wire < 0 || (int64_t)r->first_wire + r->n_wires > h->n_wires)
        return el_say(e, "its %d wires begin at %d, of %u wires", r->n_wires, r->first_wire, h->n_wires);
    s->record = r;
    s->wires = wires + r->first_wire;
    for (int j = 0; j < r->n_wires; j++)
        if (s->wires[j] < -1 || s->wires[j] >= p->n_inputs + i)
            return el_say(e, "wire %d is value %d, expected one of the %d before it", j, s->wires[j], p->n_inputs + i);
    for (int j = 0; j < EL_TENSORS; j++) {
        const int at = r->tensors[j];
        if (at < -1 || (at >= 0 && (uint32_t)at >= h->n_tensors))
            return el_say(e, "tensor %d is number %d, of %u", j, at, h->n_tensors);
        if (at < 0) continue;
        s->tensors[j] = tensors[at];
        s->bytes[j] = (int64_t)p->tensors[at].bytes;
        if (!s->tensors[j]) return el_say(e, "tensor %d has no memory", j);
    }
    return el_check_step(s, p->tensors, e);
}

static int take_table(el_program *p, const void *const *tensors, el_error *e) {
    const el_header *h = &p->header;
    const el_step_record *steps;
    const int32_t *wires;
    p->n_inputs = (int)h->n_inputs, p->n_outputs = (int)h->n_outputs, p->n_steps = (int)h->n_steps;
    p->n_values = p->n_inputs + p->n_steps;
    p->inputs = (const void *)((char *)p->table + sizeof *h);
    p->outputs = (const void *)(p->inputs + p->n_inputs);
    steps = (const void *)(p->outputs + p->n_outputs);
    wires = (const void *)(steps + p->n_steps);
    p->tensors = (const void *)(wires + ((size_t)h->n_wires + 1) / 2 * 2);
    p->steps = calloc((size_t)p->n_steps + 1, sizeof *p->steps);
    if (!p->steps) return el_say_no_memory(e);
    for (uint32_t i = 0; i < h->n_tensors; i++) {
        const el_tensor_record *t = p->tensors + i;
        if (t->dtype >= EL_DTYPES || t->bytes < 1 || t->bytes > EL_MAX_TENSOR_BYTES)
            return el_say(e, "tensor %u has dtype %u and %llu bytes, expected one of %d types and at most %lld bytes",
                          i, t->dtype, (unsigned long long)t->bytes, EL_DTYPES, (long long)EL_MAX_TENSOR_BYTES);
    }
    for (int i = 0; i < p->n_steps; i++) {
        const int bad = take_step(p, i, steps + i, wires, tensors, e);
        if (bad) return bad;
    }
    e->step = -1;
    return check_ends(p, e);
}

el_program *el_program_new(const void *table, size_t bytes, const void *const *tensors, char *text,
                           size_t text_bytes) {
    el_error e = {text, text_bytes, -1, ""};
    el_header header;
    memset(&header, 0, sizeof header);
    if (bytes >= sizeof header) memcpy(&header, table, sizeof header);
    if (check_header(&header, bytes, &e)) return NULL;
    el_program *p = calloc(1, sizeof *p);
    if (!p || !(p->table = malloc(header.table_bytes))) {
        free(p);
        el_say_no_memory(&e);
        return NULL;
    }
    memcpy(p->table, table, header.table_bytes);
    p->header = header;
    p->verified = 1;
    if (take_table(p, tensors, &e)) {
        el_close(p);
        return NULL;
    }
    return p;
}

void el_close(el_program *p) {
    if (!p) return;
    for (el_ready *r = p->ready, *next; r; r = next) {
        next = r->next;
        el_free_ready(r);
    }
    for (int i = 0; p->steps && i < p->n_steps; i++) free(p->steps[i].spans);
    el_aligned_free(p->weights);
    el_unmap(p);
    free(p->steps);
    free(p->table);
    free(p);
}

const char *el_metadata(const el_program *p, size_t *bytes) {
    if (bytes) *bytes = p->metadata ? (size_t)p->header.meta_bytes : 0;
    return p->metadata;
}

int el_inputs(const el_program *p) { return p->n_inputs; }

int el_outputs(const el_program *p) { return p->n_outputs; }

int el_input(const el_program *p, int i, int32_t *channels, int32_t *height, int32_t *width) {
    if (i < 0 || i >= p->n_inputs) return EL_BAD_PLAN;
    *channels = p->inputs[i].channels, *height = p->inputs[i].height, *width = p->inputs[i].width;
    return EL_OK;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Enough of a plan for weights: they do not depend on the size of images. */
static el_plan plan_of_weights(const el_program_step *s) {
    const int32_t *ints = s->record->ints;
    el_plan plan = {.c_in = ints[EL_C_IN],
                    .c_out = ints[EL_C_OUT],
                    .groups = ints[EL_GROUPS],
                    .pad_value = ints[EL_PAD_VALUE],
                    .real = s->real,
                    .int8 = s->int8,
                    .table_stride = (int32_t)(el_bytes_of_row(ints[EL_C_OUT]) / (int64_t)sizeof(float))};
    memcpy(&plan.conv, ints + EL_WINDOW, sizeof plan.conv);
    return plan;
}

/* Taps outside of an image of some size count. */
static int is_padded(const int32_t *ints) {
    return ints[EL_PAD_VALUE] != -1 &&
           (ints[EL_WINDOW + 4] || ints[EL_WINDOW + 5] || ints[EL_PAD_END] || ints[EL_PAD_END + 1]);
}

/* Lay a step's weight and sums of taps out at `to`, or only count their bytes if it is NULL. */
static size_t lay_out_step(el_program_step *s, char *to) {
    const el_plan plan = plan_of_weights(s);
    size_t bytes = 0;
    s->weight = s->tensors[0];
    if (plan.int8) {
        if (to) el_lay_out(&plan, s->tensors[0], to);
        s->weight = to;
        return aligned(el_weight_size(&plan));
    }
    if (plan.real) {
        if (to) el_advise(s->weight, (size_t)s->bytes[0]);
        return 0;
    }
    if (el_own_layout() && !is_depthwise(&plan)) {
        if (to) el_lay_out(&plan, s->tensors[0], to);
        s->weight = to;
        bytes += aligned(el_weight_size(&plan));
    }
    if (is_padded(s->record->ints)) {
        if (to) el_tap_sums(&plan, s->tensors[0], (int32_t *)(void *)(to + bytes));
        s->tap_sums = to ? (const int32_t *)(const void *)(to + bytes) : NULL;
        bytes += aligned((size_t)plan.conv.kh * (size_t)plan.conv.kw * (size_t)plan.table_stride * sizeof(int32_t));
    }
    return bytes;
}

int el_lay_out_weights(el_program *p, const el_error *e) {
    if (p->laid_out_for) {
        if (p->laid_out_for == el_active()) return EL_OK;
        return el_say(e, "the program was made ready for %s, and %s is in use now; make a new one", p->laid_out_for,
                      el_active());
    }
    if (!p->verified) {
        const int bad = el_verify(p, e);
        if (bad) return bad;
    }
    size_t bytes = 64;
    for (int i = 0; i < p->n_steps; i++)
        if (p->steps[i].record->kind == EL_CONV) bytes += lay_out_step(p->steps + i, NULL);
    p->weights = el_aligned_alloc(bytes < EL_HUGE_PAGE ? 64 : EL_HUGE_PAGE, bytes);
    if (!p->weights) return el_say_no_memory(e);
    el_advise(p->weights, bytes);
    char *to = p->weights;
    for (int i = 0; i < p->n_steps; i++)
        if (p->steps[i].record->kind == EL_CONV) to += lay_out_step(p->steps + i, to);
    p->laid_out_for = el_active();
    return EL_OK;
}
