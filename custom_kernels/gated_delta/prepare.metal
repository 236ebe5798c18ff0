// The gated delta rule's inputs from the projections (qkv | z | b | a) of T tokens: convolution and
// SiLU of qkv, norms of q and k, g and beta. `eps` is that of the output, then of q and k. With
// MASK, qkv of a masked token counts as zeros.
// Grid: x = 32 * SIMDGROUPS * (2 * HK + HV), y = ceil(T / (TOKENS * SIMDGROUPS)), z = B.
// Threadgroup: 32 * SIMDGROUPS. A simdgroup computes TOKENS tokens of one head of q, k or v.
constexpr uint CHANNELS = 2 * HK * DK + HV * DV;
constexpr uint WIDTH = CHANNELS + HV * DV + 2 * HV;
constexpr int PER_LANE = ((DK > DV ? DK : DV) + 31) / 32;
uint lane = thread_index_in_simdgroup;
uint head = threadgroup_position_in_grid.x;
uint start = (threadgroup_position_in_grid.y * SIMDGROUPS + simdgroup_index_in_threadgroup) * TOKENS;
size_t b = threadgroup_position_in_grid.z;
uint tokens = projected_shape[1];
bool is_value = head >= 2 * HK;
uint hv = is_value ? head - 2 * HK : 0u;
uint size = is_value ? DV : DK;
uint top = is_value ? 2 * HK * DK + hv * DV : head * DK;

// Rows start - (TAPS - 1) to start + TOKENS - 1; those before the first token are in `past`.
float rows[TOKENS + TAPS - 1][PER_LANE];
float taps[TAPS][PER_LANE];
for (int i = 0; i < TOKENS + TAPS - 1; i++) {
  uint place = start + i;
  bool before = place < TAPS - 1;
  size_t t = before ? 0u : metal::min(place - (TAPS - 1), tokens - 1);
  bool keep = !MASK || before || mask[b * tokens + t];
  for (int j = 0; j < PER_LANE; j++) {
    uint channel = top + metal::min(lane + 32 * j, size - 1);
    if (before) {
      rows[i][j] = static_cast<float>(past[(b * (TAPS - 1) + place) * CHANNELS + channel]);
    } else {
      float x = static_cast<float>(projected[(b * tokens + t) * WIDTH + channel]);
      rows[i][j] = keep ? x : 0.0f;
    }
  }
}
for (int j = 0; j < PER_LANE; j++) {
  uint channel = top + metal::min(lane + 32 * j, size - 1);
  for (int tap = 0; tap < TAPS; tap++) {
    taps[tap][j] = static_cast<float>(conv[channel * TAPS + tap]);
  }
}
if (is_value && lane < TOKENS && start + lane < tokens) {
  size_t t = b * tokens + start + lane;
  auto scalars = projected + t * WIDTH + CHANNELS + HV * DV;
  float a = static_cast<float>(scalars[HV + hv]) + static_cast<float>(dt_bias[hv]);
  g[t * HV + hv] = decay(static_cast<float>(a_log[hv]), a);
  beta[t * HV + hv] = sigmoid(static_cast<float>(scalars[hv]));
}
float qk_eps = static_cast<float>(eps[1]);
float scale = head < HK ? metal::rsqrt(float(DK)) : 1.0f;
auto out = is_value ? v : head < HK ? q : k;
uint heads = is_value ? HV : HK;
uint index = is_value ? hv : head % HK;
// Unrolled, to keep `rows` in registers.
#pragma unroll
for (int i = 0; i < TOKENS; i++) {
  float xs[PER_LANE];
  float square = 0.0f;
  for (int j = 0; j < PER_LANE; j++) {
    float x = 0.0f;
    for (int tap = 0; tap < TAPS; tap++) {
      x = metal::fma(rows[i + tap][j], taps[tap][j], x);
    }
    xs[j] = x * sigmoid(x);
    square += lane + 32 * j < size ? xs[j] * xs[j] : 0.0f;
  }
  float factor = is_value ? 1.0f : scale * metal::rsqrt(simd_sum(square) + qk_eps);
  size_t t = b * tokens + start + i;
  for (int j = 0; j < PER_LANE; j++) {
    uint column = lane + 32 * j;
    if (start + i < tokens && column < size) {
      out[(t * heads + index) * size + column] = static_cast<T>(xs[j] * factor);
    }
  }
}
