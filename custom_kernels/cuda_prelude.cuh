// The subset of Metal's language that our kernels use, in CUDA, without CUDA's headers, which take
// seconds to compile. With --device-as-default-execution-space plain functions run on the device.
#define device
#define constant
#define thread
#define threadgroup __shared__
#define thread_position_in_threadgroup threadIdx
#define thread_index_in_threadgroup threadIdx.x
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
using uint = unsigned int;
using ushort = unsigned short;
using uint8_t = unsigned char;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;
template <typename T, typename U>
inline T as_type(U v) {
  static_assert(sizeof(T) == sizeof(U));
  return __builtin_bit_cast(T, v);
}
// 16-bit floats, rounded to nearest even.
struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  inline explicit bfloat16_t(float v) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
#else
    uint word = __builtin_bit_cast(uint, v);
    bits = v == v ? (word + 0x7fffu + (word >> 16 & 1u)) >> 16 : 0x7fffu;
#endif
  }
  inline operator float() const { return __builtin_bit_cast(float, uint(bits) << 16); }
};
struct half {
  ushort bits;
  half() = default;
  inline explicit half(float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v)); }
  inline operator float() const {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
  }
};
namespace mem_flags {
constexpr int mem_none = 0, mem_device = 1, mem_threadgroup = 2;
}
inline void threadgroup_barrier(int) { __syncthreads(); }
inline void simdgroup_barrier(int) { __syncwarp(); }
// Reductions by xor leave the result in every lane, as on Metal.
inline float simd_sum(float v) {
  for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}
inline float simd_max(float v) {
  for (int lane = 16; lane; lane >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}
inline uint simd_min(uint v) {
  for (int lane = 16; lane; lane >>= 1) v = ::min(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}
inline float simd_shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
inline float simd_shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
namespace metal {
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float exp(float v) { return expf(v); }
inline float log(float v) { return logf(v); }
inline float rsqrt(float v) { return rsqrtf(v); }
inline float cos(float v) { return cosf(v); }
inline float sin(float v) { return sinf(v); }
inline float abs(float v) { return fabsf(v); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
}

// The bits of an integer n < 2^24 are those of the float n * 2^-149. NVIDIA multiplies denormals at
// full speed, while conversions run at half speed. LIFT * SCALE = 2^149.
#define CODE_VALUE
constant constexpr int PLACES = 24;
constant constexpr float LIFT = 0x1p64f;
constant constexpr float SCALE = 0x1p85f;
inline float code_value(uint code) { return as_type<float>(code); }
