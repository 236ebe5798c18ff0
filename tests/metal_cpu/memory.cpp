// Guarded memory, and checks of every load and store: bounds, initialization, races.
// clang's thread-sanitizer pass calls the __tsan_ functions; this runtime replaces TSan's, because it
// knows lanes, threadgroups and barriers.
#include "runtime.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

Region regions[MAX_REGIONS];
u32 region_count;

static u64 pages(u64 size) { return (size + PAGE - 1) / PAGE * PAGE; }

// Memory between two guards. `at_end` puts its last 16-byte unit against the upper guard.
void* bench_map(u64 size, u32 at_end) {
  u64 inner = pages(size);
  void* memory = mmap(nullptr, inner + 2 * GUARD, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  unsigned char* start = (unsigned char*)memory + GUARD;
  if (inner) mprotect(start, inner, PROT_READ | PROT_WRITE);
  return at_end ? start + inner - (size + 15) / 16 * 16 : start;
}

void bench_unmap(void* address, u64 size) {
  munmap((unsigned char*)(u64(address) / PAGE * PAGE) - GUARD, pages(size) + 2 * GUARD);
}

void bench_protect(void* address, u64 size) {
  if (size) mprotect((void*)(u64(address) / PAGE * PAGE), pages(size), PROT_READ);
}

void describe(char* text, u64 room, const unsigned char* address) {
  for (u32 i = 0; i < region_count; i++) {
    const Region& region = regions[i];
    if (address >= region.address + region.size && address < region.address + region.size + GUARD)
      snprintf(text, room, "%ld bytes past the end of %s (%lu bytes)",
               long(address - region.address - region.size), region.name, region.size);
    else if (address < region.address && address + GUARD > region.address)
      snprintf(text, room, "%ld bytes before %s (%lu bytes)", long(region.address - address),
               region.name, region.size);
    else if (address >= region.address && address < region.address + region.size)
      snprintf(text, room, "byte %ld of %s (%lu bytes)", long(address - region.address),
               region.name, region.size);
    else
      continue;
    return;
  }
  bool deep = current && address < stack_of(current) && address >= stack_of(current) - 2 * PAGE;
  snprintf(text, room, deep ? "the lane's stack is full" : "nowhere near any array");
}

// ---- regions -----------------------------------------------------------------------------------

enum { CELLS = 4 };  // per byte: the last writer, two readers of one simdgroup, one of another

static u64 cell_bytes(const Region& region) { return region.size * CELLS * sizeof(u64); }

void add_region(const Buffer& buffer, bool group_memory, u32 place) {
  if (region_count == MAX_REGIONS) fail("bench", 0, 0, "more than %d arrays", MAX_REGIONS);
  Region& region = regions[region_count++];
  region = {buffer.address, buffer.size, buffer.name, buffer.writable, buffer.initialized,
            group_memory, place, nullptr};
  if (!launch->checked || !buffer.writable || !buffer.size) return;
  void* cells = mmap(nullptr, cell_bytes(region), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) fail("bench", 0, 0, "no memory to watch %s", region.name);
  region.cells = (u64*)cells;
}

void drop_regions() {
  for (u32 i = 0; i < region_count; i++) {
    if (regions[i].cells) munmap(regions[i].cells, cell_bytes(regions[i]));
    if (regions[i].group_memory) bench_unmap(regions[i].address, regions[i].size);
  }
  region_count = 0;
}

void* bench_threadgroup(const char* name, unsigned place, unsigned long size) {
  u64 total = size;
  for (u32 i = 0; i < region_count; i++) {
    if (!regions[i].group_memory) continue;
    if (regions[i].place == place && regions[i].size == size) return regions[i].address;
    total += regions[i].size;
  }
  if (total > GROUP_MEMORY_LIMIT)
    fail("limits", 0, 0, "%lu bytes of threadgroup memory; there are %d", total,
         GROUP_MEMORY_LIMIT);
  Buffer buffer = {(unsigned char*)bench_map(size, launch->at_end), size, name, 1, 0};
  if (!buffer.address) fail("bench", 0, 0, "no memory for %s", name);
  memset(buffer.address, int(launch->fill), size);
  add_region(buffer, true, place);
  return buffer.address;
}

// ---- earlier accesses to a byte, and their order -----------------------------------------------

// A cell: threadgroup + 1 (24 bits), lane (10), threadgroup barriers (16), simdgroup barriers (14).
static u64 group_of(u64 cell) { return cell >> 40; }
static u32 lane_of(u64 cell) { return cell >> 30 & 1023; }
static u32 group_epoch_of(u64 cell) { return cell >> 14 & 65535; }
static u32 simd_epoch_of(u64 cell) { return cell & 16383; }

static u64 now(bool group_memory) {
  u32 lane = u32(current - shared.lanes), group = group_epoch[group_memory];
  u32 simd = simd_epoch[lane / BENCH_SIMD][group_memory];
  if (group_number + 1 >= 1u << 24 || group >= 65536 || simd >= 16384)
    fail("bench", 0, 0, "more threadgroups or barriers than the race check can count");
  return u64(group_number + 1) << 40 | u64(lane) << 30 | u64(group) << 14 | simd;
}

static bool same_simdgroup(u64 a, u64 b) {
  return group_of(a) == group_of(b) && lane_of(a) / BENCH_SIMD == lane_of(b) / BENCH_SIMD;
}

static bool happens_before(u64 past, u64 present) {
  if (!past) return true;
  if (group_of(past) != group_of(present)) return false;
  if (lane_of(past) == lane_of(present)) return true;
  if (group_epoch_of(past) < group_epoch_of(present)) return true;
  return same_simdgroup(past, present) && simd_epoch_of(past) < simd_epoch_of(present);
}

[[noreturn]] static void race(const Region& region, u64 offset, const char* now, u64 past,
                              const char* before, u64 pc) {
  bool here = group_of(past) == group_number + 1;
  fail("race", pc, 0, "%s byte %lu of %s, and lane %u of %s has %s it with no barrier in between",
       now, offset, region.name, lane_of(past), here ? "this threadgroup" : "another threadgroup",
       before);
}

static void note_read(u64* cell, u64 present) {
  u64 *reader = cell + 1, *other_lane = cell + 2, *other_group = cell + 3;
  if (*reader && !same_simdgroup(*reader, present)) *other_group = *reader;
  else if (*reader && lane_of(*reader) != lane_of(present)) *other_lane = *reader;
  *reader = present;
}

static void check_cell(const Region& region, u64 offset, bool write, u64 present, u64 pc) {
  u64* cell = region.cells + offset * CELLS;
  // Each threadgroup starts with fresh threadgroup memory.
  bool stale = region.group_memory && *cell && group_of(*cell) != group_of(present);
  if (region.group_memory && (stale || (cell[1] && group_of(cell[1]) != group_of(present))))
    cell[0] = cell[1] = cell[2] = cell[3] = 0;
  if (!write && !*cell && !region.initialized)
    fail("uninitialized", pc, 0, "reads byte %lu of %s before any write", offset,
         region.name);
  if (!happens_before(*cell, present))
    race(region, offset, write ? "writes" : "reads", *cell, "written", pc);
  if (!write) return note_read(cell, present);
  for (int reader = 1; reader < CELLS; reader++)
    if (!happens_before(cell[reader], present))
      race(region, offset, "writes", cell[reader], "read", pc);
  cell[0] = present;
  cell[1] = cell[2] = cell[3] = 0;
}

// ---- accesses ----------------------------------------------------------------------------------

static bool within(const void* address, const void* start, u64 size) {
  return u64(address) - u64(start) < size;
}

static void check_elsewhere(const unsigned char* address, u64 size, bool write, u64 pc) {
  if (within(address, &shared, sizeof shared)) return;
  if (within(address, launch->module_start, launch->module_end - launch->module_start)) {
    if (write) fail("static state", pc, 0, "writes a variable that outlives the lane");
    return;
  }
  const unsigned char* stacks = stack_of(shared.lanes);
  if (within(address, stacks, u64(MAX_LANES) * (STACK + PAGE)))
    fail("out of bounds", pc, 0, "%s another lane's private memory", write ? "writes" : "reads");
  char text[300];
  describe(text, sizeof text, address);
  fail("out of bounds", pc, 0, "%s %lu bytes at %s", write ? "writes" : "reads", size, text);
}

static void check(const void* where, u64 size, bool write, u64 pc) {
  const unsigned char* address = (const unsigned char*)where;
  if (!current || within(address, stack_of(current), STACK)) return;
  for (u32 i = 0; i < region_count; i++) {
    const Region& region = regions[i];
    if (!within(address, region.address, region.size)) continue;
    u64 offset = u64(address - region.address);
    if (size > region.size - offset)
      fail("out of bounds", pc, 0, "%s %lu bytes at byte %lu of %s (%lu bytes)",
           write ? "writes" : "reads", size, offset, region.name, region.size);
    if (write && !region.writable) fail("read-only", pc, 0, "writes to %s", region.name);
    if (!region.cells) return;
    u64 present = now(region.group_memory);
    for (u64 k = 0; k < size; k++) check_cell(region, offset + k, write, present, pc);
    return;
  }
  check_elsewhere(address, size, write, pc);
}

void check_all_written() {
  for (u32 i = 0; i < region_count; i++) {
    const Region& region = regions[i];
    if (!region.cells || region.initialized || region.group_memory) continue;
    u64 missing = 0, first = 0;
    for (u64 k = region.size; k-- > 0;)
      if (!region.cells[k * CELLS]) missing++, first = k;
    if (missing)
      fail("uninitialized", 0, 0, "%lu of the %lu bytes of %s are never written, the first is %lu",
           missing, region.size, region.name, first);
  }
}

static void check_aligned(const void* address, u64 size, bool write, u64 pc) {
  if (u64(address) % (size < 8 ? size : 8))
    fail("undefined", pc, 0, "misaligned access to %lu bytes", size);
  check(address, size, write, pc);
}

#define HERE u64(__builtin_return_address(0))
#define ACCESS(SIZE)                                                                      \
  void __tsan_read##SIZE(void* address) { check_aligned(address, SIZE, false, HERE); }     \
  void __tsan_write##SIZE(void* address) { check_aligned(address, SIZE, true, HERE); }     \
  void __tsan_unaligned_read##SIZE(void* address) { check(address, SIZE, false, HERE); }   \
  void __tsan_unaligned_write##SIZE(void* address) { check(address, SIZE, true, HERE); }

extern "C" {
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)

void __tsan_init() {}

// clang's stack protector calls this when a function returns.
void __wrap___stack_chk_fail() {
  fail("out of bounds", HERE, 0, "writes past the end of a lane's own array");
}

void* __tsan_memcpy(void* to, const void* from, u64 size) {
  check(from, size, false, HERE);
  check(to, size, true, HERE);
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, u64 size) {
  check(from, size, false, HERE);
  check(to, size, true, HERE);
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, u64 size) {
  check(to, size, true, HERE);
  return memset(to, value, size);
}
}
