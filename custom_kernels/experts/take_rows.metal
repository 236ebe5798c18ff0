// y[r] = x[tokens[rows[r]]], COLUMNS wide.
// Grid: x = 128 * ceil(COLUMNS / 1024), y = r. Threadgroup: 128. Each lane copies eight columns.
uint r = threadgroup_position_in_grid.y;
uint column = (threadgroup_position_in_grid.x * 128 + thread_index_in_threadgroup) * 8;
if (column < COLUMNS) {
  float values[8];
  read_eight(x + size_t(tokens[rows[r]]) * COLUMNS + column, values);
  write_eight(y + size_t(r) * COLUMNS + column, values);
}
