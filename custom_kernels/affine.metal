// Dot products with affine-quantized weights, w = code * scale + bias. Over a run of columns that
// share a scale
//     sum w x = scale * sum code x + bias * sum x,
// so each code costs one fused multiply-add. Codes lie in 32-bit words, lowest bits first.

#ifndef CODE_VALUE
// A code masked in place, within the PLACES lowest bits of a word, as a float that is too small by
// LIFT * SCALE: activations are multiplied by LIFT, dot products by SCALE.
constant constexpr int PLACES = 32;
constant constexpr float LIFT = 1.0f;
constant constexpr float SCALE = 1.0f;
inline float code_value(uint code) { return static_cast<float>(code); }
#endif

// Eight activations in 16-byte loads.
inline void read_eight(const device float* x, thread float* out) {
  auto quads = (const device float4*)x;
  for (int i = 0; i < 2; i++) {
    float4 quad = quads[i];
    out[4 * i] = quad.x;
    out[4 * i + 1] = quad.y;
    out[4 * i + 2] = quad.z;
    out[4 * i + 3] = quad.w;
  }
}

template <typename T>
inline void read_pair(uint word, thread float* out) {
  out[0] = static_cast<float>(as_type<T>(static_cast<ushort>(word & 0xffffu)));
  out[1] = static_cast<float>(as_type<T>(static_cast<ushort>(word >> 16)));
}

template <typename T>
inline void read_eight(const device T* x, thread float* out) {
  uint4 words = ((const device uint4*)x)[0];
  read_pair<T>(words.x, out);
  read_pair<T>(words.y, out + 2);
  read_pair<T>(words.z, out + 4);
  read_pair<T>(words.w, out + 6);
}

// Codes are masked, not shifted; dividing the activation by the place value instead is exact. Only
// codes above the PLACES lowest bits are shifted, by 32 - PLACES.
template <int BITS>
inline constexpr int place(int i) {
  return BITS * (i + 1) > PLACES ? BITS * i - (32 - PLACES) : BITS * i;
}

// Divide each activation by its code's place value. Returns the sum of the N activations.
template <int BITS, int N>
inline float scale_to_places(thread float* xs) {
  constexpr int PER_WORD = 32 / BITS;
  float sum = 0.0f;
  for (int i = 0; i < N; i++) {
    sum += xs[i];
    xs[i] *= LIFT / static_cast<float>(1u << place<BITS>(i % PER_WORD));
  }
  return sum;
}

// Read N activations (a multiple of 8), ready for dot_codes. Returns their sum.
template <int BITS, int N, typename T>
inline float read_activations(const device T* x, thread float* xs) {
  for (int i = 0; i < N; i += 8) {
    read_eight(x + i, xs + i);
  }
  return scale_to_places<BITS, N>(xs);
}

// read_activations for x * weight.
template <int BITS, int N, typename T>
inline float read_weighted(const device T* x, float weight, thread float* xs) {
  for (int i = 0; i < N; i += 8) {
    read_eight(x + i, xs + i);
  }
  for (int i = 0; i < N; i++) {
    xs[i] *= weight;
  }
  return scale_to_places<BITS, N>(xs);
}

// read_activations for x * gain; adds x's sum of squares, for an RMS norm, to `square`.
template <int BITS, int N, typename T, typename G>
inline float read_normed(
    const device T* x, const device G* gain, thread float* xs, thread float& square) {
  for (int i = 0; i < N; i += 8) {
    float gains[8];
    read_eight(x + i, xs + i);
    read_eight(gain + i, gains);
    for (int j = 0; j < 8; j++) {
      square = metal::fma(xs[i + j], xs[i + j], square);
      xs[i + j] *= gains[j];
    }
  }
  return scale_to_places<BITS, N>(xs);
}

template <int BITS>
inline float dot_word(uint word, thread const float* xs, float dot) {
  constexpr uint MASK = (1u << BITS) - 1u;
  for (int j = 0; j < 32 / BITS; j++) {
    uint bits = BITS * (j + 1) > PLACES ? word >> (32 - PLACES) : word;
    dot = metal::fma(code_value(bits & (MASK << place<BITS>(j))), xs[j], dot);
  }
  return dot;
}

// The dot product of N codes and the result of read_activations; N * BITS is 32, 64 or 128.
template <int BITS, int N>
inline float dot_codes(const device uint* codes, thread const float* xs) {
  constexpr int PER_WORD = 32 / BITS;
  if (N == PER_WORD) {
    return dot_word<BITS>(codes[0], xs, 0.0f);
  }
  float dot = 0.0f;
  if (N == 2 * PER_WORD) {
    uint2 words = ((const device uint2*)codes)[0];
    dot = dot_word<BITS>(words.x, xs, dot);
    return dot_word<BITS>(words.y, xs + PER_WORD, dot);
  }
  uint4 words = ((const device uint4*)codes)[0];
  dot = dot_word<BITS>(words.x, xs, dot);
  dot = dot_word<BITS>(words.y, xs + PER_WORD, dot);
  dot = dot_word<BITS>(words.z, xs + 2 * PER_WORD, dot);
  return dot_word<BITS>(words.w, xs + 3 * PER_WORD, dot);
}

// One lane's share of a matrix-vector product: adds a chunk of columns to the dot products of TILE
// rows, clamped to `rows`. `codes`, `scales` and `biases` point at row 0.
template <int BITS, int GROUP, int COLUMNS, int CHUNK, int TILE, typename S>
inline void add_chunk(
    const device uint* codes, S scales, S biases, uint first, uint rows, uint column,
    thread const float* xs, float sum, thread float* totals) {
  for (int r = 0; r < TILE; r++) {
    size_t row = metal::min(first + r, rows - 1);
    size_t group = row * (COLUMNS / GROUP) + column / GROUP;
    float dot = dot_codes<BITS, CHUNK>(
        codes + row * (COLUMNS * BITS / 32) + column * BITS / 32, xs);
    totals[r] = metal::fma(static_cast<float>(scales[group]) * SCALE, dot,
                           metal::fma(static_cast<float>(biases[group]), sum, totals[r]));
  }
}
