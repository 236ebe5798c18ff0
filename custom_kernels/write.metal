// Eight numbers in 16-byte stores.
inline void write_eight(device float* out, thread const float* values) {
  auto quads = (device float4*)out;
  for (int i = 0; i < 2; i++) {
    float4 quad;
    quad.x = values[4 * i];
    quad.y = values[4 * i + 1];
    quad.z = values[4 * i + 2];
    quad.w = values[4 * i + 3];
    quads[i] = quad;
  }
}

template <typename T>
inline uint pair_of(thread const float* values) {
  uint low = as_type<ushort>(static_cast<T>(values[0]));
  uint high = as_type<ushort>(static_cast<T>(values[1]));
  return low | high << 16;
}

template <typename T>
inline void write_eight(device T* out, thread const float* values) {
  uint4 words;
  words.x = pair_of<T>(values);
  words.y = pair_of<T>(values + 2);
  words.z = pair_of<T>(values + 4);
  words.w = pair_of<T>(values + 6);
  ((device uint4*)out)[0] = words;
}
