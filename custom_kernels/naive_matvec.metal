// The baseline for benchmarks: y[n, row] as in dequant_matvec, each weight dequantised before use.
// Grid: x = 32 * SIMDGROUPS * ceil(ROWS / (TILE * SIMDGROUPS)), y = n. Threadgroup: 32 * SIMDGROUPS.
uint n = threadgroup_position_in_grid.y;
uint unit = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
float totals[TILE];
for (int r = 0; r < TILE; r++) {
  totals[r] = 0.0f;
}
for (uint column = lane * CHUNK; column < COLUMNS; column += 32 * CHUNK) {
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
  uint row = unit * TILE + r;
  if (lane == 0 && row < ROWS) {
    y[n * ROWS + row] = static_cast<Y>(total);
  }
}
