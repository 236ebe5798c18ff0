// Takes the place of MLX's complex.h, whose address-space qualified methods clang cannot parse.
#pragma once

#include <metal_stdlib>

template <typename T> struct complex_t {
  T real, imag;
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;
