"""Kernels that are wrong on purpose; at least one mode must catch each.

All take x [64] float32 (n = 0..63 plus a fraction), most run as one threadgroup of 64 lanes, and
write o [64]. The body starts with `i` (position in the grid), `l` (in the threadgroup) and `lane`.
"""

from dataclasses import dataclass

import mlx.core as mx

START = """
    uint i = thread_position_in_grid.x;
    uint l = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    (void)i; (void)l; (void)lane;
"""
TILE = "threadgroup float tile[64]; tile[l] = x[i];\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@dataclass(frozen=True)
class Bad:
    """One bad kernel: what is wrong, the body, the geometry."""

    name: str
    body: str
    header: str = ""
    grid: int = 64
    group: int = 64
    dtype: mx.Dtype = mx.float32

    def __call__(self, x: mx.array, tiny: mx.array) -> mx.array:
        """Launch it as a package would."""
        kernel = mx.fast.metal_kernel(
            name="bad",
            input_names=["x", "tiny"],
            output_names=["o"],
            header=self.header,
            source=START + self.body,
        )
        (out,) = kernel(
            inputs=[x, tiny],
            grid=(self.grid, 1, 1),
            threadgroup=(self.group, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[self.dtype],
        )
        return out


GOOD = Bad(
    "good",
    TILE + BARRIER + "float s = simd_sum(tile[63 - l]); o[i] = s * tiny[0] + tiny[1];",
)

BAD = (
    # Meeting points.
    Bad("missing barrier", TILE + "o[i] = tile[63 - l];"),
    Bad("barrier in half of the simdgroups", TILE + f"if (l < 32) {{ {BARRIER} }} o[i] = tile[l];"),
    Bad("barrier in half of the lanes", TILE + f"if (l & 1) {{ {BARRIER} }} o[i] = tile[l];"),
    Bad(
        "two barriers, one for each branch",
        TILE + f"if (l & 1) {{ {BARRIER} }} else {{\n {BARRIER} }} o[i] = tile[l];",
    ),
    Bad("return before a barrier", f"o[i] = x[i]; if (l == 5) return;\n {BARRIER}"),
    Bad(
        "simd_sum in half of the lanes", "float s = x[i]; if (lane < 16) s = simd_sum(s); o[i] = s;"
    ),
    Bad(
        "simd_sum in a loop of unequal length",
        "float s = 0.0f; for (uint k = 0; k < lane / 16 + 1; k++) s += simd_sum(x[i]);\n o[i] = s;",
    ),
    Bad("shuffle from lane 32", "o[i] = simd_shuffle(x[i], ushort(lane + 1));"),
    Bad(
        "mem_none where memory must be fenced",
        TILE + "threadgroup_barrier(mem_flags::mem_none); o[i] = tile[63 - l];",
    ),
    Bad(
        "simdgroup barrier between simdgroups",
        TILE + "simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = tile[63 - l];",
    ),
    Bad("simd_sum taken for a barrier", TILE + "float s = simd_sum(1.0f); o[i] = tile[l ^ 1] + s;"),
    Bad(
        "barrier missing before reuse",
        TILE + BARRIER + "float v = tile[l ^ 33]; tile[l] = v; o[i] = v;",
    ),
    # Races.
    Bad("all lanes write one element", "o[i] = x[i]; o[0] = x[i];"),
    Bad("pairs write the same value", "o[i] = 1.0f; o[i & ~1u] = 1.0f;"),
    Bad("sum without atomics", TILE + BARRIER + "tile[0] += x[i];\n" + BARRIER + "o[i] = tile[0];"),
    Bad("one threadgroup reads what another wrote", "o[i] = x[i]; o[i] = o[i & 31];", group=32),
    Bad(
        "threadgroup fence for device memory",
        "o[i] = x[i];\n" + BARRIER + "float v = o[63 - l];\n" + BARRIER + "o[i] = v;",
    ),
    # Bounds.
    Bad("reads one past the end", "o[i] = x[i + 1];"),
    Bad("reads one before the start", "o[i] = x[int(i) - 1];"),
    Bad("writes one past the end", "o[i] = x[i]; if (i == 63) o[i + 1] = 0.0f;"),
    Bad("writes one before the start", "o[i] = x[i]; if (i == 0) o[int(i) - 1] = 0.0f;"),
    Bad("starts at row 1 of 8", "for (uint k = 0; k < 8; k++) o[i] = x[(l / 8 + 1) * 8 + k];"),
    Bad("threadgroup array one too short", "threadgroup float t[63]; t[l] = x[i]; o[i] = t[l];"),
    Bad(
        "runs into the next threadgroup array",
        "threadgroup float t[32], u[64]; u[l] = 0.0f;\n"
        + BARRIER
        + "t[l] = x[i];\n"
        + BARRIER
        + "o[i] = t[l] + u[l];",
    ),
    Bad(
        "lane's own array one too short",
        "float a[4]; for (uint k = 0; k <= 4 + l / 128; k++) a[k] = x[k]; o[i] = a[l & 3];",
    ),
    Bad(
        "helper runs over the lane's own array",
        "float a[4]; fill(a, x, 4 + l / 128); o[i] = a[l & 3];",
        "template <typename P> inline void fill(thread float* a, P x, uint n) {\n"
        "  for (uint k = 0; k <= n; k++) a[k] = x[k];\n}\n",
    ),
    Bad("ragged grid without guard", "o[i] = x[i];", grid=70, group=32),
    Bad("ragged grid with guard", "if (i < 64) o[i] = x[i];", grid=70, group=32),
    Bad("writes to an input", "auto p = (device float*)x; p[i] = 1.0f; o[i] = p[i];"),
    # Initialization.
    Bad(
        "threadgroup memory half written",
        "threadgroup float t[64]; if (l & 1) t[l] = x[i];\n" + BARRIER + "o[i] = t[l];",
    ),
    Bad("sum that starts nowhere", "float s[2]; s[l & 1] += x[i]; o[i] = s[l & 1];"),
    Bad("last output not written", "if (i < 63) o[i] = x[i];"),
    # Types.
    Bad("device pointer to threadgroup memory", TILE + "device float* p = tile; o[i] = p[l];"),
    Bad("device pointer to a tiny input", "const device float* p = tiny; o[i] = x[i] * p[0];"),
    Bad("double", "double v = x[i]; o[i] = float(v);"),
    Bad("literal without f", "o[i] = x[i] * 0.5;"),
    Bad("float to half, implicitly", "half h = x[i]; o[i] = float(h);"),
    Bad("float to bfloat, implicitly", "o[i] = x[i];", dtype=mx.bfloat16),
    Bad("not in Metal", "o[i] = metal::expm1(x[i]);"),
    Bad("C's function, not Metal's", "o[i] = expf(x[i]);"),
    Bad("compiler built-in", "o[i] = __builtin_sqrtf(x[i]);"),
    Bad("math without metal::", "o[i] = sqrt(x[i]);"),
    # Undefined behavior.
    Bad("signed overflow", "int v = 2147483600 + int(l); o[i] = float(v);"),
    Bad("shift by 32 and more", "o[i] = float(1u << l);"),
    Bad("misaligned vector load", "auto p = (const device float4*)(x + 1); o[i] = p[l / 8].x;"),
    Bad("float that fits no int", "o[i] = float(int(x[i] * 1e9f));"),
    Bad("division by zero", "o[i] = float(64 / int(l));"),
    # The language and its limits.
    Bad("lambda", "auto f = [](float v) { return v + 1.0f; }; o[i] = f(x[i]);"),
    Bad("static variable", "static float s = 0.0f; s = s + x[i]; o[i] = s;"),
    Bad(
        "recursion",
        "o[i] = triangle(x[i]);",
        "inline float triangle(float v) { return v < 1.0f ? v : v + triangle(v - 1.0f); }\n",
    ),
    Bad("goto", "uint k = 0; again: o[i] = x[i]; if (k++ < 2) goto again;"),
    Bad("threads_per_grid", "o[i] = x[i] + float(threads_per_grid.x);"),
    Bad("too much threadgroup memory", "threadgroup float t[8193]; t[l] = x[i]; o[i] = t[l];"),
    Bad("2048 lanes in a threadgroup", "if (i < 64) o[i] = x[i];", grid=2048, group=2048),
)
