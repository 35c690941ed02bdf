/* Run a deployed network, a program, without Python.
 *
 *     char error[256];
 *     el_program *net = el_open("net.program", 0, error, sizeof error);
 *     int64_t shape[4] = {1, 224, 224, 3};
 *     float *inputs[1] = {image}, *outputs[1] = {logits};
 *     if (!net || el_run(net, shape, (const float *const *)inputs, outputs, 1, error, sizeof error)) puts(error);
 *     el_close(net);
 *
 * Images are float32, (n, h, w, c) with c the fastest, without gaps. The memory of an output must not overlap that of
 * an input or of another output. Different threads may call at once, also with the same program. An error text names
 * the step, what was found and what was expected. */
#ifndef TIMM_EL_H
#define TIMM_EL_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EL_API __declspec(dllexport)
#else
#define EL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { EL_OK = 0, EL_BAD_PLAN = 1, EL_NO_MEMORY = 2 };

typedef struct el_program el_program; /* steps, tensors, and what was made ready */
typedef struct el_ready el_ready;     /* a program for inputs of one size; belongs to the program */

/* Map a file. `verify` checks the checksums of all tensors at once, which else the first el_make_ready does. NULL and
 * a text if it cannot be used. The file must not be changed while it is open. */
EL_API el_program *el_open(const char *path, int verify, char *error, size_t error_bytes);
/* The same of a file that is in memory, at a multiple of 64 bytes, and stays there until el_close. */
EL_API el_program *el_open_memory(const void *file, size_t bytes, int verify, char *error, size_t error_bytes);
/* Make a program from a table of `bytes` bytes, which is copied, and the addresses of its tensors, which must stay. */
EL_API el_program *el_program_new(const void *table, size_t bytes, const void *const *tensors, char *error,
                                  size_t error_bytes);
EL_API void el_close(el_program *program);

/* The file's metadata, JSON in UTF-8 without a zero at its end; NULL if there is none. */
EL_API const char *el_metadata(const el_program *program, size_t *bytes);
EL_API int el_inputs(const el_program *program);
EL_API int el_outputs(const el_program *program);
/* Size of input i; a height or width of 0 stands for any. EL_BAD_PLAN if there is no such input. */
EL_API int el_input(const el_program *program, int i, int32_t *channels, int32_t *height, int32_t *width);

/* Write n, h, w, c of each output, for inputs of n, h, w, c each. */
EL_API int el_shapes(el_program *program, const int64_t *in, int64_t *out, char *error, size_t error_bytes);
/* Run images of any size; the last few sizes are remembered. */
EL_API int el_run(el_program *program, const int64_t *in, const float *const *inputs, float *const *outputs,
                  int threads, char *error, size_t error_bytes);

/* The same in two halves, for callers that run few sizes many times. What el_make_ready gives is valid until el_close,
 * and takes memory for as long. */
EL_API el_ready *el_make_ready(el_program *program, const int64_t *in, int threads, char *error, size_t error_bytes);
EL_API int el_run_ready(const el_ready *ready, const float *const *inputs, float *const *outputs);

EL_API const char *el_bodies(void);     /* names of the instruction sets that this processor runs, best first */
EL_API int el_use(const char *name);    /* one of them in place of the first, which runs unless another is asked for before
                                           the first el_make_ready; EL_BAD_PLAN if it cannot run */
EL_API const char *el_active(void);

#ifdef __cplusplus
}
#endif

#endif
