// The bench's runtime: lanes as fibers, meeting points, guarded memory, checks of every access.
// launching.py mirrors the structures that Python fills in, field by field.
#pragma once

#include "include/bench.h"

typedef unsigned int u32;
typedef unsigned long u64;

struct Buffer {
  unsigned char* address;
  u64 size;
  const char* name;
  u32 writable, initialized;
};

struct Launch {
  void (*entry)(void** buffers, const BenchLane* lane);
  const char *module_start, *module_end;
  Buffer* buffers;
  u32 buffer_count, order, seed, checked, fill, at_end, timeout;
  u32 grid[3], group[3];
};

struct Report {
  u32 failed, line;
  u64 pc;
  char kind[32], text[1024];
};

enum LaneState : u32 { READY, WAITING, DONE };

struct Lane {
  void* stack_pointer;
  BenchLane info;
  LaneState state;
  BenchKind kind;
  const char* what;
  u32 line, flags, meetings;
};

// A piece of memory that kernels may touch. Shadow cells exist where lanes may write, checked only.
struct Region {
  unsigned char* address;
  u64 size;
  const char* name;
  u32 writable, initialized, group_memory, place;
  u64* cells;
};

enum { MAX_LANES = 1024, MAX_REGIONS = 128, PAGE = 4096, STACK = 256 * 1024, GUARD = 1 << 20 };
enum { GROUP_MEMORY_LIMIT = 32 * 1024 };

// Memory that the kernels' instrumented code may access.
struct Shared {
  void* buffers[MAX_REGIONS];
  Lane lanes[MAX_LANES];
  BenchMeeting meetings[MAX_LANES / BENCH_SIMD][2];
};

extern Shared shared;
extern Lane* current;
extern const Launch* launch;
extern Region regions[MAX_REGIONS];
extern u32 region_count, group_number;
// Barriers passed, by memory flag: [0] device, [1] threadgroup.
extern u32 group_epoch[2], simd_epoch[MAX_LANES / BENCH_SIMD][2];

[[noreturn]] void fail(const char* kind, u64 pc, u32 line, const char* format, ...);
unsigned char* stack_of(const Lane* lane);
void describe(char* text, u64 room, const unsigned char* address);
void add_region(const Buffer& buffer, bool group_memory, u32 place);
void check_all_written();
void drop_regions();

extern "C" {
void* bench_map(u64 size, u32 at_end);
void bench_unmap(void* address, u64 size);
void bench_protect(void* address, u64 size);
int bench_run(const Launch* wanted, Report* report);
}
