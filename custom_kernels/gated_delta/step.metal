// One token of GatedDeltaNet between its projections: convolution, norms of q and k, gated delta
// rule, gated norm. `projected` is (qkv | z | b | a); `eps` is that of the output, then of q and k.
// Grid: x = LANES * HV, y = B. Threadgroup: LANES >= DV, one per value head.
// ROW_LANES lanes share a row of the state; each holds ROWS rows in registers throughout.
constexpr uint CHANNELS = 2 * HK * DK + HV * DV;
constexpr int ROWS = (DV * ROW_LANES + LANES - 1) / LANES;
constexpr int COLUMNS = (DK + ROW_LANES * VEC - 1) / (ROW_LANES * VEC) * VEC;
constexpr uint WIDTH = COLUMNS * ROW_LANES;
threadgroup Run<VEC> queries[WIDTH / VEC];
threadgroup Run<VEC> keys[WIDTH / VEC];
threadgroup float values[DV];
threadgroup float outputs[DV];
uint lane = thread_index_in_threadgroup;
uint part = lane % ROW_LANES;
uint first = lane / ROW_LANES;
uint hv = threadgroup_position_in_grid.x;
uint hk = hv / (HV / HK);
size_t b = threadgroup_position_in_grid.y;
size_t head = b * HV + hv;
auto here = projected + b * (CHANNELS + HV * DV + 2 * HV);

// Start all reads before anything waits, the state first.
float s[ROWS][COLUMNS];
for (int r = 0; r < ROWS; r++) {
  uint row = metal::min(first + r * (LANES / ROW_LANES), uint(DV - 1));
  read_row<DK, ROW_LANES, VEC>(state + (head * DV + row) * DK, part, s[r]);
}
float gate = 0.0f;
float gain = 0.0f;
if (lane < DV) {
  gate = static_cast<float>(here[CHANNELS + hv * DV + lane]);
  gain = static_cast<float>(norm[lane]);
}
auto scalars = here + CHANNELS + HV * DV;
float strength = static_cast<float>(scalars[hv]);
float forget = static_cast<float>(scalars[HV + hv]) + static_cast<float>(dt_bias[hv]);
float rate = static_cast<float>(a_log[hv]);

// The head's q, k and v. Value heads share q and k: the first head writes their past.
bool leads = hv % (HV / HK) == 0;
for (uint i = lane; i < 2 * DK + DV; i += LANES) {
  uint channel = i < DK       ? hk * DK + i
                 : i < 2 * DK ? (HK + hk) * DK + i - DK
                              : 2 * HK * DK + hv * DV + i - 2 * DK;
  float window[TAPS];
  float x = 0.0f;
  for (int tap = 0; tap < TAPS - 1; tap++) {
    window[tap] = static_cast<float>(past[(b * (TAPS - 1) + tap) * CHANNELS + channel]);
  }
  window[TAPS - 1] = static_cast<float>(here[channel]);
  for (int tap = 0; tap < TAPS; tap++) {
    x = metal::fma(window[tap], static_cast<float>(conv[channel * TAPS + tap]), x);
  }
  x *= sigmoid(x);
  if (i < DK) {
    queries[i / VEC].v[i % VEC] = x;
  } else if (i < 2 * DK) {
    keys[(i - DK) / VEC].v[i % VEC] = x;
  } else {
    values[i - 2 * DK] = x;
  }
  if (leads || i >= 2 * DK) {
    for (int tap = 0; tap < TAPS - 1; tap++) {
      new_past[(b * (TAPS - 1) + tap) * CHANNELS + channel] = static_cast<P>(window[tap + 1]);
    }
  }
}
for (uint i = DK + lane; i < WIDTH; i += LANES) {
  queries[i / VEC].v[i % VEC] = 0.0f;
  keys[i / VEC].v[i % VEC] = 0.0f;
}
float beta = sigmoid(strength);
float g = decay(rate, forget);
threadgroup_barrier(mem_flags::mem_threadgroup);

float q[COLUMNS];
float k[COLUMNS];
read_runs<DK, ROW_LANES, VEC>(queries, part, q);
read_runs<DK, ROW_LANES, VEC>(keys, part, k);
float squares[2] = {dot<COLUMNS>(q, q), dot<COLUMNS>(k, k)};
sum_over<2, ROW_LANES>(squares);
float qk_eps = static_cast<float>(eps[1]);
scale_by<COLUMNS>(metal::rsqrt(squares[0] + qk_eps) * metal::rsqrt(float(DK)), q);
scale_by<COLUMNS>(metal::rsqrt(squares[1] + qk_eps), k);
float dots[ROWS];
for (int r = 0; r < ROWS; r++) {
  dots[r] = dot<COLUMNS>(s[r], k);
}
sum_over<ROWS, ROW_LANES>(dots);
for (int r = 0; r < ROWS; r++) {
  uint row = metal::min(first + r * (LANES / ROW_LANES), uint(DV - 1));
  float change = (values[row] - g * dots[r]) * beta;
  for (int c = 0; c < COLUMNS; c++) {
    s[r][c] = metal::fma(change, k[c], g * s[r][c]);
  }
  dots[r] = dot<COLUMNS>(s[r], q);
}
sum_over<ROWS, ROW_LANES>(dots);
for (int r = 0; r < ROWS; r++) {
  uint row = first + r * (LANES / ROW_LANES);
  if (row < DV) {
    write_row<DK, ROW_LANES, VEC>(new_state + (head * DV + row) * DK, part, s[r]);
    if (part == 0) {
      outputs[row] = dots[r];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Each simdgroup adds up all squares: faster than sharing them.
float square = 0.0f;
for (uint i = thread_index_in_simdgroup; i < DV; i += 32) {
  square = metal::fma(outputs[i], outputs[i], square);
}
float factor = metal::rsqrt(simd_sum(square) / float(DV) + static_cast<float>(eps[0]));
if (lane < DV) {
  y[head * DV + lane] = static_cast<T>(outputs[lane] * factor * gain * gate * sigmoid(gate));
}
