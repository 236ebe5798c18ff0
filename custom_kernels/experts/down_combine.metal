// y[n, row] = residual[n, row] + the sum over k of weights[n, k] * (D hidden[n, k])[row], where D is
// the down projection of the expert in slot slots[n, k], for k = K of the shared expert. With EACH,
// y[n, k, row] are the terms of that sum: zero where the slot is NONE, and without ADD_SHARED.
// Grid: x = 32 * SIMDGROUPS * ceil(H / TILE), y = n. Threadgroup: 32 * SIMDGROUPS.
// A threadgroup computes TILE rows; its simdgroups share the experts.
constexpr uint WIDTH = K + (SHARED > 0 ? 1 : 0);
constexpr uint NONE = 0xffffffffu;
threadgroup float terms[WIDTH * TILE];
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint n = threadgroup_position_in_grid.y;
uint first = threadgroup_position_in_grid.x * TILE;
for (uint k = simdgroup; k < WIDTH; k += SIMDGROUPS) {
  float totals[TILE];
  for (int r = 0; r < TILE; r++) {
    totals[r] = 0.0f;
  }
  auto here = hidden + n * (K * I + SHARED) + k * I;
  float weight = static_cast<float>(weights[n * WIDTH + k]);
  uint slot = k < K ? slots[n * K + k] : NONE;
  if (SHARED > 0 && k == K) {
    for (uint column = lane * SHARED_CHUNK; ADD_SHARED && column < SHARED;
         column += 32 * SHARED_CHUNK) {
      float xs[SHARED_CHUNK];
      float sum = read_weighted<SHARED_BITS, SHARED_CHUNK>(here + column, weight, xs);
      add_chunk<SHARED_BITS, SHARED_GROUP, SHARED, SHARED_CHUNK, TILE>(
          shared_codes, shared_scales, shared_biases, first, H, column, xs, sum, totals);
    }
  } else if (slot != NONE) {
    size_t top = static_cast<size_t>(slot) * H;
    for (uint column = lane * CHUNK; column < I; column += 32 * CHUNK) {
      float xs[CHUNK];
      float sum = read_weighted<BITS, CHUNK>(here + column, weight, xs);
      add_chunk<BITS, GROUP, I, CHUNK, TILE>(
          codes + top * (I * BITS / 32), scales + top * (I / GROUP), biases + top * (I / GROUP),
          first, H, column, xs, sum, totals);
    }
  }
  for (int r = 0; r < TILE; r++) {
    float total = simd_sum(totals[r]);
    if (lane == 0) {
      terms[k * TILE + r] = total;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
uint row = first + lane;
if (simdgroup == 0 && lane < TILE && row < H) {
  size_t place = n * H + row;
  float total = RESIDUAL ? static_cast<float>(residual[place]) : 0.0f;
  for (uint k = 0; k < WIDTH; k++) {
    float term = terms[k * TILE + lane];
    if (EACH) {
      y[(n * WIDTH + k) * H + row] = static_cast<Y>(term);
    }
    total += term;
  }
  if (!EACH) {
    y[place] = static_cast<Y>(total);
  }
}
