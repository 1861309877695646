/*
 * Drives a runtime through vacc.h alone: what works, and what must be refused. Linked with
 * libvaccrt of the simulator by the tests, and run under valgrind there. Prints one line and exits
 * with 0, or names the line that failed and exits with 1.
 */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <pthread.h>
#include <time.h>

int checks;

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

static void *told(void *argument) {
  vacc_error *error = argument;
  error->size = sizeof *error;
  if (vacc_last_error(error) != VACC_OK) error->status = -1;
  return NULL;
}

/* What is told belongs to the thread that failed; handles belong to all. */
static void threads(vacc_device device) {
  pthread_t thread;
  vacc_error error;
  REFUSED(vacc_stream_destroy(NULL), VACC_ERROR_BAD_HANDLE);
  CHECK(pthread_create(&thread, NULL, told, &error) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(error.status == VACC_OK);
  error.size = sizeof error;
  OK(vacc_last_error(&error));
  CHECK(error.status == VACC_ERROR_BAD_HANDLE && strstr(error.text, "null"));
  /* A call that works leaves it. */
  OK(vacc_device_get_error(device, &error));
  CHECK(error.status == VACC_OK);
  error.size = sizeof error;
  OK(vacc_last_error(&error));
  CHECK(error.status == VACC_ERROR_BAD_HANDLE);
}

/* Work that will never run: a hang, who waits for it, a collective without its second rank. It is
 * given back all the same, and nothing of it is left when the instance has ended. */
static void abandons(vacc_device device) {
  vacc_fault_rule rule;
  vacc_stream hangs = stream_on(device, "hangs"), waits = stream_on(device, "waits");
  vacc_stream alone = stream_on(device, "alone");
  vacc_buffer x, y;
  vacc_region all = {NULL, 0, 4};
  vacc_comm comm;
  vacc_comm_id id;
  vacc_collective sum;
  float one = 1;
  uint64_t value;
  memset(&rule, 0, sizeof rule);
  rule.size = sizeof rule;
  rule.action = VACC_FAULT_HANG;
  rule.nth = VACC_FAULT_EACH;
  rule.command = "fill";
  rule.command_length = 4;
  OK(vacc_device_set_faults(device, &rule, 1));
  x = buffer_of(hangs, &one, 1);
  y = buffer_of(alone, &one, 1);
  all.buffer = x;
  OK(vacc_stream_fill(hangs, &all, 0));
  OK(vacc_stream_get_point(hangs, &value));
  OK(vacc_stream_wait(waits, hangs, value));
  OK(vacc_comm_create_id(device, &id));
  OK(vacc_comm_init(device, &id, 0, 2, &comm));
  memset(&sum, 0, sizeof sum);
  sum.size = sizeof sum;
  sum.kind = VACC_COLLECTIVE_ALL_REDUCE;
  sum.send = sum.recv = floats(y, 1);
  OK(vacc_comm_submit(comm, alone, &sum, 1, "alone", 5));
  OK(vacc_comm_destroy(comm));
  OK(vacc_buffer_free(x));
  OK(vacc_buffer_free(y));
  OK(vacc_stream_destroy(hangs));
  OK(vacc_stream_destroy(waits));
  OK(vacc_stream_destroy(alone));
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
  CHECK(strcmp(vacc_status_text(VACC_ERROR_TIMEOUT), "timed out") == 0);
  CHECK(strcmp(vacc_status_name(12345), "unknown") == 0);
  CHECK(strcmp(vacc_status_text(INT32_MIN), "unknown") == 0);
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
  bad_handles(instance, device);
  null_pointers(instance, device);
  wrong_sizes(instance, device);
  wrong_values(instance, device);
  another_instance(device);
  faults(device);
  profiles(second);
  threads(device);
  abandons(second);
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
