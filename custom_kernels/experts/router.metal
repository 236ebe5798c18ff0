// The K largest of EXPERTS logits per token and their softmax weights; ties go to the lower id.
// With SHARED, the last logit is the shared expert's gate, and the last weight its sigmoid.
// Grid: x = 32 * n. Threadgroup: 32, one simdgroup per token; a lane holds every 32nd logit. K <= 32.
constexpr float TAKEN = -3.4028234e38f;
constexpr int PER_LANE = (EXPERTS + 31) / 32;
uint lane = thread_index_in_simdgroup;
uint n = threadgroup_position_in_grid.x;
auto here = logits + n * (EXPERTS + (SHARED ? 1 : 0));
float values[PER_LANE];
float best = TAKEN;
for (int i = 0; i < PER_LANE; i++) {
  uint id = lane + 32 * i;
  values[i] = id < EXPERTS ? static_cast<float>(here[id]) : TAKEN;
  best = metal::max(best, values[i]);
}
float largest = simd_max(best);
float total = 0.0f;
for (int i = 0; i < PER_LANE; i++) {
  total += lane + 32 * i < EXPERTS ? metal::exp(values[i] - largest) : 0.0f;
}
total = RENORMALISE ? 0.0f : simd_sum(total);
uint my_id = 0;
float my_share = 0.0f;
for (uint k = 0; k < K; k++) {
  best = values[0];
  for (int i = 1; i < PER_LANE; i++) {
    best = metal::max(best, values[i]);
  }
  best = simd_max(best);
  uint id = EXPERTS - 1;
  for (int i = PER_LANE - 1; i >= 0; i--) {
    uint other = lane + 32 * i;
    id = values[i] == best && other < EXPERTS ? other : id;
  }
  id = simd_min(id);
  for (int i = 0; i < PER_LANE; i++) {
    values[i] = id == lane + 32 * i ? TAKEN : values[i];
  }
  float share = metal::exp(best - largest);
  total += RENORMALISE ? share : 0.0f;
  my_id = lane == k ? id : my_id;
  my_share = lane == k ? share : my_share;
}
constexpr uint WIDTH = K + (SHARED ? 1 : 0);
if (lane < K) {
  ids[n * K + lane] = my_id;
  weights[n * WIDTH + lane] = my_share / total;
}
if (SHARED && lane == 0) {
  weights[n * WIDTH + K] = 1.0f / (1.0f + metal::exp(-static_cast<float>(here[EXPERTS])));
}
