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

// Add a chunk of columns to the dot products of TILE rows, the last of which are clamped to `rows`.
// `codes`, `scales` and `biases` point at row 0; one lane's share of a matrix-vector product.
template <int BITS, int GROUP, int COLUMNS, int CHUNK, int TILE, typename S>
inline void add_chunk(
    const device uint* codes, S scales, S biases, uint first, uint rows, uint column,
    thread const float* xs, float sum, thread float* totals) {
  for (int r = 0; r < TILE; r++) {
    size_t row = metal::min(first + r, rows - 1);
    size_t group = row * (COLUMNS / GROUP) + column / GROUP;
    float dot = dot_codes<BITS, CHUNK>(
        codes + row * (COLUMNS * BITS / 32) + column * BITS / 32, xs);
    totals[r] = metal::fma(static_cast<float>(scales[group]), dot,
                           metal::fma(static_cast<float>(biases[group]), sum, totals[r]));
  }
}
