/*
 * A runtime that does nothing, at once, and misbehaves on request. Tests and benchmarks compile it
 * with the system's compiler, in variants:
 *
 *   FAKE_MAJOR, FAKE_MINOR    the version that it reports
 *   FAKE_WITHOUT_OPTIONAL     lacks every optional function
 *   FAKE_WITHOUT_TRACES       lacks vacc_profile_read only
 *   FAKE_WITHOUT_REQUIRED     lacks vacc_stream_launch and vacc_comm_abort
 *   FAKE_GROWN                is of a later version, whose structs are 32 bytes longer
 *   FAKE_UNKNOWN              returns codes that nobody knows
 *   FAKE_MUTE                 tells nothing about its errors, and has no names for them
 *
 * Its settings: "fail_at=N" makes call number N fail (from 1), "fail=NAME" every call of a function,
 * "code=C" with this status (12 by default).
 */
#include "vacc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FAKE_MAJOR
#define FAKE_MAJOR VACC_ABI_MAJOR
#endif
#ifndef FAKE_MINOR
#define FAKE_MINOR VACC_ABI_MINOR
#endif

/* Every handle is this plus a count; nothing is behind it. */
static uintptr_t next_handle = 0x1000;
static long live;
static uint64_t calls, fail_at, commands;
static vacc_status fail_code = VACC_ERROR_INTERNAL;
static char fail_name[64];
static const char *failed;
static vacc_error last;

/* Handles that were given out and not given back. */
long fake_live(void) { return live; }
/* Counts handles from here on. */
void fake_forget(void) { live = 0; }
/* Calls made so far. */
uint64_t fake_calls(void) { return calls; }
/* The function that failed last, or null. Asking forgets it. */
const char *fake_failed(void) {
  const char *name = failed;
  failed = NULL;
  return name;
}

static vacc_status fail(const char *name, vacc_status status) {
  failed = name;
  memset(&last, 0, sizeof last);
  last.size = sizeof last;
  last.status = status;
  snprintf(last.text, sizeof last.text, "%s was told to fail", name);
#ifdef FAKE_UNKNOWN
  last.cause = 55;
  last.command = 5000;
  last.code = -7;
  last.sequence = 3;
  strcpy(last.label, "odd");
#endif
  return status;
}

/* Counts a call, and fails it where that was asked for. */
#define CALL(name)                                                                       \
  do {                                                                                   \
    calls += 1;                                                                          \
    if (calls == fail_at) return fail(name, fail_code);                                  \
    if (fail_name[0] && strcmp(fail_name, name) == 0) return fail(name, fail_code);      \
  } while (0)

static void *made(void) {
  live += 1;
  next_handle += 16;
  return (void *)next_handle;
}

static vacc_status unmade(const void *handle) {
  if (!handle) return fail("a null handle", VACC_ERROR_BAD_HANDLE);
  live -= 1;
  return VACC_OK;
}

/* As many bytes of a struct as the caller has room for. */
static vacc_status out(void *to, const void *from, uint32_t known) {
  uint32_t size, filled;
  memcpy(&size, to, sizeof size);
  filled = size < known ? size : known;
  memcpy(to, from, filled);
  memcpy(to, &filled, sizeof filled);
  return VACC_OK;
}

#ifdef FAKE_GROWN
#define GROWN(type)      \
  struct {               \
    type it;             \
    uint64_t more[4];    \
  }
#define MORE(value) memset((value).more, 0xff, sizeof (value).more)
#else
#define GROWN(type) \
  struct {          \
    type it;        \
  }
#define MORE(value) (void)(value)
#endif

uint32_t vacc_abi_version(void) { return ((uint32_t)FAKE_MAJOR << 16) | FAKE_MINOR; }
#ifdef FAKE_MUTE
const char *vacc_status_name(vacc_status status) { return (void)status, NULL; }
const char *vacc_status_text(vacc_status status) { return (void)status, NULL; }
vacc_status vacc_last_error(vacc_error *error) { return (void)error, VACC_ERROR_INTERNAL; }
#else
const char *vacc_status_name(vacc_status status) {
  return status == VACC_ERROR_INTERNAL ? "VACC_ERROR_INTERNAL" : "unknown";
}
const char *vacc_status_text(vacc_status status) {
  return status == VACC_ERROR_INTERNAL ? "a mistake" : "unknown";
}
vacc_status vacc_last_error(vacc_error *error) { return out(error, &last, sizeof last); }
#endif

vacc_status vacc_instance_create(const vacc_instance_options *options, vacc_instance *instance) {
  char config[256] = "";
  char *setting, *next;
  calls = fail_at = commands = 0;
  fail_name[0] = 0;
  fail_code = VACC_ERROR_INTERNAL;
  if (options && options->config && options->config_length < sizeof config)
    memcpy(config, options->config, options->config_length);
  /* Not strtok, whose state all fakes of a process would share. */
  for (setting = config; setting; setting = next) {
    next = strchr(setting, ';');
    if (next) *next++ = 0;
    if (strncmp(setting, "fail_at=", 8) == 0) fail_at = strtoull(setting + 8, NULL, 10);
    if (strncmp(setting, "fail=", 5) == 0) snprintf(fail_name, sizeof fail_name, "%s", setting + 5);
    if (strncmp(setting, "code=", 5) == 0) fail_code = (vacc_status)atoi(setting + 5);
  }
  CALL("vacc_instance_create");
  *instance = made();
  return VACC_OK;
}
vacc_status vacc_instance_destroy(vacc_instance instance) {
  CALL("vacc_instance_destroy");
  return unmade(instance);
}
vacc_status vacc_instance_get_properties(vacc_instance instance, vacc_instance_properties *properties) {
  GROWN(vacc_instance_properties) told;
  CALL("vacc_instance_get_properties");
  memset(&told, 0, sizeof told);
  MORE(told);
  told.it.devices = 2;
  strcpy(told.it.name, "fake");
  (void)instance;
  return out(properties, &told, sizeof told);
}
vacc_status vacc_device_open(vacc_instance instance, uint32_t ordinal, vacc_device *device) {
  CALL("vacc_device_open");
  (void)instance;
  *device = (vacc_device)((char *)made() + ordinal);
  return VACC_OK;
}
vacc_status vacc_device_close(vacc_device device) {
  CALL("vacc_device_close");
  return unmade(device);
}
vacc_status vacc_device_get_properties(vacc_device device, vacc_device_properties *properties) {
  GROWN(vacc_device_properties) told;
  CALL("vacc_device_get_properties");
  memset(&told, 0, sizeof told);
  MORE(told);
  memset(told.it.name, 'x', sizeof told.it.name); /* not terminated */
  told.it.die_on_card = (uint32_t)((uintptr_t)device & 15);
  told.it.memory_bytes = 1u << 30;
  told.it.allocation_alignment = 256;
  told.it.clock = VACC_CLOCK_DEVICE;
#ifdef FAKE_UNKNOWN
  told.it.clock = 77;
  told.it.flags = 0xffffffffu;
#endif
  return out(properties, &told, sizeof told);
}
vacc_status vacc_device_get_memory_info(vacc_device device, vacc_memory_info *info) {
  GROWN(vacc_memory_info) told;
  CALL("vacc_device_get_memory_info");
  memset(&told, 0, sizeof told);
  MORE(told);
  told.it.capacity = 1u << 30;
  told.it.used = 7;
  (void)device;
  return out(info, &told, sizeof told);
}

vacc_status vacc_buffer_alloc(vacc_stream stream, uint64_t bytes, vacc_buffer *buffer) {
  CALL("vacc_buffer_alloc");
  (void)stream, (void)bytes;
  *buffer = made();
  return VACC_OK;
}
vacc_status vacc_buffer_alloc_host(vacc_device device, uint64_t bytes, vacc_buffer *buffer) {
  CALL("vacc_buffer_alloc_host");
  (void)device, (void)bytes;
  *buffer = made();
  return VACC_OK;
}
vacc_status vacc_buffer_free(vacc_buffer buffer) {
  CALL("vacc_buffer_free");
  return unmade(buffer);
}
vacc_status vacc_buffer_read_host(vacc_buffer buffer, uint64_t offset, void *bytes, uint64_t length) {
  CALL("vacc_buffer_read_host");
  (void)buffer, (void)offset;
  memset(bytes, 0, length);
  return VACC_OK;
}
vacc_status vacc_buffer_write_host(vacc_buffer buffer, uint64_t offset, const void *bytes, uint64_t length) {
  CALL("vacc_buffer_write_host");
  (void)buffer, (void)offset, (void)bytes, (void)length;
  return VACC_OK;
}

vacc_status vacc_stream_create(vacc_device device, const char *label, uint64_t label_length,
                               vacc_stream *stream, uint32_t *index) {
  CALL("vacc_stream_create");
  (void)device, (void)label, (void)label_length;
  *stream = made();
  *index = 0;
  return VACC_OK;
}
vacc_status vacc_stream_destroy(vacc_stream stream) {
  CALL("vacc_stream_destroy");
  return unmade(stream);
}
vacc_status vacc_stream_write(vacc_stream stream, const vacc_region *destination, const void *bytes) {
  CALL("vacc_stream_write");
  (void)stream, (void)destination, (void)bytes;
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_stream_read(vacc_stream stream, const vacc_region *source, void *bytes,
                             uint64_t timeout_ns) {
  CALL("vacc_stream_read");
  (void)stream, (void)timeout_ns;
  memset(bytes, 0, source->length);
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_stream_copy(vacc_stream stream, const vacc_region *destination,
                             const vacc_region *source) {
  CALL("vacc_stream_copy");
  (void)stream, (void)destination, (void)source;
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_stream_fill(vacc_stream stream, const vacc_region *destination, uint8_t byte) {
  CALL("vacc_stream_fill");
  (void)stream, (void)destination, (void)byte;
  commands += 1;
  return VACC_OK;
}
#ifndef FAKE_WITHOUT_REQUIRED
vacc_status vacc_stream_launch(vacc_stream stream, uint32_t op, const void *descriptor,
                               const char *label, uint64_t label_length) {
  CALL("vacc_stream_launch");
  (void)stream, (void)op, (void)descriptor, (void)label, (void)label_length;
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_comm_abort(vacc_comm comm, const char *reason, uint64_t reason_length) {
  CALL("vacc_comm_abort");
  (void)comm, (void)reason, (void)reason_length;
  return VACC_OK;
}
#endif
vacc_status vacc_device_supports(vacc_device device, uint32_t op, const void *descriptor) {
  CALL("vacc_device_supports");
  (void)device, (void)op, (void)descriptor;
  return VACC_OK;
}
vacc_status vacc_stream_get_point(vacc_stream stream, uint64_t *value) {
  CALL("vacc_stream_get_point");
  (void)stream;
  *value = commands;
  return VACC_OK;
}
vacc_status vacc_stream_get_reached(vacc_stream stream, uint64_t *value) {
  CALL("vacc_stream_get_reached");
  (void)stream;
  *value = commands;
  return VACC_OK;
}
vacc_status vacc_stream_wait(vacc_stream stream, vacc_stream other, uint64_t value) {
  CALL("vacc_stream_wait");
  (void)stream, (void)other, (void)value;
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_stream_synchronize(vacc_stream stream, uint64_t value, uint64_t timeout_ns) {
  CALL("vacc_stream_synchronize");
  (void)stream, (void)value, (void)timeout_ns;
  return VACC_OK;
}
vacc_status vacc_topology_get_link(vacc_instance instance, uint32_t from, uint32_t to, vacc_link *link) {
  GROWN(vacc_link) told;
  CALL("vacc_topology_get_link");
  memset(&told, 0, sizeof told);
  MORE(told);
  told.it.kind = VACC_LINK_ON_CARD;
#ifdef FAKE_UNKNOWN
  told.it.kind = 99;
#endif
  told.it.bytes_per_second = 1e9;
  (void)instance, (void)from, (void)to;
  return out(link, &told, sizeof told);
}
vacc_status vacc_comm_create_id(vacc_device device, vacc_comm_id *id) {
  CALL("vacc_comm_create_id");
  (void)device;
  memset(id, 1, sizeof *id);
  return VACC_OK;
}
vacc_status vacc_comm_init(vacc_device device, const vacc_comm_id *id, uint32_t rank, uint32_t ranks,
                           vacc_comm *comm) {
  CALL("vacc_comm_init");
  (void)device, (void)id, (void)rank, (void)ranks;
  *comm = made();
  return VACC_OK;
}
vacc_status vacc_comm_destroy(vacc_comm comm) {
  CALL("vacc_comm_destroy");
  return unmade(comm);
}
vacc_status vacc_comm_submit(vacc_comm comm, vacc_stream stream, const vacc_collective *batch,
                             uint32_t count, const char *label, uint64_t label_length) {
  CALL("vacc_comm_submit");
  (void)comm, (void)stream, (void)batch, (void)count, (void)label, (void)label_length;
  commands += 1;
  return VACC_OK;
}
vacc_status vacc_comm_get_status(vacc_comm comm) {
  CALL("vacc_comm_get_status");
  (void)comm;
  return VACC_OK;
}
vacc_status vacc_stream_get_error(vacc_stream stream, vacc_error *error) {
  vacc_error well;
  CALL("vacc_stream_get_error");
  memset(&well, 0, sizeof well);
  (void)stream;
  return out(error, &well, sizeof well);
}
vacc_status vacc_device_get_error(vacc_device device, vacc_error *error) {
  return vacc_stream_get_error((vacc_stream)device, error);
}

#ifndef FAKE_WITHOUT_OPTIONAL
vacc_status vacc_stream_get_completion(vacc_stream stream, uint64_t value, vacc_timestamp *timestamp) {
  GROWN(vacc_timestamp) told;
  CALL("vacc_stream_get_completion");
  memset(&told, 0, sizeof told);
  MORE(told);
  told.it.clock = VACC_CLOCK_DEVICE;
#ifdef FAKE_UNKNOWN
  told.it.clock = 77;
#endif
  told.it.picoseconds = value;
  (void)stream;
  return out(timestamp, &told, sizeof told);
}
static int profiling;
vacc_status vacc_profile_enable(vacc_device device, uint32_t enable) {
  CALL("vacc_profile_enable");
  (void)device;
  profiling = (int)enable;
  return VACC_OK;
}
#ifndef FAKE_WITHOUT_TRACES
vacc_status vacc_profile_read(vacc_device device, vacc_profile_record *records, uint32_t capacity,
                              uint32_t *count, uint64_t *lost) {
  CALL("vacc_profile_read");
  (void)device;
  *count = 0;
  *lost = 0;
#ifdef FAKE_UNKNOWN
  if (profiling && capacity) {
    records[0].command = 5000;
    records[0].clock = VACC_CLOCK_DEVICE;
    *count = 1;
    *lost = 4;
    profiling = 0;
  }
#else
  (void)records, (void)capacity;
#endif
  return VACC_OK;
}
#endif
vacc_status vacc_device_get_telemetry(vacc_device device, vacc_telemetry *telemetry) {
  GROWN(vacc_telemetry) told;
  CALL("vacc_device_get_telemetry");
  memset(&told, 0xff, sizeof told); /* everything unknown */
  MORE(told);
  told.it.ai_permille = 250;
  (void)device;
  return out(telemetry, &told, sizeof told);
}
vacc_status vacc_device_set_faults(vacc_device device, const vacc_fault_rule *rules, uint32_t count) {
  CALL("vacc_device_set_faults");
  (void)device, (void)rules, (void)count;
  return VACC_OK;
}
vacc_status vacc_list_launch(vacc_device device, const vacc_stream *streams, uint32_t stream_count,
                             const vacc_list_entry *entries, uint32_t count) {
  CALL("vacc_list_launch");
  (void)device, (void)streams, (void)stream_count, (void)entries;
  commands += count;
  return VACC_OK;
}
#endif
