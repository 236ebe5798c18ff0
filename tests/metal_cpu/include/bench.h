// Interface between a kernel's lanes and the bench's runtime.
#pragma once

#define BENCH_SIMD 32
#define BENCH_VALUE 16  // bytes of the largest value a lane hands over: float4

struct BenchLane {
  unsigned position_in_grid[3], position_in_group[3], group_position[3];
  unsigned groups_per_grid[3], threads_per_grid[3], threads_per_group[3], dispatch_per_group[3];
  unsigned index_in_group, index_in_simdgroup, simdgroup, simdgroups;
};

enum BenchKind : unsigned { BENCH_SIMD_OP, BENCH_SIMD_BARRIER, BENCH_GROUP_BARRIER };

// The values of a simdgroup's lanes at one meeting point; a lane's bit says that it took part.
struct BenchMeeting {
  alignas(16) unsigned char value[BENCH_SIMD][BENCH_VALUE];
  unsigned active;
};

extern "C" {
// Wait for every lane of the simdgroup (or threadgroup); divergent lanes end the launch.
const BenchMeeting* bench_meet(
    BenchKind kind, const char* what, unsigned line, unsigned flags, const void* value,
    unsigned size);
const BenchLane* bench_lane();
// End the launch: the kernel did something that Metal leaves undefined.
void bench_undefined(const char* what, unsigned line);
// The memory of one `threadgroup` variable of the running threadgroup.
void* bench_threadgroup(const char* name, unsigned place, unsigned long size);
}
