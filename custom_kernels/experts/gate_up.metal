// hidden[n, k, i] = silu(G x) * (U x), row i of gate G and up U of the expert in slot slots[n, k];
// from K * I on, the shared expert's. Zero where the slot is NONE. With NORM, x is RMS-normalized
// first.
// Grid: x = 32 * SPLIT * UNITS * ceil(units / UNITS), y = n. Threadgroup: 32 * SPLIT * UNITS.
// A unit is TILE rows of one expert: ceil(I / TILE) units per expert, then the shared expert's. Its
// SPLIT simdgroups share the columns; all rows reuse a lane's activations.
constexpr uint PER_EXPERT = (I + TILE - 1) / TILE;
constexpr uint PARTS = 2 * TILE + 1;
constexpr uint NONE = 0xffffffffu;
threadgroup float parts[UNITS * SPLIT * PARTS];
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint n = threadgroup_position_in_grid.y;
uint unit = threadgroup_position_in_grid.x * UNITS + simdgroup / SPLIT;
bool is_shared = SHARED > 0 && unit >= K * PER_EXPERT;
uint k = is_shared ? K : metal::min(unit / PER_EXPERT, uint(K - 1));
uint first = (unit - k * PER_EXPERT) * TILE;
uint rows = is_shared ? SHARED : I;
uint slot = is_shared ? NONE : slots[n * K + k];
uint begin = simdgroup % SPLIT * 32 + lane;
auto here = x + n * H;
float gates[TILE];
float ups[TILE];
for (int r = 0; r < TILE; r++) {
  gates[r] = 0.0f;
  ups[r] = 0.0f;
}
float square = 0.0f;
if (is_shared) {
  for (uint column = begin * SHARED_CHUNK; column < H; column += 32 * SPLIT * SHARED_CHUNK) {
    float xs[SHARED_CHUNK];
    float sum = NORM
        ? read_normed<SHARED_BITS, SHARED_CHUNK>(here + column, gain + column, xs, square)
        : read_activations<SHARED_BITS, SHARED_CHUNK>(here + column, xs);
    add_chunk<SHARED_BITS, SHARED_GROUP, H, SHARED_CHUNK, TILE>(
        shared_gate_codes, shared_gate_scales, shared_gate_biases, first, rows, column, xs, sum,
        gates);
    add_chunk<SHARED_BITS, SHARED_GROUP, H, SHARED_CHUNK, TILE>(
        shared_up_codes, shared_up_scales, shared_up_biases, first, rows, column, xs, sum, ups);
  }
} else if (slot != NONE) {
  size_t top = static_cast<size_t>(slot) * I;
  for (uint column = begin * CHUNK; column < H; column += 32 * SPLIT * CHUNK) {
    float xs[CHUNK];
    float sum = NORM ? read_normed<BITS, CHUNK>(here + column, gain + column, xs, square)
                     : read_activations<BITS, CHUNK>(here + column, xs);
    add_chunk<BITS, GROUP, H, CHUNK, TILE>(
        gate_codes + top * (H * BITS / 32), gate_scales + top * (H / GROUP),
        gate_biases + top * (H / GROUP), first, rows, column, xs, sum, gates);
    add_chunk<BITS, GROUP, H, CHUNK, TILE>(
        up_codes + top * (H * BITS / 32), up_scales + top * (H / GROUP),
        up_biases + top * (H / GROUP), first, rows, column, xs, sum, ups);
  }
}
for (int r = 0; r < TILE; r++) {
  float gate = simd_sum(gates[r]);
  float up = simd_sum(ups[r]);
  if (lane == 0) {
    parts[simdgroup * PARTS + r] = gate;
    parts[simdgroup * PARTS + TILE + r] = up;
  }
}
if (NORM) {
  float total = simd_sum(square);
  if (lane == 0) {
    parts[simdgroup * PARTS + 2 * TILE] = total;
  }
}
if (SPLIT > 1) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
} else {
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
if (simdgroup % SPLIT == 0 && lane < TILE && first + lane < rows) {
  float gate = 0.0f;
  float up = 0.0f;
  float squares = 0.0f;
  for (uint s = simdgroup; s < simdgroup + SPLIT; s++) {
    gate += parts[s * PARTS + lane];
    up += parts[s * PARTS + TILE + lane];
    if (NORM) {
      squares += parts[s * PARTS + 2 * TILE];
    }
  }
  if (NORM) {
    float factor = metal::rsqrt(squares / float(H) + static_cast<float>(eps[0]));
    gate *= factor;
    up *= factor;
  }
  hidden[n * (K * I + SHARED) + k * I + first + lane] =
      static_cast<T>(gate / (1.0f + metal::exp(-gate)) * up);
}
