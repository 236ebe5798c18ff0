"""Copy expert records from pinned host memory into slots, on an NVIDIA GPU."""

import mlx.core as mx
import numpy as np

from ..launch import LEAST_ELEMENTS, Kernel, settled

LANES, GROUPS = 256, 4  # threads per block, blocks per tensor of an expert

COPY = """
const uint32_t* task = tasks + 2 * (blockIdx.y / FIELDS);
const uint64_t* field = fields + 4 * (blockIdx.y % FIELDS);
if (blockIdx.x == 0 && blockIdx.y == 0)
  for (int i = threadIdx.x; i < slots_shape[0]; i += blockDim.x) there[i] = slots[i];
unsigned long long now, *times = const_cast<unsigned long long*>(
    reinterpret_cast<const unsigned long long*>(clock));
asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
if (threadIdx.x == 0) atomicMin(times, now);
if (task[0] != 0xffffffffu) {
  const uint64_t bytes = field[3];
  const uint64_t from = field[0] + task[0] * field[1], to = field[2] + task[1] * bytes;
  const int step = gridDim.x * blockDim.x;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if ((from | to | bytes) % 16 == 0) {
    const uint4* source = reinterpret_cast<const uint4*>(from);
    uint4* place = reinterpret_cast<uint4*>(to);
    const int count = bytes / 16;
    for (; i + 7 * step < count; i += 8 * step) {
      uint4 held[8];
      _Pragma("unroll") for (int u = 0; u < 8; u++) held[u] = __ldcs(source + i + u * step);
      _Pragma("unroll") for (int u = 0; u < 8; u++) place[i + u * step] = held[u];
    }
    for (; i < count; i += step) place[i] = __ldcs(source + i);
  } else {
    const uint8_t* source = reinterpret_cast<const uint8_t*>(from);
    uint8_t* place = reinterpret_cast<uint8_t*>(to);
    for (; i < static_cast<int>(bytes); i += step) place[i] = source[i];
  }
}
__syncthreads();
if (threadIdx.x == 0) {
  __threadfence();
  if (atomicAdd(times + 1, 1ull) + 1 == gridDim.x * gridDim.y) {  // the last group
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    times[2] += now - times[0];
    times[0] = ~0ull;
    times[1] = 0;
  }
}
"""
_kernel = Kernel("copy", ("tasks", "slots", "fields", "clock"), ("there",), source=COPY)


def new_clock() -> mx.array:
    """Return a new clock, `[LEAST_ELEMENTS]` uint64: see `copy`."""
    values = [2**64 - 1, *[0] * (LEAST_ELEMENTS - 1)]
    return settled(mx.array(np.array(values, np.uint64)))


def copy(tasks: mx.array, slots: mx.array, fields: mx.array, clock: mx.array) -> mx.array:
    """Copy experts into slots, then return `slots`.

    Args:
        tasks: `[N, 2]` uint32, expert and slot.
        slots: uint32.
        fields: `[9, 4]` uint64, per tensor: address of expert 0, stride of experts, address of
            slot 0, bytes.
        clock: `[LEAST_ELEMENTS]` uint64, updated: start of the current copies, finished blocks,
            nanoseconds of all copies so far.
    """
    (there,) = _kernel(
        [tasks, slots.reshape(-1), fields, clock],
        [((slots.size,), mx.uint32)],
        (GROUPS, fields.shape[0] * tasks.shape[0], 1),
        LANES,
        FIELDS=fields.shape[0],
    )
    return there.reshape(slots.shape)
