// Type traits and numeric limits in namespace metal.
#pragma once

namespace metal {

template <typename A, typename B> inline constexpr bool is_same_v = __is_same(A, B);
template <typename A, typename B> inline constexpr bool is_convertible_v = __is_convertible(A, B);

template <bool C, typename A, typename B> struct conditional { typedef A type; };
template <typename A, typename B> struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B>
using conditional_t = typename conditional<C, A, B>::type;

template <bool C, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool C, typename T = void> using enable_if_t = typename enable_if<C, T>::type;

template <typename T> using remove_cv_t = __remove_cv(T);
template <typename T> inline constexpr bool is_half_v =
    is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <typename T> inline constexpr bool is_floating_point_v =
    is_half_v<T> || is_same_v<remove_cv_t<T>, float>;
template <typename T> inline constexpr bool is_integral_v =
    __is_integral(T) && !is_floating_point_v<T>;
template <typename T> inline constexpr bool is_signed_v = T(-1) < T(0);
template <typename T> inline constexpr bool is_arithmetic_v =
    is_integral_v<T> || is_floating_point_v<T>;

template <typename T> struct numeric_limits;

#define BENCH_INTEGER_LIMITS(T, LOW, HIGH)                                \
  template <> struct numeric_limits<T> {                                  \
    static constexpr T min() { return LOW; }                              \
    static constexpr T lowest() { return LOW; }                           \
    static constexpr T max() { return HIGH; }                             \
  };
BENCH_INTEGER_LIMITS(char, -128, 127)
BENCH_INTEGER_LIMITS(int8_t, -128, 127)
BENCH_INTEGER_LIMITS(uint8_t, 0, 255)
BENCH_INTEGER_LIMITS(int16_t, -32768, 32767)
BENCH_INTEGER_LIMITS(uint16_t, 0, 65535)
BENCH_INTEGER_LIMITS(int32_t, -__INT_MAX__ - 1, __INT_MAX__)
BENCH_INTEGER_LIMITS(uint32_t, 0, 2u * __INT_MAX__ + 1)
BENCH_INTEGER_LIMITS(int64_t, -__LONG_MAX__ - 1, __LONG_MAX__)
BENCH_INTEGER_LIMITS(uint64_t, 0, 2ul * __LONG_MAX__ + 1)

#define BENCH_FLOAT_LIMITS(T, BITS, MIN, MAX, INF, NAN, EPS)                     \
  template <> struct numeric_limits<T> {                                         \
    static constexpr T min() { return __builtin_bit_cast(T, BITS(MIN)); }        \
    static constexpr T max() { return __builtin_bit_cast(T, BITS(MAX)); }        \
    static constexpr T lowest() { return -max(); }                               \
    static constexpr T infinity() { return __builtin_bit_cast(T, BITS(INF)); }   \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, BITS(NAN)); }  \
    static constexpr T epsilon() { return __builtin_bit_cast(T, BITS(EPS)); }    \
  };
BENCH_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x7c00, 0x7e00, 0x1400)
BENCH_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x7f80, 0x7fc0, 0x3c00)
BENCH_FLOAT_LIMITS(
    float, uint32_t, 0x00800000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x34000000)

}  // namespace metal
