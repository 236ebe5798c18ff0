// weights[n, ...] = code * scale + bias of matrix slots[n], MATRIX weights.
// Grid: x = 256 * ceil(MATRIX / 2048), y = n. Threadgroup: 256. Each lane writes eight weights.
constexpr uint EIGHTS = MATRIX / 8;
uint n = threadgroup_position_in_grid.y;
uint eight = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
if (eight < EIGHTS) {
  size_t from = size_t(slots[n]) * EIGHTS + eight;
  size_t group = from / (GROUP / 8);
  float scale = static_cast<float>(scales[group]);
  float bias = static_cast<float>(biases[group]);
  float values[8];
  for (uint i = 0; i < 8; i++) {
    uint word = codes[(from * 8 + i) * BITS / 32];
    uint code = word >> ((from * 8 + i) * BITS % 32) & ((1u << BITS) - 1u);
    values[i] = metal::fma(static_cast<float>(code), scale, bias);
  }
  write_eight(weights + (size_t(n) * EIGHTS + eight) * 8, values);
}
