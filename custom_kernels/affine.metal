// Dot products with affine-quantised weights, w = code * scale + bias. Over a run of columns that
// share a scale
//     sum w x = scale * sum code x + bias * sum x,
// so each code costs one fused multiply-add. Codes lie in 32-bit words, lowest bits first.

// Read N activations. Each is divided by the place value of its code in the word, which is exact,
// so that a masked code needs no shift. Returns their sum.
template <int BITS, int N, typename X>
inline float read_activations(X x, thread float* xs) {
  constexpr int PER_WORD = 32 / BITS;
  float sum = 0.0f;
  for (int i = 0; i < N; i++) {
    float v = static_cast<float>(x[i]);
    sum += v;
    xs[i] = v / static_cast<float>(1u << (BITS * (i % PER_WORD)));
  }
  return sum;
}

// The same for x * gain; adds the sum of squares of x, which an RMS norm takes, to `square`.
template <int BITS, int N, typename X, typename G>
inline float read_normed(X x, G gain, thread float* xs, thread float& square) {
  constexpr int PER_WORD = 32 / BITS;
  float sum = 0.0f;
  for (int i = 0; i < N; i++) {
    float v = static_cast<float>(x[i]);
    square = metal::fma(v, v, square);
    v *= static_cast<float>(gain[i]);
    sum += v;
    xs[i] = v / static_cast<float>(1u << (BITS * (i % PER_WORD)));
  }
  return sum;
}

template <int BITS>
inline float dot_word(uint word, thread const float* xs, float dot) {
  constexpr uint MASK = (1u << BITS) - 1u;
  for (int j = 0; j < 32 / BITS; j++) {
    dot = metal::fma(static_cast<float>(word & (MASK << (BITS * j))), xs[j], dot);
  }
  return dot;
}

// The dot product of N codes with what read_activations made; N * BITS is 32, 64 or 128.
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

// The plain form, for comparison: each weight is dequantised before it is used.
template <int N, typename X>
inline float read_plain(X x, thread float* xs) {
  for (int i = 0; i < N; i++) {
    xs[i] = static_cast<float>(x[i]);
  }
  return 0.0f;
}

template <int BITS, int N>
inline float dot_dequantised(
    const device uint* codes, float scale, float bias, thread const float* xs) {
  constexpr int PER_WORD = 32 / BITS;
  float dot = 0.0f;
  for (int i = 0; i < N; i++) {
    uint code = codes[i / PER_WORD] >> (BITS * (i % PER_WORD)) & ((1u << BITS) - 1u);
    dot += (static_cast<float>(code) * scale + bias) * xs[i];
  }
  return dot;
}
