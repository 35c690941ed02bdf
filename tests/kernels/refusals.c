/* A small program with one thing wrong at a time: it is refused, and the text says which step, what was found and what
 * was expected. */
#include "net.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static net n;
static el_header *header; /* of the table at hand */
static el_step_record *conv, *norm, *concat;
static int32_t *wires;
static el_tensor_record *tensors;
static el_output_record *outputs;

/* Input 0 of 16 channels; conv to 32 with a link (step 0), norm (1), channels (2), concat of both (3), binary (4). */
static void make(void) {
    const int32_t of[][3] = {{0, 0, -1}, {1}, {2}, {2, 3}, {4, 4}};
    n.n_inputs = 1, n.inputs[0] = (el_input_record){16, 0, 8, 0};
    el_step_record *s = net_step(&n, EL_CONV, 3, of[0]);
    const int32_t ints[EL_CONV_INTS] = {16, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, EL_LINK_EXPAND,
                                        16, 0,  1, 1, 1, 1, 0, 0, 1, 1};
    memcpy(s->ints, ints, sizeof ints);
    s->tensors[0] = net_tensor(&n, EL_BITS, calloc(4 * 9, 64), 4 * 9 * 64);
    s->tensors[1] = net_tensor(&n, EL_FLOAT32, calloc(2 * 48, 4), 2 * 48 * 4);
    s = net_step(&n, EL_NORM, 1, of[1]);
    s->ints[0] = 4, s->tensors[0] = net_tensor(&n, EL_FLOAT32, calloc(32, 4), 32 * 4);
    int32_t *index = calloc(8, 4);
    index[7] = 31;
    net_step(&n, EL_CHANNELS, 1, of[2])->tensors[0] = net_tensor(&n, EL_INT32, index, 32);
    net_step(&n, EL_CONCAT, 2, of[3]);
    net_step(&n, EL_BINARY, 2, of[4]);
    net_output(&n, 5, EL_FORM_IMAGE);
}

static void magic(void) { header->magic[0] = 'T'; }
static void version(void) { header->version = 9; }
static void table_bytes(void) { header->table_bytes += 8; }
static void kind(void) { conv[1].kind = 77; }
static void wire_count(void) { concat->n_wires = 0; }
static void wire_ahead(void) { wires[0] = 1; }
static void wire_range(void) { conv->first_wire = 1 << 30; }
static void no_source(void) { wires[3] = -1; }
static void no_table(void) { conv->tensors[1] = -1; }
static void extra_tensor(void) { concat->tensors[2] = 0; }
static void dtype(void) { tensors[0].dtype = EL_INT32; }
static void int8_bytes(void) { tensors[0].dtype = EL_INT8; }
static void weight_bytes(void) { tensors[0].bytes -= 64; }
static void stride(void) { conv->ints[EL_WINDOW + 2] = 0; }
static void taps(void) { conv->ints[EL_WINDOW] = 1000, conv->ints[EL_WINDOW + 1] = 1000; }
static void groups(void) { conv->ints[EL_GROUPS] = 3; }
static void identity(void) { conv->ints[EL_LINK] = EL_LINK_IDENTITY; }
static void channels_in(void) { conv->ints[EL_C_IN] = 17; }
static void padding(void) { conv->ints[EL_WINDOW + 4] = 0; }
static void norm_groups(void) { norm->ints[0] = 5; }
static void scale_bytes(void) { tensors[2].bytes = 64; }
static void index_range(void) { norm->kind = EL_UNARY, norm->tensors[0] = -1, wires[4] = 0; }
static void output(void) { outputs->value = 6; }
static void rows(void) { outputs->form = EL_FORM_ROWS; }
static void op(void) { concat[1].ints[0] = 6; }
static void pool(void) {
    conv->ints[EL_LINK_POOL] = EL_POOL_MAX, conv->ints[EL_LINK_WINDOW] = 1, conv->ints[EL_LINK_WINDOW + 2] = 9;
}

static const struct {
    void (*spoil)(void);
    const char *text;
} cases[] = {
    {magic, "this is no program"},
    {version, "version 9, expected 1"},
    {table_bytes, "expected them to agree"},
    {kind, "step 1 (unknown): kind is 77, expected one of 14"},
    {wire_count, "step 3 (concat): reads 0 values, expected 1"},
    {wire_ahead, "step 0 (conv): wire 0 is value 1, expected one of the 1 before it"},
    {wire_range, "step 0 (conv): its 3 wires begin at 1073741824"},
    {no_source, "step 1 (norm): wire 0 is -1, expected a value"},
    {no_table, "step 0 (conv): there is no table"},
    {extra_tensor, "step 3 (concat): there is a tensor 2, expected -1"},
    {dtype, "step 0 (conv): weight has dtype 2"},
    {int8_bytes, "step 0 (conv): weight has 2304 bytes, expected 4608"},
    {weight_bytes, "step 0 (conv): weight has 2240 bytes, expected 2304"},
    {stride, "step 0 (conv): stride is 0, expected 1 to 32768"},
    {taps, "step 0 (conv): kernel is 1000 x 1000, expected at most 1024 taps"},
    {groups, "step 0 (conv): groups is 3, expected a divisor of 16 and 32 channels"},
    {identity, "step 0 (conv): link channels is 16, expected 32 for an identity"},
    {channels_in, "step 0 (conv): the input has 16 channels, expected 17"},
    {padding, "step 0 (conv): the link has 1 images of 9 x 8 pixels, expected 1 of 8 x 8"},
    {norm_groups, "step 1 (norm): groups is 5, expected a divisor of 32 channels"},
    {scale_bytes, "step 1 (norm): tensor 0 has 64 bytes, expected 128, 4 for each channel"},
    {index_range, "step 2 (channels): index has channel 31, of 16"},
    {output, "output 0 is value 6 in form 0, expected one of 6 values and of 4 forms"},
    {rows, "output 0 has 9 x 8 pixels, expected one for rows of features"},
    {op, "step 4 (binary): op is 6, expected 0 to 5"},
    {pool, "step 0 (conv): the window of the link's pool has no pixel"},
    {NULL, ""},
};

/* Make it ready, which is refused; the text. */
static int is_refused(const void *table, size_t bytes, const int64_t *in, char *text, size_t text_bytes) {
    el_program *p = el_program_new(table, bytes, (const void *const *)n.data, text, text_bytes);
    const el_ready *r = p ? el_make_ready(p, in, 1, text, text_bytes) : NULL;
    el_close(p);
    return !r;
}

int main(void) {
    const int64_t in[4] = {1, 9, 8, 16}, narrow[4] = {1, 9, 7, 16}, none[4] = {0, 9, 8, 16},
                  negative[4] = {-1, 9, 8, 16};
    int wrong = 0;
    char text[256];
    size_t bytes;
    make();
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        char *table = net_table(&n, &bytes);
        header = (void *)table;
        outputs = (void *)(table + sizeof *header + sizeof *n.inputs);
        conv = (void *)(outputs + 1);
        norm = conv + 1, concat = conv + 3;
        wires = (void *)(conv + n.n_steps);
        tensors = (void *)(wires + (n.n_wires + 1) / 2 * 2);
        *text = 0;
        if (cases[i].spoil) cases[i].spoil();
        const int refused = is_refused(table, bytes, in, text, sizeof text);
        if (refused != (cases[i].spoil != NULL) || !strstr(text, cases[i].text)) {
            printf("case %d: found \"%s\", expected \"%s\"\n", i, refused ? text : "no error", cases[i].text);
            wrong++;
        }
        if (!cases[i].spoil) {
            wrong += is_refused(table, bytes, none, text, sizeof text);
            wrong += !is_refused(table, bytes, negative, text, sizeof text) || !strstr(text, "found -1 images");
            wrong += !is_refused(table, bytes, narrow, text, sizeof text) ||
                     !strstr(text, "input 0 has 9 x 7 pixels of 16 channels, expected 0 x 8 of 16");
            wrong += !is_refused(table, 40, in, text, sizeof text) || !strstr(text, "found 40 bytes");
        }
        free(table);
    }
    net_free(&n);
    printf("%d cases: %d wrong\n", (int)(sizeof cases / sizeof *cases), wrong);
    return wrong > 0;
}
