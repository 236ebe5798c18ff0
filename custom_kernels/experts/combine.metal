// y[n] = sum over k of weights[n, k] * outputs[places[n, k]], COLUMNS wide.
// Grid: x = 128 * ceil(COLUMNS / 1024), y = n. Threadgroup: 128. Each lane computes eight columns.
uint n = threadgroup_position_in_grid.y;
uint column = (threadgroup_position_in_grid.x * 128 + thread_index_in_threadgroup) * 8;
if (column < COLUMNS) {
  float totals[8];
  for (uint i = 0; i < 8; i++) {
    totals[i] = 0.0f;
  }
  for (uint k = 0; k < K; k++) {
    float values[8];
    read_eight(outputs + size_t(places[n * K + k]) * COLUMNS + column, values);
    float weight = static_cast<float>(weights[n * K + k]);
    for (uint i = 0; i < 8; i++) {
      totals[i] = metal::fma(weight, values[i], totals[i]);
    }
  }
  write_eight(y + size_t(n) * COLUMNS + column, totals);
}
