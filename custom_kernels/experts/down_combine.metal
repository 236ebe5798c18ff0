// y[n, row] = sum over k of weights[n, k] * (D hidden[n, k])[row], where D is the down projection
// of the expert in slot slots[n, k]; plus weights[n, K] times the shared expert's; plus
// residual[n, row].
// Grid: x = 32 * SIMDGROUPS * ceil(H / TILE), y = n. Threadgroup: 32 * SIMDGROUPS.
// A threadgroup computes TILE rows; its simdgroups share the experts, each in SPLIT parts of its
// columns, and add up at the end.
constexpr uint WIDTH = K + (SHARED > 0 ? 1 : 0);
constexpr uint TERMS = WIDTH * SPLIT;
threadgroup float parts[SIMDGROUPS * TILE];
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint n = threadgroup_position_in_grid.y;
uint first = threadgroup_position_in_grid.x * TILE;
float totals[TILE];
for (int r = 0; r < TILE; r++) {
  totals[r] = 0.0f;
}
for (uint term = simdgroup; term < TERMS; term += SIMDGROUPS) {
  uint k = term / SPLIT;
  uint begin = term % SPLIT * 32 + lane;
  auto here = hidden + n * (K * I + SHARED) + k * I;
  if (SHARED > 0 && k == K) {
    float weight = static_cast<float>(weights[n * WIDTH + K]);
    for (uint column = begin * SHARED_CHUNK; column < SHARED;
         column += 32 * SPLIT * SHARED_CHUNK) {
      float xs[SHARED_CHUNK];
      float sum = read_weighted<SHARED_BITS, SHARED_CHUNK>(here + column, weight, xs);
      add_chunk<SHARED_BITS, SHARED_GROUP, SHARED, SHARED_CHUNK, TILE>(
          shared_codes, shared_scales, shared_biases, first, H, column, xs, sum, totals);
    }
  } else {
    float weight = static_cast<float>(weights[n * WIDTH + k]);
    size_t top = static_cast<size_t>(slots[n * K + k]) * H;
    for (uint column = begin * CHUNK; column < I; column += 32 * SPLIT * CHUNK) {
      float xs[CHUNK];
      float sum = read_weighted<BITS, CHUNK>(here + column, weight, xs);
      add_chunk<BITS, GROUP, I, CHUNK, TILE>(
          codes + top * (I * BITS / 32), scales + top * (I / GROUP), biases + top * (I / GROUP),
          first, H, column, xs, sum, totals);
    }
  }
}
for (int r = 0; r < TILE; r++) {
  float total = simd_sum(totals[r]);
  if (lane == 0) {
    parts[simdgroup * TILE + r] = total;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
uint row = first + lane;
if (simdgroup == 0 && lane < TILE && row < H) {
  size_t place = n * H + row;
  float total = RESIDUAL ? static_cast<float>(residual[place]) : 0.0f;
  for (uint s = 0; s < SIMDGROUPS; s++) {
    total += parts[s * TILE + lane];
  }
  y[place] = static_cast<Y>(total);
}
