// y[n, row] = sum over columns of W[row, column] * x[n, column]
// With NORM, x is RMS-normalised first; with RESIDUAL, residual[n, row] is added.
// Grid: x = 32 * SIMDGROUPS * ceil(ROWS / (TILE * SIMDGROUPS)), y = n. Threadgroup: 32 * SIMDGROUPS.
// A simdgroup makes TILE rows: its lanes take CHUNK columns each, all rows reuse the activations.
uint lane = thread_index_in_simdgroup;
uint n = threadgroup_position_in_grid.y;
uint unit = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
uint first = unit * TILE;
auto here = x + n * COLUMNS;
float totals[TILE];
for (int r = 0; r < TILE; r++) {
  totals[r] = 0.0f;
}
float square = 0.0f;
for (uint column = lane * CHUNK; column < COLUMNS; column += 32 * CHUNK) {
  float xs[CHUNK];
  float sum = NORM ? read_normed<BITS, CHUNK>(here + column, gain + column, xs, square)
                   : read_activations<BITS, CHUNK>(here + column, xs);
  add_chunk<BITS, GROUP, COLUMNS, CHUNK, TILE>(
      codes, scales, biases, first, ROWS, column, xs, sum, totals);
}
float factor = 1.0f;
if (NORM) {
  factor = metal::rsqrt(simd_sum(square) / float(COLUMNS) + static_cast<float>(eps[0]));
}
for (int r = 0; r < TILE; r++) {
  float total = simd_sum(totals[r]) * factor;
  uint row = first + r;
  if (lane == 0 && row < ROWS) {
    size_t place = n * ROWS + row;
    if (RESIDUAL) {
      total += static_cast<float>(residual[place]);
    }
    y[place] = static_cast<Y>(total);
  }
}
