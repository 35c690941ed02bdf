/* A small writer of programs, and an interpreter that is as simple as can be. */
#ifndef NET_H
#define NET_H

#include "engine.h"
#include "table.h"

enum { MOST_NET_STEPS = 64, MOST_NET_TENSORS = 256, MOST_NET_WIRES = 512, MOST_NET_ENDS = 16 };

typedef struct {
    int64_t n, h, w, c;
    float *at;
} image;

typedef struct {
    int n_inputs, n_outputs, n_steps, n_wires, n_tensors;
    el_input_record inputs[MOST_NET_ENDS];
    el_output_record outputs[MOST_NET_ENDS];
    el_step_record steps[MOST_NET_STEPS];
    int32_t wires[MOST_NET_WIRES];
    el_tensor_record tensors[MOST_NET_TENSORS];
    void *data[MOST_NET_TENSORS]; /* owned */
} net;

/* Add a step with these wires and no tensors; the record is to be filled in. */
el_step_record *net_step(net *n, int kind, int n_wires, const int32_t *wires);
/* Add a tensor; the net owns the data from then on. Gives its number. */
int net_tensor(net *n, int dtype, void *data, size_t bytes);
void net_output(net *n, int value, int form);
void net_free(net *n);
/* The table in memory; `file` is NULL, or what is written behind the table to make a file of it. */
void *net_table(const net *n, size_t *bytes);
/* The whole file. */
void *net_file(const net *n, const char *metadata, size_t *bytes);

/* What a step gives, one number at a time; the image is to be freed. at is NULL if the sizes make no sense. */
image naive_step(const net *n, const el_step_record *step, const image *values);

/* Numbers. */
uint64_t draw(void);
void draw_from(uint64_t seed);
int pick(int low, int high);
float real(void);
float *reals(size_t n);
size_t size_of(const image *v);
int same(const float *a, const float *b, size_t n);

/* draws.c: add a random step that reads some of the values so far; 0 if this draw makes none. */
int draw_step(net *n, const image *values);

#endif
