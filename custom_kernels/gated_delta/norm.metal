// The gated norm at the end: out = y * rsqrt(mean y^2 + eps) * norm * silu(z), per token and head.
// Grid: x = 32 * SIMDGROUPS * HV, y = ceil(T / SIMDGROUPS), z = B. Threadgroup: 32 * SIMDGROUPS, a
// simdgroup per token.
constexpr uint CHANNELS = 2 * HK * DK + HV * DV;
constexpr int PER_LANE = (DV + 31) / 32;
uint lane = thread_index_in_simdgroup;
uint hv = threadgroup_position_in_grid.x;
uint tokens = projected_shape[1];
uint place = threadgroup_position_in_grid.y * SIMDGROUPS + simdgroup_index_in_threadgroup;
size_t t = threadgroup_position_in_grid.z * tokens + metal::min(place, tokens - 1);
size_t first = (t * HV + hv) * DV;
auto gates = projected + t * (CHANNELS + HV * DV + 2 * HV) + CHANNELS + hv * DV;
float ys[PER_LANE];
float zs[PER_LANE];
float square = 0.0f;
for (int j = 0; j < PER_LANE; j++) {
  uint column = metal::min(lane + 32 * j, uint(DV - 1));
  ys[j] = static_cast<float>(y[first + column]);
  zs[j] = static_cast<float>(gates[column]);
  square += lane + 32 * j < DV ? ys[j] * ys[j] : 0.0f;
}
float factor = metal::rsqrt(simd_sum(square) / float(DV) + static_cast<float>(eps[0]));
for (int j = 0; j < PER_LANE; j++) {
  uint column = lane + 32 * j;
  if (place < tokens && column < DV) {
    float gain = static_cast<float>(norm[column]) * zs[j] * sigmoid(zs[j]);
    out[first + column] = static_cast<T>(ys[j] * factor * gain);
  }
}
