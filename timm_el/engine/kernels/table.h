/* The records of a program's table: one layout in memory and in a file, little-endian.
 *
 *     header, inputs, outputs, steps, wires (padded to a multiple of 8 bytes), tensors
 *
 * A value is a float32 image batch (n, h, w, c). Values 0 .. n_inputs - 1 are the inputs; step i gives value n_inputs
 * + i and reads the values before it that its wires name. timm_el/engine/table.py declares the same records. */
#ifndef TIMM_EL_TABLE_H
#define TIMM_EL_TABLE_H

#include <stdint.h>

#define EL_MAGIC "timm_el\x01"
#define EL_VERSION 1

enum { EL_TENSORS = 4, EL_INTS = 30, EL_CONSTANTS = 4 }; /* of a step */

enum {
    EL_CONV, EL_POOL, EL_MEAN, EL_BINARY, EL_UNARY, EL_AFFINE, EL_PRELU, EL_NORM, EL_CONCAT, EL_CHANNELS, EL_CONST,
    EL_INPUT_SCALE, EL_FLATTEN, EL_PAD, EL_KINDS
};
enum { EL_ADD, EL_SUB, EL_MUL, EL_DIV, EL_SUB_FROM, EL_DIV_INTO, EL_BINARY_OPS };
enum {
    EL_CLIP,
    EL_LEAKY,
    EL_ABS,
    EL_SIGMOID,
    EL_SILU,
    EL_HARDSIGMOID,
    EL_HARDSWISH,
    EL_GELU,
    EL_GELU_TANH,
    EL_TANH,
    EL_ELU,
    EL_MISH,
    EL_EXP,
    EL_SQRT,
    EL_SQUARE,
    EL_UNARY_OPS
};
enum { EL_FLOAT32, EL_BITS, EL_INT32, EL_INT8, EL_DTYPES };
enum { EL_FORM_IMAGE, EL_FORM_ROWS, EL_FORM_NHWC, EL_FORM_TOKENS, EL_FORMS };

typedef struct {
    char magic[8];
    uint32_t version, table_bytes; /* header to tensors */
    uint32_t n_inputs, n_outputs, n_steps, n_wires, n_tensors;
    uint32_t table_crc; /* CRC-32 of the table with this field 0 */
    uint64_t meta_offset, meta_bytes, file_bytes; /* 0 in memory */
    uint32_t meta_crc, reserved[7];
} el_header;

typedef struct {
    int32_t channels, height, width, reserved; /* height, width: 0 is any */
} el_input_record;

typedef struct {
    int32_t value, form, reserved[2];
} el_output_record;

typedef struct {
    int32_t kind, first_wire, n_wires;
    int32_t tensors[EL_TENSORS]; /* -1: none */
    int32_t ints[EL_INTS];
    float constants[EL_CONSTANTS];
    int32_t reserved;
} el_step_record;

typedef struct {
    uint32_t dtype, crc;
    uint64_t offset, bytes; /* offset: in the file, a multiple of 64 */
} el_tensor_record;

_Static_assert(sizeof(el_header) == 96 && sizeof(el_input_record) == 16 && sizeof(el_output_record) == 16, "no gaps");
_Static_assert(sizeof(el_step_record) == 168 && sizeof(el_tensor_record) == 24, "no gaps");

/* Where a step's integers are. A window is eight of them, el_window. */
enum {
    EL_C_IN,
    EL_C_OUT,
    EL_WINDOW,
    EL_PAD_END = 10,
    EL_GROUPS = 12,
    EL_PAD_VALUE,
    EL_HAS_K,
    EL_ACT,
    EL_HAS_AFFINE,
    EL_HAS_POST,
    EL_LINK,
    EL_LINK_C,
    EL_LINK_POOL,
    EL_LINK_WINDOW,
    EL_CONV_INTS = 29
};
enum { EL_POOL_END = 8, EL_POOL_MODE = 10, EL_POOL_CEIL, EL_POOL_INTS };
enum { EL_SCALE_END = 8, EL_SCALE_GROUPS = 10, EL_SCALE_INTS };

/* Limits: what is larger is taken for damage. */
#define EL_MAX_ENDS 1024                        /* inputs, or outputs */
#define EL_MAX_STEPS (1 << 15)
#define EL_MAX_CHANNELS (1 << 20)
#define EL_MAX_TENSOR_BYTES ((int64_t)1 << 31)
#define EL_MAX_IMAGE_BYTES ((int64_t)1 << 31)   /* of a value */
#define EL_MAX_VALUE_BYTES ((int64_t)1 << 40)   /* all images of a value */

#endif
