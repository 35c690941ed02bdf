/* What the files of the program share.
 *
 *     check.c     what a step's record must hold, whatever the size of the inputs
 *     program.c   a program: its table, taken apart; its weights as the instruction set in use needs them
 *     shapes.c    the sizes of all values, from those of the inputs
 *     ready.c     what is decided once for one size: which steps run together, where values are
 *     run.c       one call
 *     steps.c, over_images.c    the steps that are neither convolution nor pool, by rows and by whole images */
#ifndef TIMM_EL_PROGRAM_H
#define TIMM_EL_PROGRAM_H

#include "rows.h"
#include "table.h"

#include <pthread.h>

/* Where an error is written, and which step it is about: -1 for none. */
typedef struct {
    char *text;
    size_t bytes;
    int step;
    const char *kind;
} el_error;

/* Write a text; gives EL_BAD_PLAN. */
int el_say(const el_error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));
int el_say_no_memory(const el_error *error);

typedef struct {
    int64_t n, h, w, c;
} el_shape;

/* Channels that follow one another in the source of a CHANNELS step. */
typedef struct {
    int32_t from, count;
} el_span;

typedef struct {
    const el_step_record *record;
    const int32_t *wires;            /* record->n_wires values, or -1 */
    const void *tensors[EL_TENSORS]; /* NULL: none */
    int64_t bytes[EL_TENSORS];
    int real, int8; /* CONV: its weight is, or is int8 */
    el_span *spans; /* CHANNELS */
    int n_spans, n_channels, last_channel;
    const void *weight;      /* CONV: as the instruction set in use needs it, from the first el_make_ready on */
    const int32_t *tap_sums; /* CONV that may be padded */
} el_program_step;

struct el_program {
    el_header header;
    const el_input_record *inputs;
    const el_output_record *outputs;
    const el_tensor_record *tensors;
    el_program_step *steps;
    int n_inputs, n_outputs, n_steps, n_values;
    void *table; /* owned */
    const char *metadata;
    const char *file; /* or NULL */
    size_t file_bytes;
    int mapped; /* the file is ours to close */
    int verified;        /* the tensors' checksums were right, or there are none */
    const char *laid_out_for; /* name of the instruction set, or NULL */
    char *weights;       /* owned: all that is laid out */
    el_ready *ready;
};

/* check.c */
extern const char *const el_kind_names[EL_KINDS];
int el_check_step(el_program_step *step, const el_tensor_record *tensors, const el_error *error);
int64_t el_bytes_of_row(int channels); /* of the table of a convolution */

/* shapes.c: sizes of all values from those of the inputs, which values[0 ..] already holds. */
int el_infer(const el_program *program, el_shape *values, const el_error *error);
/* The plan of a convolution or a pool, but for a weight that is laid out, or the window and sizes of an INPUT_SCALE. */
int el_plan_of(const el_program_step *step, const el_shape *values, el_shape *out, el_plan *plan,
               const el_error *error);

/* program.c */
int el_lay_out_weights(el_program *program, const el_error *error);

/* ready.c */
void el_free_ready(el_ready *ready);

/* file.c */
uint32_t el_crc32(uint32_t crc, const void *data, size_t bytes);
int el_verify(el_program *program, const el_error *error);
void el_unmap(el_program *program);

/* ------------------------------------------------------------------------------------------------------------------ */

enum { EL_AT_INPUT, EL_AT_CONST, EL_AT_ARENA, EL_AT_OUTPUT };

typedef struct {
    el_shape shape;
    size_t image; /* floats */
    int where;
    size_t at;          /* number of the input or output, or bytes from the arena's start */
    const float *fixed; /* of a CONST */
    int node;           /* which gives it, -1 for inputs, CONST and what nobody needs */
} el_value;

/* Output rows a .. b - 1 need rows a * stride - before .. (b - 1) * stride + after of a value; stride 0: none. */
typedef struct {
    int64_t stride, before, after;
} el_reach;

/* A step for one size of inputs. */
typedef struct {
    const el_program_step *step;
    int kind, value; /* value: which it gives */
    el_plan plan;    /* CONV, POOL and INPUT_SCALE */
    layer *layer;    /* CONV and POOL */
    el_reach need; /* rows of what it gives, in a group of several */
    int ring;      /* rows that the group keeps of it */
    size_t scratch_at, ring_at;
} el_node;

/* Nodes that run one after the other, or, if there are several, a few rows of each at a time. */
typedef struct {
    int first, n;
    int items;     /* parts, for threads */
    int band_rows; /* rows of the last node at a time */
    size_t scratch; /* bytes for each thread */
} el_group;

struct el_ready {
    el_ready *next;
    const el_program *program;
    const char *instruction_set;
    size_t large_image;
    int threads, n_nodes, n_groups;
    int is_held, runs; /* a caller has it until el_close; calls of el_run that use it now */
    int64_t *in; /* the key: 4 numbers for each input */
    el_value *values;
    el_node *nodes;
    el_group *groups;
    size_t arena;
};

/* One image of a call, in one thread. */
typedef struct {
    const el_ready *ready;
    const float *const *inputs;
    float *const *outputs;
    char *arena;
} el_call;

typedef struct {
    const el_call *call;
    const el_group *group;
    int image;
    char *scratch;
} el_piece;

/* run.c */
float *el_address(const el_call *call, int value);
row_view el_rows_of(const el_piece *piece, int value);

/* steps.c: rows from .. to of what a node gives. */
void el_step_rows(const el_piece *piece, const el_node *node, const row_view *y, int from, int to);
size_t el_step_scratch(const el_node *node); /* bytes */

/* over_images.c: steps that need whole images. Their units of work do not depend on the number of threads. */
int el_is_over_images(const el_program_step *step);
int64_t el_units(const el_node *node, const el_value *values);
void el_run_units(const el_call *call, const el_node *node, int64_t from, int64_t to);
/* Normalise n channels of `pixels` pixels that are `step` floats apart. */
void el_norm(const float *x, size_t pixels, size_t step, int n, const float *scale, const float *shift, float eps,
             float *y);

/* ready.c: of the images from which on a few rows at a time are made */
extern size_t el_large_image_bytes;

#endif
