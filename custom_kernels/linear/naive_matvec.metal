// Baseline for benchmarks: y[n, row] as in dequant_matvec, dequantizing each weight before use.
// Grid: x = 32 * SPLIT * UNITS * ceil(ROWS / (TILE * UNITS)), y = n. Threadgroup: 32 * SPLIT * UNITS.
threadgroup float parts[UNITS * SPLIT * TILE];
uint n = threadgroup_position_in_grid.y;
uint simdgroup = simdgroup_index_in_threadgroup;
uint unit = threadgroup_position_in_grid.x * UNITS + simdgroup / SPLIT;
uint lane = thread_index_in_simdgroup;
float totals[TILE];
for (int r = 0; r < TILE; r++) {
  totals[r] = 0.0f;
}
for (uint column = (simdgroup % SPLIT * 32 + lane) * CHUNK; column < COLUMNS;
     column += 32 * SPLIT * CHUNK) {
  for (int r = 0; r < TILE; r++) {
    size_t row = metal::min(unit * TILE + r, uint(ROWS - 1));
    size_t group = row * (COLUMNS / GROUP) + column / GROUP;
    float scale = static_cast<float>(scales[group]);
    float bias = static_cast<float>(biases[group]);
    auto words = codes + row * (COLUMNS * BITS / 32) + column * BITS / 32;
    for (uint i = 0; i < CHUNK; i++) {
      uint code = words[i / (32 / BITS)] >> (BITS * (i % (32 / BITS))) & ((1u << BITS) - 1u);
      float weight = static_cast<float>(code) * scale + bias;
      totals[r] += weight * static_cast<float>(x[n * COLUMNS + column + i]);
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
uint row = unit * TILE + lane;
if (simdgroup % SPLIT == 0 && lane < TILE && row < ROWS) {
  float total = 0.0f;
  for (uint s = simdgroup; s < simdgroup + SPLIT; s++) {
    total += parts[s * TILE + lane];
  }
  y[n * ROWS + row] = static_cast<Y>(total);
}
