// weights = code * scale + bias, MATRIX of them.
// Grid: x = 256 * ceil(MATRIX / 2048). Threadgroup: 256. Each lane writes eight weights.
constexpr uint EIGHTS = MATRIX / 8;
uint eight = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
if (eight < EIGHTS) {
  size_t first = size_t(eight) * 8;
  float scale = static_cast<float>(scales[eight / (GROUP / 8)]);
  float bias = static_cast<float>(biases[eight / (GROUP / 8)]);
  float values[8];
  for (uint i = 0; i < 8; i++) {
    uint word = codes[(first + i) * BITS / 32];
    uint code = word >> ((first + i) * BITS % 32) & ((1u << BITS) - 1u);
    values[i] = metal::fma(static_cast<float>(code), scale, bias);
  }
  write_eight(weights + first, values);
}
