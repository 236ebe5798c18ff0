"""A good 4-bit matrix-vector kernel, and small edits of its text that the bench must catch."""

import mlx.core as mx
import numpy as np

ROWS, COLUMNS, GROUP = 12, 640, 64

SOURCE = """
    threadgroup float tile[K];
    uint lane = thread_index_in_simdgroup;
    uint row = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
    for (uint k = thread_index_in_threadgroup; k < K; k += 128) {
      tile[k] = static_cast<float>(x[k]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    auto codes = w + row * (K / 8);
    auto scale = scales + row * (K / GROUP);
    auto bias = biases + row * (K / GROUP);
    float total = 0.0f;
    for (uint word = lane; word < K / 8; word += 32) {
      uint packed = codes[word];
      float dot = 0.0f;
      float sum = 0.0f;
      for (uint j = 0; j < 8; j++) {
        float value = tile[word * 8 + j];
        dot = metal::fma(static_cast<float>((packed >> (4 * j)) & 15u), value, dot);
        sum += value;
      }
      uint group = word * 8 / GROUP;
      total += static_cast<float>(scale[group]) * dot + static_cast<float>(bias[group]) * sum;
    }
    total = simd_sum(total);
    if (lane == 0) {
      y[row] = static_cast<T>(total);
    }
"""

# (text in SOURCE, replacement)
MUTATIONS = (
    ("* 4 + simdgroup", "* 3 + simdgroup"),
    ("* 4 + simdgroup", "* 4 + 1 + simdgroup"),
    ("k = thread_index_in_threadgroup;", "k = thread_index_in_simdgroup;"),
    ("k < K;", "k < K - 1;"),
    ("k < K;", "k <= K;"),
    ("k += 128", "k += 256"),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("threadgroup_barrier(mem", "simdgroup_barrier(mem"),
    ("row * (K / 8)", "row * (K / 4)"),
    ("scales + row", "biases + row"),
    ("biases + row * (K / GROUP)", "biases + row * (K / GROUP - 1)"),
    ("total = 0.0f", "total"),
    ("word = lane", "word = lane + 1"),
    ("word < K / 8", "word <= K / 8"),
    ("word += 32", "word += 31"),
    ("sum = 0.0f", "sum = 1e-3f"),
    ("j < 8", "j < 7"),
    ("word * 8 + j", "word * 8 + j + 1"),
    ("4 * j", "3 * j"),
    ("& 15u", "& 7u"),
    ("word * 8 / GROUP", "word / GROUP"),
    ("* dot +", "* dot -"),
    ("total = simd_sum(total);", ""),
    ("total = simd_sum(total);", "if (lane < 31) { total = simd_sum(total); }"),
    ("lane == 0", "lane <= 1"),
    ("lane == 0", "row != 3 && lane == 0"),
    ("y[row]", "y[row + 1]"),
)


def matvec(
    w: mx.array, scales: mx.array, biases: mx.array, x: mx.array, source: str = SOURCE
) -> mx.array:
    """Multiply 4-bit weights [ROWS, COLUMNS] by x [COLUMNS]; four rows a threadgroup."""
    kernel = mx.fast.metal_kernel(
        name="matvec",
        input_names=["w", "scales", "biases", "x"],
        output_names=["y"],
        source=source,
    )
    rows = w.shape[0]
    (y,) = kernel(
        inputs=[w, scales, biases, x],
        template=[("T", x.dtype), ("K", x.size), ("GROUP", GROUP)],
        grid=(rows * 32, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[x.dtype],
    )
    return y


def arrays(
    dtype: mx.Dtype = mx.float32, rows: int = ROWS, columns: int = COLUMNS
) -> list[mx.array]:
    """Return quantized weights, scales, biases and a vector, from a fixed seed."""
    random = np.random.default_rng(7)
    weights = mx.array(random.normal(size=(rows, columns)).astype(np.float32)).astype(dtype)
    x = mx.array(random.normal(size=columns).astype(np.float32)).astype(dtype)
    return [*mx.quantize(weights, group_size=GROUP, bits=4), x]


def reference(w: mx.array, scales: mx.array, biases: mx.array, x: mx.array) -> np.ndarray:
    """Compute the reference in numpy, float64."""
    codes = (np.array(w)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    groups = codes.reshape(w.shape[0], -1, GROUP).astype(np.float64)
    scale, bias = (np.array(a.astype(mx.float32), np.float64)[..., None] for a in (scales, biases))
    dense = (groups * scale + bias).reshape(w.shape[0], -1)
    return dense @ np.array(x.astype(mx.float32), np.float64)
