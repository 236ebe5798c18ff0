// One token's attention to the first length[0] of the cache's keys, times its output gate:
//     y = sigmoid(gate) * (sum of exp(q . key) value) / (sum of exp(q . key))
// Grid: x = LANES * HQ, y = B. Threadgroup: LANES >= D, one per head. D: 8 times a power of two.
// A team of D / 8 lanes takes every TEAMS-th key, FLIGHT at a time, so that reads overlap. Its sums
// are relative to its highest score so far; the end adds up all teams'. A team without keys keeps
// LEAST as highest score, so its weight is 0.
constexpr uint PARTS = D / 8;
constexpr uint TEAMS = LANES / PARTS;
constexpr float LEAST = -3.4028234e38f;
threadgroup float sums[8 * LANES];
threadgroup float tops[TEAMS];
threadgroup float totals[TEAMS];
uint lane = thread_index_in_threadgroup;
uint part = lane % PARTS;
uint team = lane / PARTS;
uint head = threadgroup_position_in_grid.x;
size_t b = threadgroup_position_in_grid.y;
size_t top_row = (b * HK + head / (HQ / HK)) * keys_shape[2];
uint count = static_cast<uint>(length[0]);
// The output column that this lane writes: neighbors then read neighboring sums.
uint column = 8 * part + team;
float gate = 0.0f;
if (lane < D) {
  gate = static_cast<float>(projected[(b * (2 * HQ + 2 * HK) + 2 * head + 1) * D + column]);
}
float q[8];
read_eight(queries + (b * HQ + head) * D + 8 * part, q);

float top = LEAST;
float total = 0.0f;
float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
for (uint start = team; start - team < count; start += FLIGHT * TEAMS) {
  float k[FLIGHT][8];
  float v[FLIGHT][8];
  float scores[FLIGHT];
  for (uint f = 0; f < FLIGHT; f++) {
    size_t row = top_row + metal::min(start + f * TEAMS, count - 1);
    read_eight(keys + row * D + 8 * part, k[f]);
    read_eight(values + row * D + 8 * part, v[f]);
  }
  for (uint f = 0; f < FLIGHT; f++) {
    scores[f] = dot<8>(q, k[f]);
  }
  sum_over<FLIGHT, PARTS>(scores);
  float higher = top;
  for (uint f = 0; f < FLIGHT; f++) {
    scores[f] = choose(start + f * TEAMS < count, scores[f], LEAST);
    higher = metal::max(higher, scores[f]);
  }
  float factor = metal::exp(top - higher);
  total *= factor;
  scale_by<8>(factor, sum);
  for (uint f = 0; f < FLIGHT; f++) {
    float weight = metal::exp(scores[f] - higher);
    total += weight;
    for (int i = 0; i < 8; i++) {
      sum[i] = metal::fma(weight, v[f][i], sum[i]);
    }
  }
  top = higher;
}

for (int i = 0; i < 8; i++) {
  sums[i * LANES + lane] = sum[i];
}
if (part == 0) {
  tops[team] = top;
  totals[team] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lane < D) {
  float highest = tops[0];
  for (uint t = 1; t < TEAMS; t++) {
    highest = metal::max(highest, tops[t]);
  }
  float out = 0.0f;
  float all = 0.0f;
  for (uint t = 0; t < TEAMS; t++) {
    float weight = metal::exp(tops[t] - highest);
    all = metal::fma(weight, totals[t], all);
    out = metal::fma(weight, sums[team * LANES + t * PARTS + part], out);
  }
  y[(b * HQ + head) * D + column] = static_cast<T>(out / all * sigmoid(gate));
}
