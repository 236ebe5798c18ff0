// Shared by the GatedDeltaNet kernels.

// LANES lanes share a row of COLUMNS elements in runs of VEC (4 or 1): each lane has every LANES-th
// run, so that neighbors read neighboring memory. Elements beyond the row are 0.
template <int COLUMNS, int LANES, int VEC>
inline void read_row(const device float* row, uint lane, thread float* out) {
  constexpr int STEP = LANES * VEC;
  for (int j = 0; j * STEP < COLUMNS; j++) {
    uint run = lane + j * LANES;
    for (int i = 0; i < VEC; i++) {
      out[j * VEC + i] = 0.0f;
    }
    if (COLUMNS % STEP == 0 || run * VEC < COLUMNS) {
      if (VEC == 4) {
        float4 v = ((const device float4*)row)[run];
        out[j * VEC] = v.x;
        out[j * VEC + 1 % VEC] = v.y;
        out[j * VEC + 2 % VEC] = v.z;
        out[j * VEC + 3 % VEC] = v.w;
      } else {
        out[j * VEC] = row[run];
      }
    }
  }
}

template <int COLUMNS, int LANES, int VEC>
inline void write_row(device float* row, uint lane, thread const float* values) {
  constexpr int STEP = LANES * VEC;
  for (int j = 0; j * STEP < COLUMNS; j++) {
    uint run = lane + j * LANES;
    if (COLUMNS % STEP == 0 || run * VEC < COLUMNS) {
      if (VEC == 4) {
        float4 v;
        v.x = values[j * VEC];
        v.y = values[j * VEC + 1 % VEC];
        v.z = values[j * VEC + 2 % VEC];
        v.w = values[j * VEC + 3 % VEC];
        ((device float4*)row)[run] = v;
      } else {
        row[run] = values[j * VEC];
      }
    }
  }
}

// Rows in threadgroup memory consist of runs, padded with zeros to whole steps.
template <int N>
struct alignas(N * sizeof(float)) Run {
  float v[N];
};

template <int COLUMNS, int LANES, int VEC, typename P>
inline void read_runs(P runs, uint lane, thread float* out) {
  for (int j = 0; j * LANES * VEC < COLUMNS; j++) {
    for (int i = 0; i < VEC; i++) {
      out[j * VEC + i] = runs[lane + j * LANES].v[i];
    }
  }
}

// Sum each of N values over LANES neighboring lanes, a power of two; each lane gets the sums.
template <int N, int LANES>
inline void sum_over(thread float* sums) {
  for (int step = LANES / 2; step > 0; step /= 2) {
    for (int i = 0; i < N; i++) {
      sums[i] += simd_shuffle_xor(sums[i], ushort(step));
    }
  }
}

template <int N>
inline float dot(thread const float* a, thread const float* b) {
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // short chains
  for (int i = 0; i < N; i++) {
    sums[i % 4] = metal::fma(a[i], b[i], sums[i % 4]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int N>
inline void scale_by(float factor, thread float* values) {
  for (int i = 0; i < N; i++) {
    values[i] *= factor;
  }
}

// `c ? x[i] : x[j]` would select an address and keep x out of registers.
inline float choose(bool c, float a, float b) {
  return c ? a : b;
}

inline float sigmoid(float x) {
  return 1.0f / (1.0f + metal::exp(-x));
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|). Metal lacks log1p, and log(1 + e)
// loses a small e, the decay of a head with a long memory. With
// s = e / (2 + e), log(1 + e) = 2 (s + s^3 / 3 + s^5 / 5 + ...).
inline float softplus(float x) {
  float e = metal::exp(-metal::abs(x));
  float s = e / (2.0f + e);
  float z = s * s;
  float series = 1.0f / 15.0f;
  series = metal::fma(series, z, 1.0f / 13.0f);
  series = metal::fma(series, z, 1.0f / 11.0f);
  series = metal::fma(series, z, 1.0f / 9.0f);
  series = metal::fma(series, z, 1.0f / 7.0f);
  series = metal::fma(series, z, 1.0f / 5.0f);
  series = metal::fma(series, z, 1.0f / 3.0f);
  series = metal::fma(series, z, 1.0f);
  return metal::max(x, 0.0f) + 2.0f * s * series;
}

inline float decay(float a_log, float a) {
  return metal::exp(-metal::exp(a_log) * softplus(a));
}
