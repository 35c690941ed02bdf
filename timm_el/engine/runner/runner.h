/* What the files of the command-line runner share. */
#ifndef TIMM_EL_RUNNER_H
#define TIMM_EL_RUNNER_H

#include "timm_el.h"

/* A part of a JSON text, not terminated. at is NULL if there is none. */
typedef struct {
    const char *at, *end;
} json;

/* json.c: the value of a key of an object; the next element of an array, from `previous` (at NULL: the first) on. */
json json_get(json object, const char *key);
json json_next(json array, json previous);
/* Write a string without its quotes and escapes; 0 if it is no string. What does not fit is cut off. */
int json_text(json value, char *text, size_t bytes);
/* Read up to n numbers of an array; how many there are. */
int json_numbers(json array, double *numbers, int n);

/* npy.c: print what is wrong, with the file's name, and give 0; or allocate the images, NHWC. `metadata` says how an
 * image of bytes becomes numbers. */
int npy_read(const char *path, json metadata, int64_t *shape, float **images);

/* A message that names the file, what was found and what was expected; gives 0. */
int complain(const char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
