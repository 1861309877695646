/*
 * Drives a runtime through vacc.h alone: what works, and what must be refused. Linked with
 * libvaccrt of the simulator by the tests, and run under valgrind there. Prints one line and exits
 * with 0, or names the line that failed and exits with 1.
 */
#define _POSIX_C_SOURCE 200809L
#include "vacc.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int checks;

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

static vacc_tensor floats(vacc_buffer buffer, uint32_t n) {
  vacc_tensor t;
  memset(&t, 0, sizeof t);
  t.buffer = buffer;
  t.dtype = VACC_DTYPE_F32;
  t.rank = 1;
  t.shape[0] = n;
  t.strides[0] = 1;
  return t;
}

static vacc_op_add add(vacc_tensor a, vacc_tensor b, vacc_tensor out) {
  vacc_op_add op;
  memset(&op, 0, sizeof op);
  op.size = sizeof op;
  op.a = a;
  op.b = b;
  op.out = out;
  return op;
}

static vacc_stream stream_on(vacc_device device, const char *label) {
  vacc_stream stream;
  uint32_t index;
  OK(vacc_stream_create(device, label, strlen(label), &stream, &index));
  return stream;
}

static vacc_buffer buffer_of(vacc_stream stream, const float *values, uint64_t n) {
  vacc_buffer buffer;
  vacc_region all;
  OK(vacc_buffer_alloc(stream, n * 4, &buffer));
  all.buffer = buffer;
  all.offset = 0;
  all.length = n * 4;
  OK(vacc_stream_write(stream, &all, values));
  return buffer;
}

static void computes(vacc_device device) {
  float one[3] = {1, 2, 3}, got[3] = {0, 0, 0};
  vacc_stream stream = stream_on(device, "compute");
  vacc_buffer x = buffer_of(stream, one, 3), host;
  vacc_region all = {NULL, 0, 12}, pinned = {NULL, 4, 12};
  vacc_op_add op = add(floats(x, 3), floats(x, 3), floats(x, 3));
  vacc_timestamp when;
  uint64_t value, reached;
  all.buffer = x;
  OK(vacc_device_supports(device, VACC_OP_ADD, &op));
  OK(vacc_stream_launch(stream, VACC_OP_ADD, &op, "double", 6));
  OK(vacc_stream_read(stream, &all, got, 5 * SECONDS));
  CHECK(got[0] == 2 && got[1] == 4 && got[2] == 6);
  OK(vacc_buffer_alloc_host(device, 16, &host));
  pinned.buffer = host;
  OK(vacc_stream_copy(stream, &pinned, &all));
  OK(vacc_stream_get_point(stream, &value));
  CHECK(value == 4);
  OK(vacc_stream_synchronize(stream, value, 5 * SECONDS));
  OK(vacc_stream_get_reached(stream, &reached));
  CHECK(reached == value);
  memset(got, 0, sizeof got);
  OK(vacc_buffer_read_host(host, 4, got, 12));
  CHECK(got[2] == 6);
  when.size = sizeof when;
  OK(vacc_stream_get_completion(stream, value, &when));
  CHECK(when.clock == VACC_CLOCK_SIMULATED && when.picoseconds > 0);
  REFUSED(vacc_stream_get_completion(stream, value + 1, &when), VACC_ERROR_NOT_READY);
  OK(vacc_buffer_free(host));
  OK(vacc_buffer_free(x));
  OK(vacc_stream_destroy(stream));
}

static void sums_over_two(vacc_device a, vacc_device b) {
  vacc_device devices[2];
  vacc_stream streams[2];
  vacc_buffer buffers[2];
  vacc_comm comms[2];
  vacc_comm_id id;
  vacc_collective sum;
  float got;
  uint32_t r;
  devices[0] = a;
  devices[1] = b;
  OK(vacc_comm_create_id(a, &id));
  for (r = 0; r < 2; r++) {
    float mine = (float)(r + 1);
    streams[r] = stream_on(devices[r], "rank");
    buffers[r] = buffer_of(streams[r], &mine, 1);
    OK(vacc_comm_init(devices[r], &id, r, 2, &comms[r]));
  }
  for (r = 0; r < 2; r++) {
    memset(&sum, 0, sizeof sum);
    sum.size = sizeof sum;
    sum.kind = VACC_COLLECTIVE_ALL_REDUCE;
    sum.reduction = VACC_REDUCE_SUM;
    sum.send = sum.recv = floats(buffers[r], 1);
    OK(vacc_comm_submit(comms[r], streams[r], &sum, 1, "sum", 3));
  }
  for (r = 0; r < 2; r++) {
    vacc_region all = {NULL, 0, 4};
    all.buffer = buffers[r];
    OK(vacc_stream_read(streams[r], &all, &got, 5 * SECONDS));
    CHECK(got == 3);
    OK(vacc_comm_get_status(comms[r]));
  }
  OK(vacc_comm_abort(comms[0], "done", 4));
  REFUSED(vacc_comm_get_status(comms[1]), VACC_ERROR_FAILED);
  for (r = 0; r < 2; r++) {
    OK(vacc_comm_destroy(comms[r]));
    REFUSED(vacc_comm_destroy(comms[r]), VACC_ERROR_BAD_HANDLE);
    OK(vacc_buffer_free(buffers[r]));
    OK(vacc_stream_destroy(streams[r]));
  }
}

/* A larger struct is taken if it asks for nothing unknown, a smaller one is not. */
static void sizes(vacc_instance instance, vacc_device device) {
  struct {
    vacc_device_properties it;
    uint64_t more[4];
  } grown;
  struct {
    vacc_op_add it;
    uint64_t more;
  } asked;
  vacc_device_properties properties;
  vacc_link link;
  vacc_error error;
  float one = 1;
  vacc_stream stream = stream_on(device, "sizes");
  vacc_buffer x = buffer_of(stream, &one, 1);
  memset(&grown, 0x5a, sizeof grown);
  grown.it.size = sizeof grown;
  OK(vacc_device_get_properties(device, &grown.it));
  CHECK(grown.it.size == sizeof properties && grown.more[0] == 0x5a5a5a5a5a5a5a5aull);
  CHECK(grown.it.memory_bytes > 0 && strlen(grown.it.name) > 0);
  memset(&properties, 0, sizeof properties);
  properties.size = sizeof properties - 8;
  REFUSED(vacc_device_get_properties(device, &properties), VACC_ERROR_STRUCT_SIZE);
  REFUSED(vacc_device_get_properties(device, NULL), VACC_ERROR_INVALID_ARGUMENT);
  asked.it = add(floats(x, 1), floats(x, 1), floats(x, 1));
  asked.it.size = sizeof asked;
  asked.more = 0;
  OK(vacc_stream_launch(stream, VACC_OP_ADD, &asked, "grown", 5));
  asked.more = 1;
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &asked, "grown", 5), VACC_ERROR_UNSUPPORTED);
  asked.it.size = 8;
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &asked, "small", 5), VACC_ERROR_STRUCT_SIZE);
  link.size = sizeof link;
  OK(vacc_topology_get_link(instance, 0, 1, &link));
  CHECK(link.kind != VACC_LINK_NONE);
  REFUSED(vacc_topology_get_link(instance, 0, 9999, &link), VACC_ERROR_INVALID_ARGUMENT);
  error.size = 4;
  REFUSED(vacc_last_error(&error), VACC_ERROR_STRUCT_SIZE);
  REFUSED(vacc_last_error(NULL), VACC_ERROR_INVALID_ARGUMENT);
  OK(vacc_buffer_free(x));
  OK(vacc_stream_destroy(stream));
}

/* Null, stale, foreign and wild handles; wrong codes; ranges outside. */
static void hostile(vacc_instance instance, vacc_device device) {
  vacc_stream stream = stream_on(device, "hostile"), stale = stream_on(device, "stale");
  float one[4] = {1, 1, 1, 1}, room[8];
  vacc_buffer x = buffer_of(stream, one, 4), y = buffer_of(stream, one, 4);
  vacc_region region = {NULL, 0, 16};
  vacc_op_add op = add(floats(x, 4), floats(x, 4), floats(x, 4));
  vacc_device other;
  vacc_buffer none = NULL;
  uint64_t before, after;
  uint32_t index;
  const uintptr_t wild[] = {0, 1, 7, 0x1000, 0xdeadbeef, UINTPTR_MAX};
  size_t i;
  region.buffer = x;
  OK(vacc_stream_get_point(stream, &before));
  OK(vacc_stream_destroy(stale));
  REFUSED(vacc_stream_destroy(stale), VACC_ERROR_BAD_HANDLE);
  REFUSED(vacc_stream_fill(stale, &region, 1), VACC_ERROR_BAD_HANDLE);
  OK(vacc_buffer_free(y));
  REFUSED(vacc_buffer_free(y), VACC_ERROR_BAD_HANDLE);
  for (i = 0; i < sizeof wild / sizeof *wild; i++) {
    REFUSED(vacc_buffer_free((vacc_buffer)wild[i]), VACC_ERROR_BAD_HANDLE);
    REFUSED(vacc_stream_destroy((vacc_stream)wild[i]), VACC_ERROR_BAD_HANDLE);
    REFUSED(vacc_device_close((vacc_device)wild[i]), VACC_ERROR_BAD_HANDLE);
    REFUSED(vacc_instance_destroy((vacc_instance)wild[i]), VACC_ERROR_BAD_HANDLE);
    REFUSED(vacc_comm_destroy((vacc_comm)wild[i]), VACC_ERROR_BAD_HANDLE);
  }
  REFUSED(vacc_buffer_free((vacc_buffer)stream), VACC_ERROR_BAD_HANDLE);
  REFUSED(vacc_device_open(instance, 9999, &other), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_device_open(instance, 0, NULL), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_create(device, NULL, 5, &stale, &index), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_create(device, "\xff\xfe", 2, &stale, &index), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_create(device, "x", 1, NULL, &index), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_buffer_alloc(stream, UINT64_MAX, &none), VACC_ERROR_OUT_OF_MEMORY);
  REFUSED(vacc_buffer_alloc(stream, 4, NULL), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_write(stream, NULL, one), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_write(stream, &region, NULL), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_read(stream, &region, NULL, SECONDS), VACC_ERROR_INVALID_ARGUMENT);
  region.offset = 8;
  REFUSED(vacc_stream_write(stream, &region, one), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_read(stream, &region, room, SECONDS), VACC_ERROR_INVALID_ARGUMENT);
  region.length = UINT64_MAX;
  REFUSED(vacc_stream_write(stream, &region, one), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_read(stream, &region, room, SECONDS), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, NULL, "null", 4), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_launch(stream, 0, &op, "op 0", 4), VACC_ERROR_UNSUPPORTED);
  REFUSED(vacc_stream_launch(stream, 9999, &op, "op 9999", 7), VACC_ERROR_UNSUPPORTED);
  op.a.dtype = 42;
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &op, "dtype", 5), VACC_ERROR_INVALID_ARGUMENT);
  op.a = floats(x, 4);
  op.a.rank = 9;
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &op, "rank", 4), VACC_ERROR_INVALID_ARGUMENT);
  op.a = floats(y, 4);
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &op, "freed", 5), VACC_ERROR_BAD_HANDLE);
  op.a = floats(x, 5);
  REFUSED(vacc_stream_launch(stream, VACC_OP_ADD, &op, "shape", 5), VACC_ERROR_UNSUPPORTED);
  REFUSED(vacc_stream_wait(stream, stream, 1u << 20), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_stream_synchronize(stream, 1u << 20, SECONDS), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_buffer_write_host(x, 0, one, 4), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_device_close(device), VACC_ERROR_BUSY);
  REFUSED(vacc_instance_destroy(instance), VACC_ERROR_BUSY);
  OK(vacc_stream_get_point(stream, &after));
  CHECK(after == before);
  OK(vacc_stream_synchronize(stream, after, 5 * SECONDS));
  OK(vacc_buffer_free(x));
  OK(vacc_stream_destroy(stream));
}

/* A stream whose reader waits, and what came of it. */
typedef struct {
  vacc_stream stream;
  vacc_region region;
  float room[4];
  vacc_status status;
} waiting;

static void *reads(void *argument) {
  waiting *w = argument;
  do w->status = vacc_stream_read(w->stream, &w->region, w->room, SECONDS);
  while (w->status == VACC_ERROR_CONCURRENT_USE);
  return NULL;
}

/* A hang times out, and while its reader waits nobody else may submit; a failure is told. */
static void faults(vacc_device device) {
  vacc_fault_rule rules[2];
  vacc_stream stream = stream_on(device, "hangs"), fails = stream_on(device, "fails");
  vacc_buffer x, y;
  vacc_region all = {NULL, 0, 16};
  vacc_error error;
  float room[4];
  pthread_t thread;
  uint64_t value;
  memset(rules, 0, sizeof rules);
  rules[0].size = rules[1].size = sizeof *rules;
  rules[0].action = VACC_FAULT_HANG;
  rules[0].nth = VACC_FAULT_EACH;
  rules[0].command = "fill";
  rules[0].command_length = 4;
  rules[1].action = VACC_FAULT_FAIL;
  rules[1].nth = 0;
  rules[1].command = "add";
  rules[1].command_length = 3;
  rules[1].text = "bad parity";
  rules[1].text_length = 10;
  OK(vacc_device_set_faults(device, rules, 2));
  OK(vacc_buffer_alloc(stream, 16, &x));
  all.buffer = x;
  OK(vacc_stream_fill(stream, &all, 1));
  REFUSED(vacc_stream_read(stream, &all, room, SECONDS / 20), VACC_ERROR_TIMEOUT);
  error.size = sizeof error;
  OK(vacc_last_error(&error));
  CHECK(error.status == VACC_ERROR_TIMEOUT && strstr(error.detail, "fill"));
  OK(vacc_stream_get_error(stream, &error));
  CHECK(error.status == VACC_OK);
  {
    /* Until its timeout the reader has the stream to itself. */
    waiting w;
    vacc_status status;
    w.stream = stream;
    w.region = all;
    CHECK(pthread_create(&thread, NULL, reads, &w) == 0);
    do {
      const struct timespec millisecond = {0, 1000000};
      nanosleep(&millisecond, NULL);
      status = vacc_stream_fill(stream, &all, 2);
    } while (status == VACC_OK);
    CHECK(status == VACC_ERROR_CONCURRENT_USE);
    REFUSED(vacc_stream_destroy(stream), VACC_ERROR_BUSY);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(w.status == VACC_ERROR_TIMEOUT);
  }
  {
    float ones[4] = {1, 1, 1, 1};
    vacc_op_add op;
    y = buffer_of(fails, ones, 4);
    op = add(floats(y, 4), floats(y, 4), floats(y, 4));
    OK(vacc_stream_launch(fails, VACC_OP_ADD, &op, "layer 4 add", 11));
  }
  OK(vacc_stream_get_point(fails, &value));
  REFUSED(vacc_stream_synchronize(fails, value, 5 * SECONDS), VACC_ERROR_FAILED);
  error.size = sizeof error;
  OK(vacc_stream_get_error(fails, &error));
  CHECK(error.status == VACC_ERROR_FAILED && error.cause == VACC_CAUSE_INJECTED);
  CHECK(error.sequence == value && error.command == VACC_OP_ADD);
  CHECK(strcmp(error.label, "layer 4 add") == 0 && strcmp(error.text, "bad parity") == 0);
  CHECK(strcmp(error.stream_label, "fails") == 0);
  REFUSED(vacc_stream_wait(stream, fails, value + 1), VACC_ERROR_INVALID_ARGUMENT);
  OK(vacc_device_set_faults(device, NULL, 0));
  OK(vacc_buffer_free(x));
  OK(vacc_buffer_free(y));
  OK(vacc_stream_destroy(stream));
  OK(vacc_stream_destroy(fails));
}

static void profiles(vacc_device device) {
  vacc_stream stream;
  float one = 1;
  vacc_buffer x;
  vacc_profile_record records[8];
  vacc_op_add op;
  uint32_t count;
  uint64_t lost, value;
  OK(vacc_profile_enable(device, 1));
  stream = stream_on(device, "profiled");
  x = buffer_of(stream, &one, 1);
  op = add(floats(x, 1), floats(x, 1), floats(x, 1));
  OK(vacc_stream_launch(stream, VACC_OP_ADD, &op, "seen", 4));
  OK(vacc_stream_get_point(stream, &value));
  OK(vacc_stream_synchronize(stream, value, 5 * SECONDS));
  memset(records, 0, sizeof records);
  REFUSED(vacc_profile_read(device, records, 8, &count, &lost), VACC_ERROR_STRUCT_SIZE);
  records[0].size = sizeof *records;
  OK(vacc_profile_read(device, records, 8, &count, &lost));
  CHECK(count == 2 && lost == 0);
  CHECK(records[0].command == VACC_COMMAND_WRITE && records[1].command == VACC_OP_ADD);
  CHECK(strcmp(records[1].label, "seen") == 0 && records[1].begin_ps < records[1].end_ps);
  CHECK(records[0].end_ps <= records[1].begin_ps);
  OK(vacc_profile_enable(device, 0));
  REFUSED(vacc_profile_enable(device, 2), VACC_ERROR_INVALID_ARGUMENT);
  OK(vacc_buffer_free(x));
  OK(vacc_stream_destroy(stream));
}

int main(void) {
  vacc_instance_options options;
  vacc_instance instance, refused = NULL;
  vacc_instance_properties properties;
  vacc_device device, second;
  vacc_memory_info memory;
  vacc_telemetry telemetry;
  vacc_error error;
  CHECK(vacc_abi_version() >> 16 == VACC_ABI_MAJOR);
  CHECK(strcmp(vacc_status_name(VACC_ERROR_TIMEOUT), "VACC_ERROR_TIMEOUT") == 0);
  CHECK(strcmp(vacc_status_name(12345), "unknown") == 0);
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.visible_devices = "2,0";
  options.visible_devices_length = 3;
  options.config = "machine=va16;timing=on;threads=1";
  options.config_length = strlen(options.config);
  OK(vacc_instance_create(&options, &instance));
  options.config = "colour=red";
  options.config_length = strlen(options.config);
  REFUSED(vacc_instance_create(&options, &refused), VACC_ERROR_INVALID_ARGUMENT);
  error.size = sizeof error;
  OK(vacc_last_error(&error));
  CHECK(strstr(error.text, "colour=red"));
  options.visible_devices = "0,0";
  REFUSED(vacc_instance_create(&options, &refused), VACC_ERROR_INVALID_ARGUMENT);
  REFUSED(vacc_instance_create(NULL, NULL), VACC_ERROR_INVALID_ARGUMENT);
  properties.size = sizeof properties;
  OK(vacc_instance_get_properties(instance, &properties));
  CHECK(properties.devices == 2);
  OK(vacc_device_open(instance, 0, &device));
  OK(vacc_device_open(instance, 1, &second));
  computes(device);
  sums_over_two(device, second);
  sizes(instance, device);
  hostile(instance, device);
  faults(device);
  profiles(second);
  memory.size = sizeof memory;
  OK(vacc_device_get_memory_info(device, &memory));
  CHECK(memory.used == 0 && memory.peak > 0);
  telemetry.size = sizeof telemetry;
  OK(vacc_device_get_telemetry(device, &telemetry));
  CHECK(telemetry.power_milliwatts == VACC_TELEMETRY_UNKNOWN);
  CHECK(telemetry.memory_capacity == memory.capacity);
  OK(vacc_device_get_error(device, &error));
  CHECK(error.status == VACC_OK);
  OK(vacc_device_close(second));
  OK(vacc_device_close(device));
  REFUSED(vacc_device_close(device), VACC_ERROR_BAD_HANDLE);
  OK(vacc_instance_destroy(instance));
  REFUSED(vacc_instance_destroy(instance), VACC_ERROR_BAD_HANDLE);
  printf("%d checks passed\n", checks);
  return 0;
}
