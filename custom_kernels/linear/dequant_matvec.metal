// y[n, row] = sum over columns of W[row, column] * x[n, column]
// With NORM, x is RMS-normalized first; with RESIDUAL, residual[n, row] is added.
// Grid: x = 32 * SPLIT * UNITS * ceil(ROWS / (TILE * UNITS)), y = n. Threadgroup: 32 * SPLIT * UNITS.
// A unit of SPLIT simdgroups computes TILE rows; a lane takes CHUNK columns at a time, and all rows
// reuse its activations.
threadgroup float parts[UNITS * SPLIT * (TILE + 1)];
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint n = threadgroup_position_in_grid.y;
uint first = (threadgroup_position_in_grid.x * UNITS + simdgroup / SPLIT) * TILE;
auto here = x + n * COLUMNS;
float totals[TILE];
for (int r = 0; r < TILE; r++) {
  totals[r] = 0.0f;
}
float square = 0.0f;
for (uint column = (simdgroup % SPLIT * 32 + lane) * CHUNK; column < COLUMNS;
     column += 32 * SPLIT * CHUNK) {
  float xs[CHUNK];
  float sum = NORM ? read_normed<BITS, CHUNK>(here + column, gain + column, xs, square)
                   : read_activations<BITS, CHUNK>(here + column, xs);
  add_chunk<BITS, GROUP, COLUMNS, CHUNK, TILE>(
      codes, scales, biases, first, ROWS, column, xs, sum, totals);
}
for (int r = 0; r < TILE; r++) {
  float total = simd_sum(totals[r]);
  if (lane == 0) {
    parts[simdgroup * (TILE + 1) + r] = total;
  }
}
if (NORM) {
  float total = simd_sum(square);
  if (lane == 0) {
    parts[simdgroup * (TILE + 1) + TILE] = total;
  }
}
if (SPLIT > 1) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
} else {
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
uint row = first + lane;
if (simdgroup % SPLIT == 0 && lane < TILE && row < ROWS) {
  float total = 0.0f;
  float squares = 0.0f;
  for (uint s = simdgroup; s < simdgroup + SPLIT; s++) {
    total += parts[s * (TILE + 1) + lane];
    if (NORM) {
      squares += parts[s * (TILE + 1) + TILE];
    }
  }
  if (NORM) {
    total *= metal::rsqrt(squares / float(COLUMNS) + static_cast<float>(eps[0]));
  }
  size_t place = n * ROWS + row;
  if (RESIDUAL) {
    total += static_cast<float>(residual[place]);
  }
  y[place] = static_cast<Y>(total);
}
