// y[n, c] = residual[n, c] + the sum over k of terms[n, k, c], as down_combine adds them up.
// Grid: x = 128 * ceil(H / 128), y = n. Threadgroup: 128.
uint n = threadgroup_position_in_grid.y;
uint column = threadgroup_position_in_grid.x * 128 + thread_index_in_threadgroup;
if (column < H) {
  float total = static_cast<float>(residual[n * H + column]);
  for (uint k = 0; k < WIDTH; k++) {
    total += terms[(n * WIDTH + k) * H + column];
  }
  y[n * H + column] = static_cast<T>(total);
}
