// Handlers of clang's undefined-behavior checks, and a missing bfloat conversion.
#include "runtime.h"

#include <string.h>

struct SourceLocation {
  const char* file;
  u32 line, column;
};

[[noreturn]] static void undefined(const SourceLocation* where, const char* what) {
  const char* slash = strrchr(where->file, '/');
  fail("undefined", 0, where->line, "%s (%s:%u:%u)", what, slash ? slash + 1 : where->file,
       where->line, where->column);
}

#define HANDLER(NAME, WHAT)                                     \
  void __ubsan_handle_##NAME(const SourceLocation* where) {     \
    undefined(where, WHAT);                                     \
  }                                                             \
  void __ubsan_handle_##NAME##_abort(const SourceLocation* where) { undefined(where, WHAT); }

extern "C" {
HANDLER(add_overflow, "signed overflow in an addition")
HANDLER(sub_overflow, "signed overflow in a subtraction")
HANDLER(mul_overflow, "signed overflow in a multiplication")
HANDLER(negate_overflow, "signed overflow in a negation")
HANDLER(divrem_overflow, "division by zero or overflow")
HANDLER(shift_out_of_bounds, "shift by too much, or of a negative number")
HANDLER(out_of_bounds, "index outside the array")
HANDLER(local_out_of_bounds, "outside a lane's own array")
HANDLER(type_mismatch_v1, "null or misaligned pointer")
HANDLER(alignment_assumption, "misaligned pointer")
HANDLER(pointer_overflow, "pointer arithmetic wraps around")
HANDLER(float_cast_overflow, "float value does not fit the integer type")
HANDLER(load_invalid_value, "bool or enum with an impossible value")
HANDLER(vla_bound_not_positive, "array of no length")
HANDLER(builtin_unreachable, "unreachable code reached")
HANDLER(missing_return, "end of a function without return")
HANDLER(invalid_builtin, "zero given to a bit count")
HANDLER(nonnull_arg, "null argument")

// Round to nearest even; a NaN stays a NaN. clang calls this where the CPU has no instruction.
__bf16 __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  if (x != x) return __builtin_bit_cast(__bf16, (unsigned short)(bits >> 16 | 64));
  return __builtin_bit_cast(__bf16, (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}
}
