/*
 * What the parts of the driver share: checks that name the line which failed, and small operands.
 */
#ifndef CHECK_H
#define CHECK_H

#include "vacc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Checks made so far, over all files. */
extern int checks;

#define CHECK(condition)                                                     \
  do {                                                                       \
    checks += 1;                                                             \
    if (!(condition)) {                                                      \
      vacc_error told;                                                       \
      memset(&told, 0, sizeof told);                                         \
      told.size = sizeof told;                                               \
      vacc_last_error(&told);                                                \
      fprintf(stderr, "line %d: %s\n  last error: %s: %s (%s)\n", __LINE__,  \
              #condition, vacc_status_name(told.status), told.text, told.detail); \
      exit(1);                                                               \
    }                                                                        \
  } while (0)

#define OK(call) CHECK((call) == VACC_OK)
#define REFUSED(call, code) CHECK((call) == (code))
#define SECONDS 1000000000ull

static inline vacc_tensor floats(vacc_buffer buffer, uint32_t n) {
  vacc_tensor t;
  memset(&t, 0, sizeof t);
  t.buffer = buffer;
  t.dtype = VACC_DTYPE_F32;
  t.rank = 1;
  t.shape[0] = n;
  t.strides[0] = 1;
  return t;
}

static inline vacc_op_add add(vacc_tensor a, vacc_tensor b, vacc_tensor out) {
  vacc_op_add op;
  memset(&op, 0, sizeof op);
  op.size = sizeof op;
  op.a = a;
  op.b = b;
  op.out = out;
  return op;
}

static inline vacc_stream stream_on(vacc_device device, const char *label) {
  vacc_stream stream;
  uint32_t index;
  OK(vacc_stream_create(device, label, strlen(label), &stream, &index));
  return stream;
}

static inline vacc_buffer buffer_of(vacc_stream stream, const float *values, uint64_t n) {
  vacc_buffer buffer;
  vacc_region all;
  OK(vacc_buffer_alloc(stream, n * 4, &buffer));
  all.buffer = buffer;
  all.offset = 0;
  all.length = n * 4;
  OK(vacc_stream_write(stream, &all, values));
  return buffer;
}

/* hostile.c: arguments that must be refused. */
void bad_handles(vacc_instance instance, vacc_device device);
void null_pointers(vacc_instance instance, vacc_device device);
void wrong_sizes(vacc_instance instance, vacc_device device);
void wrong_values(vacc_instance instance, vacc_device device);
void another_instance(vacc_device device);

#endif
