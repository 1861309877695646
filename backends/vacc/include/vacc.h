/*
 * vacc.h: a C ABI for VACC-style accelerator runtimes, version 1.3.
 *
 * This is this project's own interface. It is NOT a vendor's: no name, layout or value here comes
 * from a vendor's header. A vendor's runtime is reached through a small adapter library that
 * exports these functions; the simulator is such a library too (libvaccrt of this repository).
 *
 * Plain C99, and valid C++17.
 *
 * Contents
 *   1. Conventions        6. Copies                 11. Communicators
 *   2. Status             7. Ops: descriptors       12. Asynchronous errors
 *   3. Library, devices   8. Ops: launch, support   13. Profiling      (optional)
 *   4. Memory             9. Timelines              14. Telemetry      (optional)
 *   5. Streams           10. Topology               15. Fault injection (optional)
 *                                                  16. Command lists   (optional)
 *
 *
 * 1. CONVENTIONS
 *
 * Required and optional. A library exports every function marked REQUIRED, or it is refused when
 * it is loaded. A function marked OPTIONAL may be absent; what needs it is then unsupported.
 *
 * Versions. vacc_abi_version() is (major << 16) | minor. A caller takes a library of its own major
 * version, whatever the minor. Within a major version functions are only added, and structs only
 * grow, at their end, in steps of 8 bytes.
 *
 * Size first. Every struct that a function takes by pointer begins with `size`, which the caller
 * sets to sizeof the struct that it was compiled with. A size below that of version 1.0 is
 * VACC_ERROR_STRUCT_SIZE. A larger one is accepted:
 *   - of an input, the callee reads what it knows; bytes beyond that must be zero, otherwise the
 *     caller asks for something that the callee does not know: VACC_ERROR_UNSUPPORTED;
 *   - of an output, the callee writes at most `size` bytes, and sets `size` to how many it filled.
 * Structs inside structs (vacc_tensor, vacc_block_grid, ...) never grow. Fields named reserved are
 * zero. In an array of size-first structs every element has the size of the first.
 *
 * Handles are opaque, made and destroyed by the library, and never dereferenced by the caller. A
 * handle that is null, foreign, or already destroyed gives VACC_ERROR_BAD_HANDLE. Destroying twice
 * is such an error and nothing worse. Children (streams, buffers, communicators) are destroyed
 * before their device is closed, devices before their instance: otherwise VACC_ERROR_BUSY. Handles
 * of two instances in one call give VACC_ERROR_INVALID_ARGUMENT.
 *
 * Ownership. Who is given a handle owns it, and destroys it once. Everything else that is passed by
 * pointer (structs, arrays, texts, bytes) stays the caller's, is looked at during the call only, and
 * may be reused when it returns. What the library returns by pointer is static.
 *
 * Strings. Text goes in as pointer and length (no terminator, UTF-8), and comes out in arrays
 * inside structs, cut to fit and zero-terminated.
 *
 * Errors. Every function returns a vacc_status. What failed, with which values, is then told to
 * the same thread by vacc_last_error(), until its next call that fails. A function that fails has
 * changed nothing, submitted nothing and written nothing through its pointers, unless its text here
 * says otherwise. Statuses not listed here may be added: a caller keeps what it does not know.
 * VACC_ERROR_INTERNAL can come from every function and is not listed with each.
 *
 * Threads. Every function may be called from any thread, any number at once, on different
 * handles. Calls that SUBMIT to a stream (marked so) need the stream to themselves: a second
 * one while another is inside gives VACC_ERROR_CONCURRENT_USE. Calls not marked so may run
 * besides anything else on the same handle, and come before or after it as it happens. A handle
 * that is destroyed while another thread is inside a call on it: VACC_ERROR_BUSY, or that call
 * ends as if it had come first. No function calls back into the caller.
 *
 * Order. A stream's commands run in the order of submission and see each other's results. Streams
 * are ordered by vacc_stream_wait(), and by the host having waited. Accesses to memory that conflict
 * without such an order are a mistake of the caller, which the library may refuse. Submission never
 * waits for execution, except where said (vacc_stream_read). Calls not marked SUBMITS are no commands and have no place in the
 * order of a stream, except where said (vacc_buffer_free).
 *
 * Sticky errors. A command that fails while running poisons its stream: nothing more runs on it,
 * its timeline stops before the failed command, and every later call that submits to it or waits
 * for it gives VACC_ERROR_FAILED with the FIRST failure, wherever that was. Whatever waits for a
 * poisoned stream is poisoned with the same failure; nothing hangs. A lost device is a state:
 * every call on it, its streams and buffers gives VACC_ERROR_DEVICE_LOST; destroying still works.
 */
#ifndef VACC_H
#define VACC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VACC_ABI_MAJOR 1u
#define VACC_ABI_MINOR 3u

/* Lengths of text fields, terminator included. */
#define VACC_NAME_LENGTH 64u
#define VACC_LABEL_LENGTH 128u
#define VACC_TEXT_LENGTH 512u

/* A timeout that never ends. */
#define VACC_FOREVER UINT64_MAX

typedef struct vacc_instance_s *vacc_instance;
typedef struct vacc_device_s *vacc_device;
typedef struct vacc_stream_s *vacc_stream;
typedef struct vacc_buffer_s *vacc_buffer;
typedef struct vacc_comm_s *vacc_comm;

/* ---------------------------------------------------------------------------------------------
 * 2. STATUS
 */

typedef int32_t vacc_status;

#define VACC_OK 0
/* The caller broke a rule: a null pointer, a range outside its buffer, shapes that do not fit,
 * an access that nothing orders. */
#define VACC_ERROR_INVALID_ARGUMENT 1
/* A struct is smaller than in version 1.0. */
#define VACC_ERROR_STRUCT_SIZE 2
/* A handle is null, foreign or destroyed. */
#define VACC_ERROR_BAD_HANDLE 3
/* Two threads submit to one stream at once. */
#define VACC_ERROR_CONCURRENT_USE 4
/* It has children, or a call is inside it on another thread. */
#define VACC_ERROR_BUSY 5
/* Memory does not suffice: vacc_error.requested, .free, .capacity. */
#define VACC_ERROR_OUT_OF_MEMORY 6
/* The library or the device cannot do this. */
#define VACC_ERROR_UNSUPPORTED 7
/* A wait ran out of time; what was waited for goes on. */
#define VACC_ERROR_TIMEOUT 8
/* The device is gone. */
#define VACC_ERROR_DEVICE_LOST 9
/* A command failed; vacc_error names the first one that did. */
#define VACC_ERROR_FAILED 10
/* There is nothing to tell: no such record, not completed yet. */
#define VACC_ERROR_NOT_READY 11
/* A mistake inside the library. */
#define VACC_ERROR_INTERNAL 12

/* What a failed or asynchronous error is about. */
#define VACC_CAUSE_NONE 0u
/* The device was lost while or before it ran. */
#define VACC_CAUSE_LOST 1u
/* A fault rule said so. */
#define VACC_CAUSE_INJECTED 2u
/* The values in memory made it impossible: an index outside its table. */
#define VACC_CAUSE_DATA 3u
/* Ranks disagree about a collective. */
#define VACC_CAUSE_MISMATCH 4u
/* A communicator was aborted. */
#define VACC_CAUSE_ABORTED 5u
/* The library's own: vacc_error.code. */
#define VACC_CAUSE_RUNTIME 6u

/* Kinds of command, in errors and profiles: op codes (section 7), collectives (section 11), and: */
#define VACC_COMMAND_TRANSFER 512u
#define VACC_COMMAND_WRITE 513u
#define VACC_COMMAND_READ 514u
#define VACC_COMMAND_FILL 515u
#define VACC_COMMAND_WAIT 516u
#define VACC_COMMAND_MEMORY 517u
#define VACC_COMMAND_ABORT 518u

typedef struct vacc_error {
  uint32_t size;
  vacc_status status;
  /* The device concerned, by its ordinal. */
  uint32_t device;
  /* VACC_CAUSE_*, where status is VACC_ERROR_FAILED. */
  uint32_t cause;
  /* The failed command: stream, place in it, and what it was. Where status is VACC_ERROR_FAILED. */
  uint32_t stream_device;
  uint32_t stream_index;
  uint64_t sequence;
  uint32_t command;
  uint32_t reserved;
  /* Bytes, where status is VACC_ERROR_OUT_OF_MEMORY. */
  uint64_t requested;
  uint64_t free;
  uint64_t capacity;
  /* The library's own number for what happened, or 0. */
  int64_t code;
  char stream_label[VACC_NAME_LENGTH];
  char label[VACC_LABEL_LENGTH];
  /* What happened, in words, with the values. */
  char text[VACC_TEXT_LENGTH];
  /* A timeout: what is pending. An unsupported or invalid command: which. */
  char detail[VACC_TEXT_LENGTH];
} vacc_error;

/* REQUIRED. (VACC_ABI_MAJOR << 16) | VACC_ABI_MINOR of the library. Never fails, and may be called
 * before anything else: no other function is, until the version is known to fit. */
uint32_t vacc_abi_version(void);

/* REQUIRED. The status' name ("VACC_ERROR_TIMEOUT"), or "unknown". Static, zero-terminated, never
 * null. Never fails. */
const char *vacc_status_name(vacc_status status);

/* REQUIRED. The status in words, or "unknown". Static, zero-terminated, never null. Never fails. */
const char *vacc_status_text(vacc_status status);

/* REQUIRED. What the last call that failed on this thread has to tell. status is VACC_OK if none
 * has.
 * Errors: INVALID_ARGUMENT (null), STRUCT_SIZE. These do not replace what is told. */
vacc_status vacc_last_error(vacc_error *error);

/* ---------------------------------------------------------------------------------------------
 * 3. LIBRARY AND DEVICES
 */

typedef struct vacc_instance_options {
  uint32_t size;
  uint32_t reserved;
  /* The devices to offer, as in the environment variable VACC_VISIBLE_DEVICES ("0,1,5"), which the
   * caller reads, not the library. Null: all of them. They get ordinals from 0 in this order. */
  const char *visible_devices;
  uint64_t visible_devices_length;
  /* The library's own settings, "key=value;key=value". Null: none. Unknown keys are an error. */
  const char *config;
  uint64_t config_length;
} vacc_instance_options;

typedef struct vacc_instance_properties {
  uint32_t size;
  /* Devices offered. */
  uint32_t devices;
  /* The library's name and version in words. */
  char name[VACC_NAME_LENGTH];
  char version[VACC_NAME_LENGTH];
} vacc_instance_properties;

/* Clocks. Times of different clocks are never compared. */
#define VACC_CLOCK_NONE 0u
#define VACC_CLOCK_SIMULATED 1u
#define VACC_CLOCK_DEVICE 2u
#define VACC_CLOCK_HOST 3u

/* Commands compute values (a timing-only simulation does not). */
#define VACC_DEVICE_FUNCTIONAL 1u

/* A device is a die: one memory, one rank. */
typedef struct vacc_device_properties {
  uint32_t size;
  /* Its number in the machine, whatever is visible. */
  uint32_t physical_index;
  char name[VACC_NAME_LENGTH];
  /* Where it sits: host and card numbered within the system, die within its card. */
  uint32_t host;
  uint32_t card;
  uint32_t die_on_card;
  uint32_t cores;
  uint64_t memory_bytes;
  /* Allocations start at multiples of this. */
  uint64_t allocation_alignment;
  /* Matrix operands run best with dimensions that are multiples of this. */
  uint32_t matrix_alignment;
  /* VACC_DEVICE_*. */
  uint32_t flags;
  /* VACC_CLOCK_*: the clock of completion times and profiles. */
  uint32_t clock;
  uint32_t reserved;
} vacc_device_properties;

typedef struct vacc_memory_info {
  uint32_t size;
  uint32_t reserved;
  uint64_t capacity;
  uint64_t used;
  uint64_t peak;
} vacc_memory_info;

/* REQUIRED. Starts the library for these devices. The caller owns *instance. `options` may be
 * null. Several instances are independent of each other, where the library can have several.
 * Errors: INVALID_ARGUMENT (`instance` is null, an unknown key, a text that is not UTF-8, a device
 * that does not exist or is named twice), STRUCT_SIZE, UNSUPPORTED (a second instance, options of a
 * later version), OUT_OF_MEMORY. */
vacc_status vacc_instance_create(const vacc_instance_options *options, vacc_instance *instance);

/* REQUIRED. Ends it, and everything that it has started: waits for commands that are running, drops
 * what is still queued (nobody has a handle to see it by), and leaves no thread behind.
 * Errors: BAD_HANDLE, BUSY (devices are open). */
vacc_status vacc_instance_destroy(vacc_instance instance);

/* REQUIRED. What the library is. Never changes.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE. */
vacc_status vacc_instance_get_properties(vacc_instance instance, vacc_instance_properties *properties);

/* REQUIRED. Opens the device with this ordinal. The caller owns *device. Opening one twice gives
 * two handles of the same memory and the same state, each with children of its own.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, no such ordinal), DEVICE_LOST. */
vacc_status vacc_device_open(vacc_instance instance, uint32_t ordinal, vacc_device *device);

/* REQUIRED. Gives the handle back. Works on a lost device too.
 * Errors: BAD_HANDLE, BUSY (it has streams, buffers or communicators). */
vacc_status vacc_device_close(vacc_device device);

/* REQUIRED. What the device is. Never changes, and is told of a lost device too.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE. */
vacc_status vacc_device_get_properties(vacc_device device, vacc_device_properties *properties);

/* REQUIRED. How full its memory is, as of the allocations and frees called so far, over all handles
 * of the device.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE, DEVICE_LOST. */
vacc_status vacc_device_get_memory_info(vacc_device device, vacc_memory_info *info);

/* ---------------------------------------------------------------------------------------------
 * 4. MEMORY
 */

/* REQUIRED. SUBMITS. Device memory for the commands of this stream from now on; other streams
 * wait for a point of it first. Contents are undefined. Zero bytes are a buffer too. The caller
 * owns *buffer.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), OUT_OF_MEMORY, CONCURRENT_USE, FAILED,
 * DEVICE_LOST. */
vacc_status vacc_buffer_alloc(vacc_stream stream, uint64_t bytes, vacc_buffer *buffer);

/* REQUIRED. Pinned host memory, which copies reach without staging. Belongs to no stream: commands
 * of any may use it at once. Contents are undefined. The caller owns *buffer.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), OUT_OF_MEMORY, DEVICE_LOST. */
vacc_status vacc_buffer_alloc_host(vacc_device device, uint64_t bytes, vacc_buffer *buffer);

/* REQUIRED. Gives memory back, in stream order: commands submitted before, to whatever stream, keep
 * it until they have run. Does not wait for them. Works on a lost device too.
 * Errors: BAD_HANDLE. */
vacc_status vacc_buffer_free(vacc_buffer buffer);

/* REQUIRED. Copies bytes out of, or into, pinned host memory, on the calling thread, and returns when
 * that is done. No command: the caller has waited for the commands that touch them, and commands
 * submitted later see what was written. Two threads may not touch the same bytes at once.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, device memory, a range outside, a command is using
 * them). */
vacc_status vacc_buffer_read_host(vacc_buffer buffer, uint64_t offset, void *bytes, uint64_t length);
vacc_status vacc_buffer_write_host(vacc_buffer buffer, uint64_t offset, const void *bytes, uint64_t length);

/* ---------------------------------------------------------------------------------------------
 * 5. STREAMS
 */

/* REQUIRED. An ordered queue of commands. The label appears in errors and profiles. *index is its
 * number on the device, in order of creation. The caller owns *stream.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, a label that is not UTF-8), DEVICE_LOST. */
vacc_status vacc_stream_create(vacc_device device, const char *label, uint64_t label_length,
                               vacc_stream *stream, uint32_t *index);

/* REQUIRED. Gives the handle back at once; what was submitted still runs. Works on a lost device
 * and a poisoned stream too.
 * Errors: BAD_HANDLE, BUSY (a call is inside it on another thread). */
vacc_status vacc_stream_destroy(vacc_stream stream);

/* ---------------------------------------------------------------------------------------------
 * 6. COPIES
 */

typedef struct vacc_region {
  vacc_buffer buffer;
  uint64_t offset;
  uint64_t length;
} vacc_region;

/* REQUIRED. SUBMITS. destination->length bytes of host memory to device memory.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, a range outside, not ordered), CONCURRENT_USE,
 * FAILED, DEVICE_LOST. */
vacc_status vacc_stream_write(vacc_stream stream, const vacc_region *destination, const void *bytes);

/* REQUIRED. SUBMITS, then waits. Device memory to host memory, after everything submitted so far.
 * Holds the stream until it returns: other threads cannot submit meanwhile. The library does not
 * touch `bytes` once the call has returned, whatever it returned.
 * Errors: as vacc_stream_write, and TIMEOUT: the command is then still queued, and its bytes are
 * dropped. */
vacc_status vacc_stream_read(vacc_stream stream, const vacc_region *source, void *bytes,
                             uint64_t timeout_ns);

/* REQUIRED. SUBMITS. Between buffers: within a device, to and from pinned host memory, and from
 * device to device; one side belongs to the stream's device. Lengths are equal, ranges do not
 * overlap. The other device's streams are ordered with it as with any command of this stream.
 * Errors: as vacc_stream_write, INVALID_ARGUMENT also for lengths that differ and ranges that
 * overlap, and UNSUPPORTED (no link joins the two devices). */
vacc_status vacc_stream_copy(vacc_stream stream, const vacc_region *destination,
                             const vacc_region *source);

/* REQUIRED. SUBMITS. Sets every byte.
 * Errors: as vacc_stream_write. */
vacc_status vacc_stream_fill(vacc_stream stream, const vacc_region *destination, uint8_t byte);

/* ---------------------------------------------------------------------------------------------
 * 7. OPS: DESCRIPTORS
 *
 * Shapes are written [rows, columns] with T tokens, H hidden, h heads, E experts, k experts per
 * token. Unless an op says otherwise, outputs do not overlap inputs. Products are accumulated in
 * FP32 and rounded once, to nearest even.
 */

#define VACC_DTYPE_NONE 0u /* an optional operand that is absent */
#define VACC_DTYPE_F32 1u
#define VACC_DTYPE_BF16 2u
#define VACC_DTYPE_F8_E4M3 3u
#define VACC_DTYPE_I32 4u
#define VACC_DTYPE_U8 5u

/* A strided view. Row-major; strides count elements; the innermost stride is 1. */
typedef struct vacc_tensor {
  vacc_buffer buffer; /* ignored by vacc_device_supports */
  uint64_t offset;    /* bytes to the first element */
  uint32_t dtype;
  uint32_t rank; /* 1 to 4 */
  uint32_t shape[4];
  uint32_t strides[4];
} vacc_tensor;

/* Where a slice of a block-quantised weight sits in its 128 x 128 grid of scales. */
typedef struct vacc_block_grid {
  uint32_t row_offset;    /* rows of the first block row that lie before the slice, 0 to 127 */
  uint32_t column_offset; /* columns of the first block column that lie before it, 0 to 127 */
  uint32_t segments;      /* equal stacks of rows, each with its own scales; 0 counts as 1 */
  uint32_t reserved;
} vacc_block_grid;

/* How a grouped op's rows are spread, for cost models: 0 where not known. */
typedef struct vacc_routing {
  uint32_t rows;
  uint32_t active_experts;
} vacc_routing;

/* How much attention there is, for cost models: query-key pairs, and keys. */
typedef struct vacc_attention_work {
  uint64_t pairs;
  uint64_t keys;
} vacc_attention_work;

#define VACC_SCALE_FLOAT 0u        /* any FP32 value */
#define VACC_SCALE_POWER_OF_TWO 1u /* rounded up to a power of two */

/* Op codes. Codes are never reused. */
#define VACC_OP_GATHER_ROWS 1u
#define VACC_OP_RMS_NORM 2u
#define VACC_OP_QUANTIZE 3u
#define VACC_OP_DEQUANTIZE 4u
#define VACC_OP_LINEAR 5u
#define VACC_OP_GROUPED_LINEAR 6u
#define VACC_OP_BATCHED_LINEAR 7u
#define VACC_OP_ROPE 8u
#define VACC_OP_CACHE_WRITE 9u
#define VACC_OP_CACHE_READ 10u
#define VACC_OP_MLA_PREFILL 11u
#define VACC_OP_MLA_DECODE 12u
#define VACC_OP_SWIGLU 13u
#define VACC_OP_GATE 14u
#define VACC_OP_MOE_PERMUTE 15u
#define VACC_OP_MOE_COMBINE 16u
#define VACC_OP_ADD 17u
#define VACC_OP_CAST 18u
#define VACC_OP_COPY 19u
#define VACC_OP_ARGMAX 20u
#define VACC_OP_TOP_K 21u
#define VACC_OP_MOE_DISPATCH 22u /* since 1.1 */
#define VACC_OP_RMS_NORM_QUANTIZE 23u /* since 1.2 */
#define VACC_OP_SWIGLU_QUANTIZE 24u /* since 1.2 */

/* Row gather: out[t] = table[rows[t] - first_row], zeros where that leaves the table.
 *
 * The token embedding, a rank's part of a vocabulary-parallel one, and the selection of the
 * hidden states whose logits are needed. */
typedef struct vacc_op_gather_rows {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor table; /* read: [N, H], F32 or BF16 */
  vacc_tensor rows; /* read: [T], I32 */
  vacc_tensor out; /* written: [T, H], as table */
  uint32_t first_row; /* Row number of table[0] */
  uint32_t total_rows; /* Rows that exist in the whole table, of which this rank holds N. A row number outside is a data error */
} vacc_op_gather_rows;

/* out = x · rsqrt(mean(x²) + eps) · weight per row, in FP32; with residual, first
 * residual += x (rounded to its dtype), then the norm of that sum. */
typedef struct vacc_op_rms_norm {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, H], F32 or BF16 */
  vacc_tensor weight; /* read: [H], as x */
  vacc_tensor residual; /* read and written, optional: [T, H], as x */
  vacc_tensor out; /* written: [T, H], as x */
  float eps; /* Added to the mean square */
  uint32_t reserved_1; /* 0 */
} vacc_op_rms_norm;

/* Online quantisation of activations: per row and group of 128 columns,
 * scale = max(amax, 1e-4) / 448, q = e4m3(x / scale) (DeepSeek-V3 report, section 3.3.2;
 * act_quant of its reference kernels). */
typedef struct vacc_op_quantize {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, K], F32 or BF16 */
  vacc_tensor q; /* written: [T, K], F8_E4M3 */
  vacc_tensor scales; /* written: [T, groups], F32 */
  uint32_t column_offset; /* Columns of the first group that lie before x, so that groups line up with the blocks of a weight whose slice begins inside one */
  uint32_t scale_format; /* How scales are rounded (VACC_SCALE_*) */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: rows from its last element on are left as they are. More than T is a data error; since 1.1 */
  uint32_t expected_rows; /* Rows expected to count where row_offsets is present, for cost models; 0 for all; since 1.1 */
  uint32_t reserved_1; /* 0 */
} vacc_op_quantize;

/* Block dequantisation of a weight: out = w · scale in FP32, rounded once. */
typedef struct vacc_op_dequantize {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor w; /* read: [N, K] or [E, N, K], F8_E4M3 */
  vacc_tensor w_scales; /* read: [scale_rows, scale_columns] of BlockGrid, with E in front where w has it; F32 */
  vacc_tensor out; /* written: As w, F32 or BF16 */
  vacc_block_grid grid; /* Where w sits in its scales */
} vacc_op_dequantize;

/* out = x · wᵀ. With FP8 operands, Σ_blocks (Σ_k x·w) · x_scale · w_scale, the block sums
 * scaled and added in FP32 (DeepGEMM's fp8_gemm_nt). */
typedef struct vacc_op_linear {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, K]: F32, BF16 or F8_E4M3 */
  vacc_tensor x_scales; /* read, optional: [T, scale_columns], F32; present where x is FP8 */
  vacc_tensor w; /* read: [N, K], the dtype of x */
  vacc_tensor w_scales; /* read, optional: [scale_rows, scale_columns], F32; present where w is FP8 */
  vacc_tensor out; /* written: [T, N], F32 or BF16 */
  vacc_block_grid grid; /* Where an FP8 w sits in its scales */
} vacc_op_linear;

/* Linear with one weight per expert: row r of x meets w[e] where
 * offsets[e] <= r < offsets[e + 1] (DeepGEMM's grouped contiguous GEMM). Rows from
 * offsets[E] on are left as they are. */
typedef struct vacc_op_grouped_linear {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [R, K]: F32, BF16 or F8_E4M3 */
  vacc_tensor x_scales; /* read, optional: [R, scale_columns], F32; present where x is FP8 */
  vacc_tensor w; /* read: [E, N, K], the dtype of x */
  vacc_tensor w_scales; /* read, optional: [E, scale_rows, scale_columns], F32; present where w is FP8 */
  vacc_tensor offsets; /* read: [E + 1], I32, ascending from 0 */
  vacc_tensor out; /* written: [R, N], F32 or BF16 */
  vacc_block_grid grid; /* Where each FP8 w[e] sits in its scales */
  vacc_routing routing; /* How the rows came about: what a cost model may assume where no values exist */
} vacc_op_grouped_linear;

/* One small matrix per head: out[t, h] = x[t, h] · w[h]ᵀ for w[h] of shape [N, K], or
 * x[t, h] · w[h] for [K, N] with k_major. The two halves of MLA's absorbed form. */
typedef struct vacc_op_batched_linear {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, h, K], F32 or BF16 */
  vacc_tensor w; /* read: [h, N, K], or [h, K, N] with k_major; as x */
  vacc_tensor out; /* written: [T, h, N], as x */
  uint32_t k_major; /* Whether w[h] is stored with K as its rows (0 or 1) */
  uint32_t reserved_1; /* 0 */
} vacc_op_batched_linear;

/* Rotary embedding in place, interleaved layout: the pair (x[2i], x[2i+1]) turns by the
 * angle of frequency i at its token's position. */
typedef struct vacc_op_rope {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read and written: [T, h, d], F32 or BF16 */
  vacc_tensor positions; /* read: [T], I32: rows of table */
  vacc_tensor table; /* read: [max_position, d], F32: d/2 cosines, then d/2 sines */
} vacc_op_rope;

/* Writes each token's latent and rotary key to its slot of the paged cache. */
typedef struct vacc_op_cache_write {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor latent; /* read: [T, r], F32 or BF16 */
  vacc_tensor k_rope; /* read: [T, d], as latent */
  vacc_tensor slots; /* read: [T], I32: page · page_size + offset; a negative slot writes nothing */
  vacc_tensor cache; /* read and written: [pages, page_size, r + d], as latent */
} vacc_op_cache_write;

/* Gathers the cached rows of sequences, one after the other: what chunked prefill attends to. */
typedef struct vacc_op_cache_read {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor cache; /* read: [pages, page_size, r + d], F32 or BF16 */
  vacc_tensor block_table; /* read: [B, max_pages], I32: the pages of each sequence in order */
  vacc_tensor kv_starts; /* read: [B + 1], I32: where each sequence begins in out */
  vacc_tensor out; /* written: [S, r + d], as cache */
} vacc_op_cache_read;

/* MLA in expanded form, causal, over sequences of various lengths (FlashAttention's varlen
 * prefill): scores (q_nope·k_nope + q_rope·k_rope) · scale, softmax in FP32. The queries of
 * a sequence are its last tokens: query i of q sees the first kv - q + i + 1 keys. */
typedef struct vacc_op_mla_prefill {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor q; /* read: [T, h, nope + d], F32 or BF16: nope first, rotary part last */
  vacc_tensor kv; /* read: [S, h, nope + v], as q: keys first, values last */
  vacc_tensor k_rope; /* read: [S, d], as q: one rotary key for all heads */
  vacc_tensor q_starts; /* read: [B + 1], I32: where each sequence begins in q */
  vacc_tensor kv_starts; /* read: [B + 1], I32: where each sequence begins in kv */
  vacc_tensor out; /* written: [T, h, v], as q */
  float scale; /* Softmax scale */
  uint32_t reserved_1; /* 0 */
  vacc_attention_work work; /* How much there is to do */
} vacc_op_mla_prefill;

/* MLA in absorbed form over the paged latent cache (FlashMLA): multi-query attention with one
 * key of r + d and the first r of it as value. Causal as MlaPrefill. */
typedef struct vacc_op_mla_decode {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor q_latent; /* read: [T, h, r], F32 or BF16: queries times W_UK */
  vacc_tensor q_rope; /* read: [T, h, d], as q_latent */
  vacc_tensor cache; /* read: [pages, page_size, r + d], as q_latent */
  vacc_tensor block_table; /* read: [B, max_pages], I32: the pages of each sequence in order */
  vacc_tensor q_starts; /* read: [B + 1], I32: where each sequence begins in q_latent */
  vacc_tensor kv_lens; /* read: [B], I32: keys of each sequence, its own new tokens included */
  vacc_tensor out; /* written: [T, h, r], as q_latent */
  float scale; /* Softmax scale; that of the expanded form, never from the latent width */
  uint32_t reserved_1; /* 0 */
  vacc_attention_work work; /* How much there is to do */
} vacc_op_mla_decode;

/* out = silu(gate) · up for x = [gate | up]. */
typedef struct vacc_op_swiglu {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, 2·I], F32 or BF16 */
  vacc_tensor out; /* written: [T, I], as x */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: rows from its last element on are left as they are. More than T is a data error; since 1.1 */
  uint32_t expected_rows; /* Rows expected to count where row_offsets is present, for cost models; 0 for all; since 1.1 */
  uint32_t reserved_1; /* 0 */
} vacc_op_swiglu;

/* The router (DeepSeek-V3 report, section 2.1.2; noaux_tc): s = sigmoid(logits); a
 * group's score is the sum of its two largest s + bias; of the best groups_kept groups
 * the k experts with the largest s + bias are chosen (others count as −∞; ties go to the
 * lower index) and weighted by s, divided by their sum if normalize, times scale.
 * Chosen experts come in descending order of s + bias. */
typedef struct vacc_op_gate {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor logits; /* read: [T, E], F32 */
  vacc_tensor bias; /* read, optional: [E], F32: e_score_correction_bias */
  vacc_tensor experts; /* written: [T, k], I32 */
  vacc_tensor weights; /* written: [T, k], F32 */
  uint32_t groups; /* Groups of E / groups neighbouring experts */
  uint32_t groups_kept; /* Groups whose experts may be chosen */
  uint32_t normalize; /* Whether weights are divided by their sum (plus 1e-20) (0 or 1) */
  float scale; /* routed_scaling_factor */
} vacc_op_gate;

/* The sending half of expert parallelism: one row for each destination (a rank, or a node of
 * ranks) that holds at least one of a token's experts, so that a token crosses each link once
 * however many of its experts live behind it (DeepEP's dispatch layout; DeepSeek-V3 report,
 * section 3.2). offsets are those of VACC_COLLECTIVE_ALL_TO_ALL_V. Since 1.1.
 *
 * Expert e lives on destination e / experts_per_destination. Rows come by destination,
 * then by token. Rows of the outputs from offsets[D] on are left as they are. Two hops, to a
 * node and then to a rank of it, are two of these. */
typedef struct vacc_op_moe_dispatch {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, H]: F32, BF16 or F8_E4M3 */
  vacc_tensor x_scales; /* read, optional: [T, groups], F32: moves with x */
  vacc_tensor experts; /* read: [T, k], I32; negative: no expert */
  vacc_tensor weights; /* read: [T, k], F32 */
  vacc_tensor replicas; /* read, optional: [total_experts, c], I32: the physical experts that stand for each logical one: those present first, then -1. Token t takes number (t + replica_offset) mod n of the n present. Absent: experts are physical already */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: only tokens before its last element are sent; rows of the others are -1. More than T is a data error */
  vacc_tensor out; /* written: [R, H], as x. More rows than R are a data error; T * min(k, D) always suffice */
  vacc_tensor out_scales; /* written, optional: [R, groups], F32 */
  vacc_tensor out_experts; /* written: [R, k], I32: each slot's expert, counted from the destination's first; -1 for a slot whose expert lives elsewhere */
  vacc_tensor out_weights; /* written: [R, k], F32: the token's weights, all of them */
  vacc_tensor offsets; /* written: [D + 1], I32: where each destination's rows begin; the last is the number of rows */
  vacc_tensor rows; /* written: [T, k], I32: the row for the first slot that goes to its destination; -1 for later slots of the token with the same one, and where there is no expert */
  uint32_t experts_per_destination; /* Experts on each destination */
  uint32_t total_experts; /* Experts in all, as experts numbers them. A number outside is a data error */
  uint32_t replica_offset; /* Added to a token's number where a replica is chosen */
  uint32_t expected_rows; /* Rows of out expected to be written, for cost models; 0 for all R */
} vacc_op_moe_dispatch;

/* Sorts token copies by expert: for each expert in turn, the tokens that chose it, in order.
 * Rows of out beyond the copies are left as they are. */
typedef struct vacc_op_moe_permute {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, H]: F32, BF16 or F8_E4M3 */
  vacc_tensor x_scales; /* read, optional: [T, groups], F32: moves with x */
  vacc_tensor experts; /* read: [T, k], I32: global expert numbers; negative: no expert (since 1.1) */
  vacc_tensor out; /* written: [R, H], as x; R is at least the number of copies kept, at most T·k */
  vacc_tensor out_scales; /* written, optional: [R, groups], F32 */
  vacc_tensor offsets; /* written: [E + 1], I32: where each local expert's rows begin */
  vacc_tensor rows; /* written: [T, k], I32: the row of each copy, −1 where its expert is not local */
  uint32_t first_expert; /* The first local expert; E local experts follow from the length of offsets */
  uint32_t total_experts; /* Experts in all. A number beyond is a data error */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: only tokens before its last element are copied; rows of the others are -1. More than T is a data error; since 1.1 */
  uint32_t expected_rows; /* Rows of out expected to be written, for cost models; 0 for all R; since 1.1 */
  uint32_t reserved_1; /* 0 */
} vacc_op_moe_permute;

/* out[t] = base[t] + Σ_j weights[t, j] · y[rows[t, j]], summed in FP32 in the order of j,
 * the base last, and rounded once. Without weights each row counts once. */
typedef struct vacc_op_moe_combine {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor y; /* read: [R, H], F32 or BF16 */
  vacc_tensor rows; /* read: [T, k], I32, from MoePermute or MoeDispatch; negative rows add nothing */
  vacc_tensor weights; /* read, optional (since 1.1): [T, k], F32; absent: 1 */
  vacc_tensor base; /* read, optional: [T, H], as y: the shared expert's output */
  vacc_tensor out; /* written: [T, H], as y */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: output rows from its last element on are left as they are. More than T is a data error; since 1.1 */
  uint32_t expected_rows; /* Output rows expected to count where row_offsets is present, for cost models; 0 for all; since 1.1 */
  uint32_t expected_copies; /* Rows of y expected to be added in all, for cost models; 0 for k of each output row; since 1.3 */
} vacc_op_moe_combine;

/* out = a + b. out may be a or b. */
typedef struct vacc_op_add {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor a; /* read: F32 or BF16 */
  vacc_tensor b; /* read: As a */
  vacc_tensor out; /* written: As a */
} vacc_op_add;

/* Converts between F32 and BF16, to nearest even. */
typedef struct vacc_op_cast {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: F32 or BF16 */
  vacc_tensor out; /* written: F32 or BF16, the shape of x */
} vacc_op_cast;

/* Copies a strided view to another of the same shape and dtype. */
typedef struct vacc_op_copy {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: Any dtype */
  vacc_tensor out; /* written: As x */
} vacc_op_copy;

/* Per row, the number of the largest of the first limit values; ties go to the lower one.
 * A NaN is a data error. */
typedef struct vacc_op_argmax {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, V], F32 or BF16 */
  vacc_tensor out; /* written: [T], I32 */
  uint32_t limit; /* Columns that count: ids of a padded vocabulary lie beyond */
  uint32_t reserved_1; /* 0 */
} vacc_op_argmax;

/* Per row, the k largest of the first limit values in descending order; ties go to the
 * lower number. A NaN is a data error. */
typedef struct vacc_op_top_k {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, V], F32 or BF16 */
  vacc_tensor values; /* written: [T, k], F32 */
  vacc_tensor indices; /* written: [T, k], I32 */
  uint32_t limit; /* Columns that count */
  uint32_t reserved_1; /* 0 */
} vacc_op_top_k;

/* VACC_OP_RMS_NORM, then VACC_OP_QUANTIZE of what it gives, bit for bit as the two would: the norm
 * is rounded to the dtype of x before it is quantised. Since 1.2. */
typedef struct vacc_op_rms_norm_quantize {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, H], F32 or BF16 */
  vacc_tensor weight; /* read: [H], as x */
  vacc_tensor residual; /* read and written, optional: [T, H], as x: residual += x (rounded to its dtype) comes first, and the norm is that of the sum */
  vacc_tensor out; /* written, optional: [T, H], as x: the norm, where somebody needs it besides */
  vacc_tensor q; /* written: [T, H], F8_E4M3 */
  vacc_tensor scales; /* written: [T, groups], F32 */
  float eps; /* Added to the mean square */
  uint32_t column_offset; /* As for VACC_OP_QUANTIZE */
  uint32_t scale_format; /* How scales are rounded (VACC_SCALE_*) */
  uint32_t reserved_1; /* 0 */
} vacc_op_rms_norm_quantize;

/* VACC_OP_SWIGLU, then VACC_OP_QUANTIZE of what it gives, bit for bit as the two would: the product
 * is rounded to the dtype of x before it is quantised. Since 1.2. */
typedef struct vacc_op_swiglu_quantize {
  uint32_t size;
  uint32_t reserved; /* 0 */
  vacc_tensor x; /* read: [T, 2·I], F32 or BF16: gate, then up */
  vacc_tensor row_offsets; /* read, optional: [n + 1], I32: rows from its last element on are left as they are. More than T is a data error */
  vacc_tensor q; /* written: [T, I], F8_E4M3 */
  vacc_tensor scales; /* written: [T, groups], F32 */
  uint32_t column_offset; /* As for VACC_OP_QUANTIZE */
  uint32_t scale_format; /* How scales are rounded (VACC_SCALE_*) */
  uint32_t expected_rows; /* Rows expected to count where row_offsets is present, for cost models; 0 for all */
  uint32_t reserved_1; /* 0 */
} vacc_op_swiglu_quantize;


/* ---------------------------------------------------------------------------------------------
 * 8. OPS: LAUNCH AND SUPPORT
 */

/* REQUIRED. SUBMITS. Launches the op whose code is `op` (VACC_OP_*), with the matching
 * vacc_op_* descriptor. The buffers that it names may be freed when the call returns: the command
 * keeps their memory. What is wrong with values in that memory (an index outside its table) comes
 * later, as a failed command with VACC_CAUSE_DATA.
 * Errors: BAD_HANDLE (the stream's, or a buffer's), INVALID_ARGUMENT (null, a dtype or rank that
 * does not exist, strides that overlap, a view outside its buffer or misaligned, another device's
 * buffer, not ordered), STRUCT_SIZE, UNSUPPORTED exactly where vacc_device_supports says so,
 * CONCURRENT_USE, FAILED, DEVICE_LOST. */
vacc_status vacc_stream_launch(vacc_stream stream, uint32_t op, const void *descriptor,
                               const char *label, uint64_t label_length);

/* REQUIRED. Whether the device can run the op with operands of these shapes: VACC_OK, or
 * UNSUPPORTED with the reason as the text of vacc_last_error(). Buffers are not looked at. The
 * answer never changes while the device is open.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, a tensor that no rule allows), STRUCT_SIZE,
 * UNSUPPORTED (also: an op code, or a field of a later version, that is not known). */
vacc_status vacc_device_supports(vacc_device device, uint32_t op, const void *descriptor);

/* ---------------------------------------------------------------------------------------------
 * 9. TIMELINES
 *
 * A stream's timeline counts its commands; waits count too, as do reads. "Value v is reached"
 * means that the first v commands are done.
 */

typedef struct vacc_timestamp {
  uint32_t size;
  uint32_t clock; /* VACC_CLOCK_* */
  uint64_t picoseconds;
} vacc_timestamp;

/* REQUIRED. The value at which everything submitted so far is done: the number of commands. Told of
 * a poisoned stream too.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null). */
vacc_status vacc_stream_get_point(vacc_stream stream, uint64_t *value);

/* REQUIRED. The value reached so far, without waiting; it never falls, and stops where a stream was
 * poisoned. Having seen it orders nothing: vacc_stream_synchronize does.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null). */
vacc_status vacc_stream_get_reached(vacc_stream stream, uint64_t *value);

/* REQUIRED. SUBMITS to `stream`. Later commands of it wait for `value` of `other`, which has been
 * submitted already. `other` is only named: it may be in use, and destroyed afterwards. Waiting for
 * the stream itself, at a value submitted already, does nothing and is no command.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (a value not submitted yet, another instance),
 * CONCURRENT_USE, FAILED (of `stream`), DEVICE_LOST. */
vacc_status vacc_stream_wait(vacc_stream stream, vacc_stream other, uint64_t value);

/* REQUIRED. The host waits until `value` is reached; others may submit meanwhile. What any thread
 * submits afterwards, to whatever stream, is ordered after the first `value` commands.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (a value not submitted yet), TIMEOUT, FAILED (one of the first
 * `value` commands, or what they depend on), DEVICE_LOST. */
vacc_status vacc_stream_synchronize(vacc_stream stream, uint64_t value, uint64_t timeout_ns);

/* OPTIONAL. When the command with this number completed, on the clock of the device's properties.
 * Does not wait.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE, NOT_READY (it has not, or its record
 * has expired), UNSUPPORTED (no clock). */
vacc_status vacc_stream_get_completion(vacc_stream stream, uint64_t value, vacc_timestamp *timestamp);

/* ---------------------------------------------------------------------------------------------
 * 10. TOPOLOGY
 */

#define VACC_LINK_NONE 0u
#define VACC_LINK_SAME_DIE 1u
#define VACC_LINK_ON_CARD 2u
#define VACC_LINK_IN_HOST 3u
#define VACC_LINK_NETWORK 4u

typedef struct vacc_link {
  uint32_t size;
  uint32_t kind; /* VACC_LINK_*; NONE: nothing joins the two */
  double bytes_per_second; /* one way */
  uint64_t latency_ps;
  uint32_t peer_copy; /* 1: a copy needs no host */
  uint32_t reserved;
} vacc_link;

/* REQUIRED. The path between two devices, by ordinal: from a device to itself too. Never changes.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, no such ordinal), STRUCT_SIZE. */
vacc_status vacc_topology_get_link(vacc_instance instance, uint32_t from, uint32_t to, vacc_link *link);

/* ---------------------------------------------------------------------------------------------
 * 11. COMMUNICATORS
 *
 * One handle is one rank of a group. Collectives are commands of a stream, submitted in batches
 * by value. Every rank submits the same batches in the same order. Ranks that disagree are told,
 * all of them: VACC_CAUSE_MISMATCH.
 */

typedef struct vacc_comm_id {
  uint8_t bytes[16];
} vacc_comm_id;

#define VACC_COLLECTIVE_ALL_REDUCE 256u
#define VACC_COLLECTIVE_ALL_GATHER 257u
#define VACC_COLLECTIVE_REDUCE_SCATTER 258u
#define VACC_COLLECTIVE_ALL_TO_ALL 259u
#define VACC_COLLECTIVE_BROADCAST 260u
#define VACC_COLLECTIVE_SEND 261u
#define VACC_COLLECTIVE_RECV 262u
#define VACC_COLLECTIVE_ALL_TO_ALL_V 263u /* since 1.1 */

#define VACC_REDUCE_SUM 0u
#define VACC_REDUCE_MAX 1u
#define VACC_REDUCE_MIN 2u

/* Tensors are contiguous; n elements each, P ranks.
 *   ALL_REDUCE      send n, recv n: every rank gets the combination, ranks in ascending order
 *   ALL_GATHER      send n, recv P n
 *   REDUCE_SCATTER  send P n, recv n
 *   ALL_TO_ALL      part p of send becomes part `rank` of rank p's recv; equal parts, or counts
 *   ALL_TO_ALL_V    rows send_offsets[p] to send_offsets[p + 1] of send [R, W] go to rank p; recv [C, W]
 *                   gets the parts from rank 0, 1, ... without gaps, its rows beyond are left as they
 *                   are. The offsets are values in device memory, read when it runs; those that do
 *                   not ascend from 0 to at most R, and more rows than C, are VACC_CAUSE_DATA
 *   BROADCAST       peer is the root; the tensor is `send` on every rank
 *   SEND            send, to peer
 *   RECV            recv, from peer
 * Tensors that a kind does not use have dtype NONE. In place is allowed where send (or recv) is
 * part `rank` of the other, or the same. */
typedef struct vacc_collective {
  uint32_t size;
  uint32_t kind;      /* VACC_COLLECTIVE_* */
  uint32_t reduction; /* VACC_REDUCE_* */
  uint32_t peer;
  vacc_tensor send;
  vacc_tensor recv;
  const uint64_t *send_counts; /* P elements each, or both null; read during the call only */
  const uint64_t *recv_counts;
  vacc_tensor send_offsets; /* ALL_TO_ALL_V: [P + 1], I32; since 1.1 */
  vacc_tensor recv_offsets; /* ALL_TO_ALL_V, optional, written: [P + 1], I32: where each rank's rows begin in recv; since 1.1 */
  uint32_t expected_rows;   /* ALL_TO_ALL_V: rows that one rank is expected to send in all, for cost models; since 1.1 */
  uint32_t reserved;        /* 0 */
} vacc_collective;

/* REQUIRED. An id for a new group: one rank makes it, and gives it to the others by its own means,
 * as 16 bytes. It belongs to nobody and is never given back.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), DEVICE_LOST. */
vacc_status vacc_comm_create_id(vacc_device device, vacc_comm_id *id);

/* REQUIRED. Joins as one rank. Returns at once: ranks meet at their first collective, and may join
 * in any order, from any threads. The caller owns *comm.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null, the rank is taken or not below `ranks`, `ranks`
 * differs), DEVICE_LOST. */
vacc_status vacc_comm_init(vacc_device device, const vacc_comm_id *id, uint32_t rank,
                           uint32_t ranks, vacc_comm *comm);

/* REQUIRED. Gives the handle back at once; collectives that were submitted still run. Works on a lost
 * device and a failed group too.
 * Errors: BAD_HANDLE. */
vacc_status vacc_comm_destroy(vacc_comm comm);

/* REQUIRED. SUBMITS to `stream`. Queues a batch as one command: either group collectives, or sends
 * and receives only. An empty batch is no command. It is done when it is done on this rank. Ranks
 * must agree on the order of a communicator's batches, whatever streams they are on: one thread
 * submits them, or threads take turns.
 * Errors: BAD_HANDLE (the communicator's, the stream's, or a buffer's), INVALID_ARGUMENT (null, sizes
 * that do not fit, a peer that does not exist, another device's stream), STRUCT_SIZE, UNSUPPORTED (a
 * kind or a reduction that is not known), CONCURRENT_USE, FAILED (of the stream or the group),
 * DEVICE_LOST. */
vacc_status vacc_comm_submit(vacc_comm comm, vacc_stream stream, const vacc_collective *batch,
                             uint32_t count, const char *label, uint64_t label_length);

/* REQUIRED. Fails everything pending and everything later, on every rank, with VACC_CAUSE_ABORTED and
 * the reason; of several aborts, and of a failure before, the first stays. Does not wait. The way out
 * when a peer will never arrive: for any thread, also while others wait or submit.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null with a length, not UTF-8). */
vacc_status vacc_comm_abort(vacc_comm comm, const char *reason, uint64_t reason_length);

/* REQUIRED. What has failed so far in the group, on whatever rank, without waiting: VACC_OK or the
 * first failure.
 * Errors: BAD_HANDLE, FAILED, DEVICE_LOST. */
vacc_status vacc_comm_get_status(vacc_comm comm);

/* ---------------------------------------------------------------------------------------------
 * 12. ASYNCHRONOUS ERRORS
 */

/* REQUIRED. The failure that poisoned the stream: stream, sequence number, command and label of
 * the command that failed first. Does not wait, changes nothing; error->status is VACC_OK while the
 * stream is well.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE. */
vacc_status vacc_stream_get_error(vacc_stream stream, vacc_error *error);

/* REQUIRED. Whether the device is lost: error->status is VACC_OK or VACC_ERROR_DEVICE_LOST with
 * the reason.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE. */
vacc_status vacc_device_get_error(vacc_device device, vacc_error *error);

/* ---------------------------------------------------------------------------------------------
 * 13. PROFILING (OPTIONAL: all of these, or none)
 */

#define VACC_BOUND_UNKNOWN 0u
#define VACC_BOUND_MEMORY 1u
#define VACC_BOUND_MATRIX 2u
#define VACC_BOUND_VECTOR 3u
#define VACC_BOUND_LINK 4u
#define VACC_BOUND_LAUNCH 5u

typedef struct vacc_profile_record {
  uint32_t size;
  uint32_t command; /* op code, collective, or VACC_COMMAND_* */
  uint32_t stream_index;
  uint32_t clock; /* VACC_CLOCK_* of begin and end */
  uint64_t sequence;
  uint64_t begin_ps;
  uint64_t end_ps;
  uint64_t operations; /* 0 where not known */
  uint64_t bytes;      /* 0 where not known */
  uint32_t bound;      /* VACC_BOUND_* */
  uint32_t reserved;
  char label[VACC_LABEL_LENGTH];
} vacc_profile_record;

/* OPTIONAL. Begins (1) or ends (0) recording every command of the device that completes from now on.
 * What was recorded and not read is dropped when it begins, and kept when it ends.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (neither 0 nor 1), UNSUPPORTED (no clock: never an empty
 * profile). */
vacc_status vacc_profile_enable(vacc_device device, uint32_t enable);

/* OPTIONAL. Takes at most `capacity` of the oldest records, each of which is given once. Of the array,
 * which is the caller's, records[0].size says how large each element is; each one written says how
 * much of it was filled, so records[0].size is set again before the next call. *count is how many
 * were written, *lost how many did not fit the library's memory since the last call.
 * Records of a stream come in order, and before anybody sees the stream's timeline reach them.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE. */
vacc_status vacc_profile_read(vacc_device device, vacc_profile_record *records, uint32_t capacity,
                              uint32_t *count, uint64_t *lost);

/* ---------------------------------------------------------------------------------------------
 * 14. TELEMETRY (OPTIONAL)
 */

/* What the device cannot tell. */
#define VACC_TELEMETRY_UNKNOWN (-1)

typedef struct vacc_telemetry {
  uint32_t size;
  /* Utilisation since the last call, in thousandths. */
  int32_t ai_permille;
  int32_t vector_dsp_permille;
  int32_t video_decode_permille;
  int32_t video_encode_permille;
  int32_t power_milliwatts;
  int32_t ai_clock_mhz;
  int32_t memory_clock_mhz;
  int32_t temperature_millicelsius;
  int32_t reserved;
  uint64_t memory_used;
  uint64_t memory_capacity;
} vacc_telemetry;

/* OPTIONAL. Readings of this moment; utilisations are averages since the last call on this device,
 * by whatever thread. Does not wait for anything.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null), STRUCT_SIZE, DEVICE_LOST. */
vacc_status vacc_device_get_telemetry(vacc_device device, vacc_telemetry *telemetry);

/* ---------------------------------------------------------------------------------------------
 * 15. FAULT INJECTION (OPTIONAL, for tests)
 */

#define VACC_FAULT_PASS 0u
#define VACC_FAULT_DELAY 1u /* takes delay_ps longer */
#define VACC_FAULT_FAIL 2u  /* fails with the text */
#define VACC_FAULT_HANG 3u  /* never completes */
#define VACC_FAULT_LOSE 4u  /* the device is lost */

/* nth: each matching command. */
#define VACC_FAULT_EACH UINT64_MAX

typedef struct vacc_fault_rule {
  uint32_t size;
  uint32_t action; /* VACC_FAULT_* */
  /* The how-many-th matching command of this device, from 0, counted as submitted; or EACH. */
  uint64_t nth;
  uint64_t delay_ps;
  /* Name of the command ("linear", "all_reduce", "transfer"); null matches all. */
  const char *command;
  uint64_t command_length;
  /* Part of the label; null matches all. */
  const char *label;
  uint64_t label_length;
  /* What a failure says. */
  const char *text;
  uint64_t text_length;
} vacc_fault_rule;

/* OPTIONAL. Replaces the device's rules, for commands submitted from now on; the first that matches
 * decides. No rules: count 0. Counts of matches begin anew.
 * Errors: BAD_HANDLE, INVALID_ARGUMENT (null with a count, a text that is not UTF-8), STRUCT_SIZE,
 * UNSUPPORTED (an action that is not known). */
vacc_status vacc_device_set_faults(vacc_device device, const vacc_fault_rule *rules, uint32_t count);

/* ---------------------------------------------------------------------------------------------
 * 16. COMMAND LISTS (OPTIONAL; since 1.2)
 *
 * A step of a model issues the same commands of several streams again and again. A list gives all
 * of them to the library in one call. The library keeps nothing of a list: what changes from one
 * launch to the next (the work of an attention op) is changed in the caller's entries. What cannot
 * launch lists is given the same commands one by one.
 */

#define VACC_LIST_LAUNCH 1u      /* as vacc_stream_launch: op, descriptor, label */
#define VACC_LIST_COLLECTIVES 2u /* as vacc_comm_submit: comm, batch, count (not 0), label */
#define VACC_LIST_FILL 3u        /* as vacc_stream_fill: region, byte */
#define VACC_LIST_WAIT 4u        /* as vacc_stream_wait, for entry `wait` of the list, or START */

/* Waits for what was submitted to streams[0] before the list; from another stream only. */
#define VACC_LIST_START UINT64_MAX

typedef struct vacc_list_entry {
  uint32_t size;
  uint32_t action; /* VACC_LIST_*; what an action does not use is zero */
  uint32_t stream; /* which of the streams of the launch */
  uint32_t op;     /* LAUNCH: VACC_OP_* */
  const void *descriptor; /* LAUNCH: the op's vacc_op_* */
  vacc_comm comm;         /* COLLECTIVES */
  const vacc_collective *batch;
  uint32_t count;
  uint32_t byte; /* FILL: 0 to 255 */
  vacc_region region;
  uint64_t wait; /* WAIT: the number of an earlier entry that is on another stream, or START */
  const char *label;
  uint64_t label_length;
} vacc_list_entry;

/* OPTIONAL. SUBMITS to each of the streams, which are distinct and of this device. Submits the
 * entries in order, each as one command of its stream, as if by the function that its action
 * names. Entries, descriptors, batches and labels may be reused when the call returns.
 * When an entry is refused, those before it have been submitted, it and those after it have not;
 * the error is that of the function which its action names, and tells about that command.
 * Errors: those of the functions that the actions name; INVALID_ARGUMENT also for a wait for
 * anything but an earlier entry of another stream, an empty batch, a stream that the launch does not
 * have; UNSUPPORTED for an action not known. Where the streams are at fault (null, twice, of another
 * device, BAD_HANDLE, CONCURRENT_USE) nothing was submitted. */
vacc_status vacc_list_launch(vacc_device device, const vacc_stream *streams, uint32_t stream_count,
                             const vacc_list_entry *entries, uint32_t count);

#ifdef __cplusplus
}
#endif

#endif /* VACC_H */
