/*
 * Arguments that must be refused, for every function: handles that are null, wild, stale or of
 * another kind; null pointers; structs of the wrong size; values outside their range. None of it
 * changes anything, and everything works afterwards.
 */
#include "check.h"

#include <stddef.h>

#define MOST_BAD 16

/* A good object of each kind, and a destroyed one. */
typedef struct {
  vacc_instance instance;
  vacc_device device;
  vacc_stream stream, stale_stream;
  vacc_buffer buffer, host, stale_buffer;
  vacc_comm comm, stale_comm;
  vacc_device stale_device;
  vacc_region region, pinned;
  vacc_comm_id id;
} objects;

static vacc_comm member(vacc_device device, vacc_comm_id *id) {
  vacc_comm comm;
  OK(vacc_comm_create_id(device, id));
  OK(vacc_comm_init(device, id, 0, 1, &comm));
  return comm;
}

static objects some(vacc_instance instance, vacc_device device) {
  static const float ones[4] = {1, 1, 1, 1};
  objects o;
  memset(&o, 0, sizeof o);
  o.instance = instance;
  o.device = device;
  o.stream = stream_on(device, "good");
  o.buffer = buffer_of(o.stream, ones, 4);
  OK(vacc_buffer_alloc_host(device, 16, &o.host));
  o.comm = member(device, &o.id);
  o.region.buffer = o.buffer;
  o.region.length = 16;
  o.pinned.buffer = o.host;
  o.pinned.length = 16;
  o.stale_stream = stream_on(device, "stale");
  OK(vacc_stream_destroy(o.stale_stream));
  o.stale_buffer = buffer_of(o.stream, ones, 1);
  OK(vacc_buffer_free(o.stale_buffer));
  o.stale_comm = member(device, &o.id);
  OK(vacc_comm_destroy(o.stale_comm));
  OK(vacc_device_open(instance, 0, &o.stale_device));
  OK(vacc_device_close(o.stale_device));
  OK(vacc_stream_synchronize(o.stream, 2, 5 * SECONDS));
  return o;
}

/* Everything still works, and as many commands have run as were accepted. */
static void still_fine(objects *o, uint64_t accepted) {
  vacc_op_add op = add(floats(o->buffer, 4), floats(o->buffer, 4), floats(o->buffer, 4));
  float got[4] = {0, 0, 0, 0};
  vacc_error error;
  uint64_t value;
  OK(vacc_stream_get_point(o->stream, &value));
  CHECK(value == accepted);
  OK(vacc_stream_launch(o->stream, VACC_OP_ADD, &op, "fine", 4));
  OK(vacc_stream_read(o->stream, &o->region, got, 5 * SECONDS));
  CHECK(got[0] == 2 && got[3] == 2);
  error.size = sizeof error;
  OK(vacc_stream_get_error(o->stream, &error));
  CHECK(error.status == VACC_OK);
  OK(vacc_comm_get_status(o->comm));
  OK(vacc_comm_destroy(o->comm));
  OK(vacc_buffer_free(o->host));
  OK(vacc_buffer_free(o->buffer));
  OK(vacc_stream_destroy(o->stream));
}

static vacc_collective sum_of(vacc_buffer buffer) {
  vacc_collective sum;
  memset(&sum, 0, sizeof sum);
  sum.size = sizeof sum;
  sum.kind = VACC_COLLECTIVE_ALL_REDUCE;
  sum.send = sum.recv = floats(buffer, 4);
  return sum;
}

#define BAD(call) REFUSED(call, VACC_ERROR_BAD_HANDLE)
#define INVALID(call) REFUSED(call, VACC_ERROR_INVALID_ARGUMENT)

static void bad_instance(vacc_instance bad) {
  vacc_instance_properties properties;
  vacc_device device;
  vacc_link link;
  properties.size = sizeof properties;
  link.size = sizeof link;
  BAD(vacc_instance_destroy(bad));
  BAD(vacc_instance_get_properties(bad, &properties));
  BAD(vacc_device_open(bad, 0, &device));
  BAD(vacc_topology_get_link(bad, 0, 1, &link));
}

static void bad_device(objects *o, vacc_device bad) {
  vacc_device_properties properties;
  vacc_memory_info memory;
  vacc_telemetry telemetry;
  vacc_error error;
  vacc_buffer buffer;
  vacc_stream stream;
  vacc_comm comm;
  vacc_comm_id id;
  vacc_op_add op = add(floats(o->buffer, 4), floats(o->buffer, 4), floats(o->buffer, 4));
  vacc_profile_record record;
  uint32_t count;
  uint64_t lost;
  properties.size = sizeof properties;
  memory.size = sizeof memory;
  telemetry.size = sizeof telemetry;
  error.size = sizeof error;
  record.size = sizeof record;
  BAD(vacc_device_close(bad));
  BAD(vacc_device_get_properties(bad, &properties));
  BAD(vacc_device_get_memory_info(bad, &memory));
  BAD(vacc_buffer_alloc_host(bad, 4, &buffer));
  BAD(vacc_stream_create(bad, "x", 1, &stream, &count));
  BAD(vacc_device_supports(bad, VACC_OP_ADD, &op));
  BAD(vacc_comm_create_id(bad, &id));
  BAD(vacc_comm_init(bad, &o->id, 0, 1, &comm));
  BAD(vacc_device_get_error(bad, &error));
  BAD(vacc_profile_enable(bad, 1));
  BAD(vacc_profile_read(bad, &record, 1, &count, &lost));
  BAD(vacc_device_get_telemetry(bad, &telemetry));
  BAD(vacc_device_set_faults(bad, NULL, 0));
}

static void bad_stream(objects *o, vacc_stream bad) {
  vacc_op_add op = add(floats(o->buffer, 4), floats(o->buffer, 4), floats(o->buffer, 4));
  vacc_collective sum = sum_of(o->buffer);
  vacc_timestamp when;
  vacc_error error;
  vacc_buffer buffer;
  float room[4] = {0, 0, 0, 0};
  uint64_t value;
  when.size = sizeof when;
  error.size = sizeof error;
  BAD(vacc_stream_destroy(bad));
  BAD(vacc_buffer_alloc(bad, 4, &buffer));
  BAD(vacc_stream_write(bad, &o->region, room));
  BAD(vacc_stream_read(bad, &o->region, room, SECONDS));
  BAD(vacc_stream_copy(bad, &o->pinned, &o->region));
  BAD(vacc_stream_fill(bad, &o->region, 1));
  BAD(vacc_stream_launch(bad, VACC_OP_ADD, &op, "x", 1));
  BAD(vacc_stream_get_point(bad, &value));
  BAD(vacc_stream_get_reached(bad, &value));
  BAD(vacc_stream_wait(bad, o->stream, 0));
  BAD(vacc_stream_wait(o->stream, bad, 0));
  BAD(vacc_stream_synchronize(bad, 0, SECONDS));
  BAD(vacc_stream_get_completion(bad, 1, &when));
  BAD(vacc_stream_get_error(bad, &error));
  BAD(vacc_comm_submit(o->comm, bad, &sum, 1, "x", 1));
}

static void bad_buffer(objects *o, vacc_buffer bad) {
  vacc_op_add op = add(floats(o->buffer, 4), floats(bad, 4), floats(o->buffer, 4));
  vacc_collective sum = sum_of(bad);
  vacc_region region = {NULL, 0, 16};
  float room[4] = {0, 0, 0, 0};
  region.buffer = bad;
  BAD(vacc_buffer_free(bad));
  BAD(vacc_buffer_read_host(bad, 0, room, 4));
  BAD(vacc_buffer_write_host(bad, 0, room, 4));
  BAD(vacc_stream_write(o->stream, &region, room));
  BAD(vacc_stream_read(o->stream, &region, room, SECONDS));
  BAD(vacc_stream_copy(o->stream, &region, &o->region));
  BAD(vacc_stream_copy(o->stream, &o->region, &region));
  BAD(vacc_stream_fill(o->stream, &region, 1));
  BAD(vacc_stream_launch(o->stream, VACC_OP_ADD, &op, "x", 1));
  BAD(vacc_comm_submit(o->comm, o->stream, &sum, 1, "x", 1));
  /* Of no concern to whoever only asks whether it would run. */
  OK(vacc_device_supports(o->device, VACC_OP_ADD, &op));
}

static void bad_comm(objects *o, vacc_comm bad) {
  vacc_collective sum = sum_of(o->buffer);
  BAD(vacc_comm_destroy(bad));
  BAD(vacc_comm_submit(bad, o->stream, &sum, 1, "x", 1));
  BAD(vacc_comm_abort(bad, "x", 1));
  BAD(vacc_comm_get_status(bad));
}

void bad_handles(vacc_instance instance, vacc_device device) {
  objects o = some(instance, device);
  /* Wild values, then one good handle of each kind, then the stale ones. */
  const uintptr_t bad[MOST_BAD] = {0,
                                   1,
                                   7,
                                   0x1000,
                                   0xdeadbeef,
                                   UINTPTR_MAX,
                                   (uintptr_t)o.instance,
                                   (uintptr_t)o.device,
                                   (uintptr_t)o.stream,
                                   (uintptr_t)o.buffer,
                                   (uintptr_t)o.comm,
                                   (uintptr_t)o.stale_device,
                                   (uintptr_t)o.stale_stream,
                                   (uintptr_t)o.stale_buffer,
                                   (uintptr_t)o.stale_comm,
                                   (uintptr_t)o.device + 0x100};
  int i;
  for (i = 0; i < MOST_BAD; i++) {
    if (bad[i] != (uintptr_t)o.instance) bad_instance((vacc_instance)bad[i]);
    if (bad[i] != (uintptr_t)o.device) bad_device(&o, (vacc_device)bad[i]);
    if (bad[i] != (uintptr_t)o.stream) bad_stream(&o, (vacc_stream)bad[i]);
    if (bad[i] != (uintptr_t)o.buffer) bad_buffer(&o, (vacc_buffer)bad[i]);
    if (bad[i] != (uintptr_t)o.comm) bad_comm(&o, (vacc_comm)bad[i]);
  }
  /* In use: everything on it comes first. */
  REFUSED(vacc_device_close(device), VACC_ERROR_BUSY);
  REFUSED(vacc_instance_destroy(instance), VACC_ERROR_BUSY);
  still_fine(&o, 2);
}

void null_pointers(vacc_instance instance, vacc_device device) {
  objects o = some(instance, device);
  vacc_op_add op = add(floats(o.buffer, 4), floats(o.buffer, 4), floats(o.buffer, 4));
  vacc_collective sum = sum_of(o.buffer);
  vacc_profile_record record;
  vacc_stream stream;
  vacc_comm comm;
  float room[4] = {0, 0, 0, 0};
  uint32_t count;
  uint64_t lost;
  memset(&record, 0, sizeof record);
  record.size = sizeof record;
  INVALID(vacc_last_error(NULL));
  INVALID(vacc_instance_create(NULL, NULL));
  INVALID(vacc_instance_get_properties(instance, NULL));
  INVALID(vacc_device_open(instance, 0, NULL));
  INVALID(vacc_topology_get_link(instance, 0, 1, NULL));
  INVALID(vacc_device_get_properties(device, NULL));
  INVALID(vacc_device_get_memory_info(device, NULL));
  INVALID(vacc_device_get_error(device, NULL));
  INVALID(vacc_device_get_telemetry(device, NULL));
  INVALID(vacc_device_supports(device, VACC_OP_ADD, NULL));
  INVALID(vacc_device_set_faults(device, NULL, 1));
  INVALID(vacc_buffer_alloc(o.stream, 4, NULL));
  INVALID(vacc_buffer_alloc_host(device, 4, NULL));
  INVALID(vacc_buffer_read_host(o.host, 0, NULL, 4));
  INVALID(vacc_buffer_write_host(o.host, 0, NULL, 4));
  INVALID(vacc_stream_create(device, NULL, 5, &stream, &count));
  INVALID(vacc_stream_create(device, "x", 1, NULL, &count));
  INVALID(vacc_stream_create(device, "x", 1, &stream, NULL));
  INVALID(vacc_stream_write(o.stream, NULL, room));
  INVALID(vacc_stream_write(o.stream, &o.region, NULL));
  INVALID(vacc_stream_read(o.stream, NULL, room, SECONDS));
  INVALID(vacc_stream_read(o.stream, &o.region, NULL, SECONDS));
  INVALID(vacc_stream_copy(o.stream, NULL, &o.region));
  INVALID(vacc_stream_copy(o.stream, &o.region, NULL));
  INVALID(vacc_stream_fill(o.stream, NULL, 1));
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, NULL, "x", 1));
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, NULL, 1));
  INVALID(vacc_stream_get_point(o.stream, NULL));
  INVALID(vacc_stream_get_reached(o.stream, NULL));
  INVALID(vacc_stream_get_completion(o.stream, 1, NULL));
  INVALID(vacc_stream_get_error(o.stream, NULL));
  INVALID(vacc_comm_create_id(device, NULL));
  INVALID(vacc_comm_init(device, NULL, 0, 1, &comm));
  INVALID(vacc_comm_init(device, &o.id, 0, 1, NULL));
  INVALID(vacc_comm_submit(o.comm, o.stream, NULL, 1, "x", 1));
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, 1, NULL, 1));
  INVALID(vacc_comm_abort(o.comm, NULL, 1));
  INVALID(vacc_list_launch(device, NULL, 1, NULL, 0));
  INVALID(vacc_list_launch(device, &o.stream, 1, NULL, 1));
  INVALID(vacc_profile_read(device, NULL, 1, &count, &lost));
  INVALID(vacc_profile_read(device, &record, 1, NULL, &lost));
  INVALID(vacc_profile_read(device, &record, 1, &count, NULL));
  /* No text, no rules and no batch are nothing to point to. */
  OK(vacc_comm_submit(o.comm, o.stream, NULL, 0, NULL, 0));
  OK(vacc_device_set_faults(device, NULL, 0));
  still_fine(&o, 2);
}

/* A size below that of version 1.0, and 0. */
#define SIZED(value, call) SIZED_SINCE(value, sizeof(value), call)
/* Of a struct that has grown since version 1.0, whose size was `least` then. */
#define SIZED_SINCE(value, least, call)                \
  do {                                                 \
    (value).size = (uint32_t)(least) - 8;              \
    REFUSED(call, VACC_ERROR_STRUCT_SIZE);             \
    (value).size = 0;                                  \
    REFUSED(call, VACC_ERROR_STRUCT_SIZE);             \
    (value).size = sizeof(value);                      \
  } while (0)

/* Smaller structs are refused; larger ones are taken if they ask for nothing unknown. */
void wrong_sizes(vacc_instance instance, vacc_device device) {
  vacc_list_entry entry;
  struct {
    vacc_device_properties it;
    uint64_t more[4];
  } grown;
  struct {
    vacc_op_add it;
    uint64_t more;
  } asked;
  objects o = some(instance, device);
  vacc_instance_options options;
  vacc_instance_properties properties;
  vacc_device_properties die;
  vacc_memory_info memory;
  vacc_link link;
  vacc_error error;
  vacc_telemetry telemetry;
  vacc_timestamp when;
  vacc_profile_record record;
  vacc_fault_rule rules[2];
  vacc_collective batch[2];
  vacc_instance none;
  uint32_t count;
  uint64_t lost;
  memset(&options, 0, sizeof options);
  memset(rules, 0, sizeof rules);
  rules[0].size = rules[1].size = sizeof *rules;
  batch[0] = batch[1] = sum_of(o.buffer);
  SIZED(options, vacc_instance_create(&options, &none));
  SIZED(properties, vacc_instance_get_properties(instance, &properties));
  SIZED(die, vacc_device_get_properties(device, &die));
  SIZED(memory, vacc_device_get_memory_info(device, &memory));
  SIZED(link, vacc_topology_get_link(instance, 0, 1, &link));
  SIZED(error, vacc_last_error(&error));
  SIZED(error, vacc_stream_get_error(o.stream, &error));
  SIZED(error, vacc_device_get_error(device, &error));
  SIZED(telemetry, vacc_device_get_telemetry(device, &telemetry));
  SIZED(when, vacc_stream_get_completion(o.stream, 1, &when));
  SIZED(record, vacc_profile_read(device, &record, 1, &count, &lost));
  SIZED(rules[0], vacc_device_set_faults(device, rules, 1));
  SIZED_SINCE(batch[0], offsetof(vacc_collective, send_offsets),
              vacc_comm_submit(o.comm, o.stream, batch, 1, "x", 1));
  memset(&entry, 0, sizeof entry);
  SIZED(entry, vacc_list_launch(device, &o.stream, 1, &entry, 1));
  asked.it = add(floats(o.buffer, 4), floats(o.buffer, 4), floats(o.buffer, 4));
  SIZED(asked.it, vacc_device_supports(device, VACC_OP_ADD, &asked));
  SIZED(asked.it, vacc_stream_launch(o.stream, VACC_OP_ADD, &asked, "x", 1));
  /* In an array every element is as large as the first. */
  rules[1].size = sizeof *rules + 8;
  REFUSED(vacc_device_set_faults(device, rules, 2), VACC_ERROR_STRUCT_SIZE);
  batch[1].size = sizeof *batch - 8;
  REFUSED(vacc_comm_submit(o.comm, o.stream, batch, 2, "x", 1), VACC_ERROR_STRUCT_SIZE);
  memset(&grown, 0x5a, sizeof grown);
  grown.it.size = sizeof grown;
  OK(vacc_device_get_properties(device, &grown.it));
  CHECK(grown.it.size == sizeof die && grown.more[0] == 0x5a5a5a5a5a5a5a5aull);
  CHECK(grown.it.memory_bytes > 0 && strlen(grown.it.name) > 0);
  asked.it.size = sizeof asked;
  asked.more = 0;
  OK(vacc_device_supports(device, VACC_OP_ADD, &asked));
  asked.more = 1;
  REFUSED(vacc_device_supports(device, VACC_OP_ADD, &asked), VACC_ERROR_UNSUPPORTED);
  REFUSED(vacc_stream_launch(o.stream, VACC_OP_ADD, &asked, "x", 1), VACC_ERROR_UNSUPPORTED);
  still_fine(&o, 2);
}

void wrong_values(vacc_instance instance, vacc_device device) {
  objects o = some(instance, device);
  vacc_op_add op = add(floats(o.buffer, 4), floats(o.buffer, 4), floats(o.buffer, 4));
  const vacc_tensor whole = floats(o.buffer, 4);
  vacc_collective sum = sum_of(o.buffer);
  vacc_region region = o.region;
  vacc_fault_rule rule;
  vacc_device other;
  vacc_stream stream;
  vacc_buffer none;
  vacc_comm comm;
  vacc_comm_id id;
  vacc_link link;
  float room[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  uint64_t counts[1] = {4};
  uint32_t index;
  link.size = sizeof link;
  INVALID(vacc_device_open(instance, 9999, &other));
  INVALID(vacc_topology_get_link(instance, 0, 9999, &link));
  OK(vacc_topology_get_link(instance, 0, 1, &link));
  CHECK(link.kind != VACC_LINK_NONE);
  INVALID(vacc_stream_create(device, "\xff\xfe", 2, &stream, &index));
  INVALID(vacc_stream_create(device, "x", UINT64_MAX, &stream, &index));
  REFUSED(vacc_buffer_alloc(o.stream, UINT64_MAX, &none), VACC_ERROR_OUT_OF_MEMORY);
  REFUSED(vacc_buffer_alloc_host(device, UINT64_MAX, &none), VACC_ERROR_OUT_OF_MEMORY);
  /* Device memory is no host memory; ranges end with their buffer. */
  INVALID(vacc_buffer_write_host(o.buffer, 0, room, 4));
  INVALID(vacc_buffer_read_host(o.host, 13, room, 4));
  INVALID(vacc_buffer_write_host(o.host, UINT64_MAX, room, 4));
  region.offset = 8;
  INVALID(vacc_stream_write(o.stream, &region, room));
  INVALID(vacc_stream_read(o.stream, &region, room, SECONDS));
  INVALID(vacc_stream_fill(o.stream, &region, 1));
  INVALID(vacc_stream_copy(o.stream, &region, &o.pinned));
  region.length = UINT64_MAX;
  INVALID(vacc_stream_write(o.stream, &region, room));
  INVALID(vacc_stream_read(o.stream, &region, room, SECONDS));
  INVALID(vacc_stream_fill(o.stream, &region, 1));
  /* Lengths differ; source and destination overlap. */
  region.offset = 0;
  region.length = 8;
  INVALID(vacc_stream_copy(o.stream, &region, &o.pinned));
  INVALID(vacc_stream_copy(o.stream, &o.region, &o.region));
  REFUSED(vacc_stream_launch(o.stream, 0, &op, "op 0", 4), VACC_ERROR_UNSUPPORTED);
  REFUSED(vacc_stream_launch(o.stream, 9999, &op, "op 9999", 7), VACC_ERROR_UNSUPPORTED);
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "\xff", 1));
  op.a.dtype = 42;
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "dtype", 5));
  op.a = whole;
  op.a.rank = 9;
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "rank", 4));
  op.a = whole;
  op.a.strides[0] = 2;
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "strides", 7));
  op.a = whole;
  op.a.offset = 1;
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "aligned", 7));
  op.a.offset = UINT64_MAX - 3;
  INVALID(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "outside", 7));
  op.a = floats(o.buffer, 5);
  REFUSED(vacc_stream_launch(o.stream, VACC_OP_ADD, &op, "shape", 5), VACC_ERROR_UNSUPPORTED);
  REFUSED(vacc_device_supports(device, VACC_OP_ADD, &op), VACC_ERROR_UNSUPPORTED);
  INVALID(vacc_stream_wait(o.stream, o.stream, 1u << 20));
  INVALID(vacc_stream_synchronize(o.stream, 1u << 20, SECONDS));
  INVALID(vacc_profile_enable(device, 2));
  memset(&rule, 0, sizeof rule);
  rule.size = sizeof rule;
  rule.action = 77;
  REFUSED(vacc_device_set_faults(device, &rule, 1), VACC_ERROR_UNSUPPORTED);
  rule.action = VACC_FAULT_PASS;
  rule.label = "\xff";
  rule.label_length = 1;
  INVALID(vacc_device_set_faults(device, &rule, 1));
  OK(vacc_comm_create_id(device, &id));
  INVALID(vacc_comm_init(device, &id, 2, 2, &comm));
  INVALID(vacc_comm_init(device, &id, 0, 0, &comm));
  OK(vacc_comm_init(device, &id, 0, 2, &comm));
  INVALID(vacc_comm_init(device, &id, 0, 2, &comm));
  INVALID(vacc_comm_init(device, &id, 1, 3, &comm));
  OK(vacc_comm_destroy(comm));
  sum.kind = 9999;
  REFUSED(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1), VACC_ERROR_UNSUPPORTED);
  sum = sum_of(o.buffer);
  sum.reduction = 9999;
  REFUSED(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1), VACC_ERROR_UNSUPPORTED);
  sum.reduction = VACC_REDUCE_SUM;
  sum.recv = floats(o.buffer, 3);
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1));
  sum.recv.dtype = VACC_DTYPE_NONE;
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1));
  sum.kind = VACC_COLLECTIVE_BROADCAST;
  sum.peer = 1;
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1));
  sum = sum_of(o.buffer);
  sum.kind = VACC_COLLECTIVE_ALL_TO_ALL;
  sum.send_counts = counts;
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, 1, "x", 1));
  INVALID(vacc_comm_submit(o.comm, o.stream, &sum, UINT32_MAX, "x", 1));
  still_fine(&o, 2);
}

/* What belongs to one instance is nothing to another. */
void another_instance(vacc_device device) {
  vacc_instance instance;
  vacc_device stranger;
  vacc_instance_options options;
  objects here, there;
  vacc_op_add op;
  vacc_collective sum;
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.config = "threads=1";
  options.config_length = strlen(options.config);
  OK(vacc_instance_create(&options, &instance));
  OK(vacc_device_open(instance, 0, &stranger));
  {
    /* Only the two devices' children are mixed. */
    static const float ones[4] = {1, 1, 1, 1};
    memset(&here, 0, sizeof here);
    here.device = device;
    here.stream = stream_on(device, "here");
    here.buffer = buffer_of(here.stream, ones, 4);
    OK(vacc_buffer_alloc_host(device, 16, &here.host));
    here.comm = member(device, &here.id);
    here.region.buffer = here.buffer;
    here.region.length = 16;
  }
  there = some(instance, stranger);
  op = add(floats(here.buffer, 4), floats(there.buffer, 4), floats(here.buffer, 4));
  INVALID(vacc_stream_launch(here.stream, VACC_OP_ADD, &op, "mixed", 5));
  INVALID(vacc_stream_copy(here.stream, &here.region, &there.region));
  INVALID(vacc_stream_fill(here.stream, &there.region, 0));
  INVALID(vacc_stream_wait(here.stream, there.stream, 0));
  sum = sum_of(there.buffer);
  INVALID(vacc_comm_submit(here.comm, here.stream, &sum, 1, "mixed", 5));
  sum = sum_of(here.buffer);
  INVALID(vacc_comm_submit(here.comm, there.stream, &sum, 1, "mixed", 5));
  INVALID(vacc_comm_submit(there.comm, here.stream, &sum, 1, "mixed", 5));
  still_fine(&here, 1);
  still_fine(&there, 2);
  OK(vacc_device_close(stranger));
  OK(vacc_instance_destroy(instance));
}
