// One token's queries and keys from its joined projection: RMS norm of each head, then RoPE of its
// first DIMS elements. Queries include the softmax scale.
// `projected` is (queries | gate of each of HQ heads, HK keys, HK values), D elements each; `turns`
// is RoPE's turns per position, times 2^64.
// Grid: x = 32 * (HQ + HK), y = B. Threadgroup: 32, one simdgroup per head. D: a multiple of 32.
constexpr uint HALF = DIMS / 2;
threadgroup float normed[D];
uint lane = thread_index_in_simdgroup;
uint head = threadgroup_position_in_grid.x;
size_t b = threadgroup_position_in_grid.y;
bool is_query = head < HQ;
auto here = projected + b * ((2 * HQ + 2 * HK) * D) + (is_query ? 2 * head : HQ + head) * D;
float xs[D / 32];
float gains[D / 32];
float square = 0.0f;
for (int j = 0; j < D / 32; j++) {
  uint i = lane + 32 * j;
  xs[j] = static_cast<float>(here[i]);
  gains[j] = is_query ? static_cast<float>(q_norm[i]) : static_cast<float>(k_norm[i]);
  square = metal::fma(xs[j], xs[j], square);
}
float factor = metal::rsqrt(simd_sum(square) / float(D) + static_cast<float>(eps[0]));
for (int j = 0; j < D / 32; j++) {
  normed[lane + 32 * j] = xs[j] * factor * gains[j];
}
simdgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lane; i < D; i += 32) {
  float x = normed[i];
  if (i < DIMS) {
    // 64-bit overflow drops whole turns; the rest is exact to 2^-46 of a turn. A float angle of
    // 200,000 would be off by 0.01.
    size_t turn = static_cast<size_t>(offset[0]) * turns[i % HALF];
    float angle = static_cast<float>(as_type<int>(static_cast<uint>(turn >> 32))) *
        (6.2831853f / 4294967296.0f);
    float other = i < HALF ? -normed[i + HALF] : normed[i - HALF];
    x = x * metal::cos(angle) + other * metal::sin(angle);
  }
  if (is_query) {
    queries[(b * HQ + head) * D + i] = x * metal::rsqrt(float(D));
  } else {
    keys[(b * HK + head - HQ) * D + i] = static_cast<T>(x);
  }
}
