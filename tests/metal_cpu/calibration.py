"""MLX's own kernels, read from the installed wheel, as bodies for mx.fast.metal_kernel.

If the bench disagrees with MLX's CPU results on these, the bench is wrong.
"""

import re

import mlx.core as mx

from .toolchain import KERNELS, mlx_include

# quantized.h names these matrix tiles in kernels that the bench does not run.
STEEL = """
namespace mlx { namespace steel {
template <typename T, typename U, auto...> struct BlockMMA;
template <typename T, auto...> struct BlockLoader;
} }
"""
QMV = """
    {name}<T, GROUP, BITS, false>(
        w, scales, biases, x, y, columns, rows, columns, nullptr, nullptr, columns, nullptr,
        nullptr, nullptr, nullptr, threadgroup_position_in_grid,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
SOFTMAX = """
    softmax_single_row<T, float>(
        x, y, columns, threadgroup_position_in_grid.x, thread_position_in_threadgroup.x,
        thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
"""


def _header(*names: str) -> str:
    """Return MLX's headers as text, for the same edits as a kernel's text."""
    text = "".join((mlx_include() / KERNELS / name).read_text() for name in names)
    text = re.sub(r"^#(include|pragma once).*$", "", text, flags=re.M)
    return re.sub(r" \[\[function_constant\(\d+\)\]\];", " = true;", text)


def quantized_matvec(
    name: str, w: mx.array, scales: mx.array, biases: mx.array, x: mx.array, bits: int
) -> mx.array:
    """Run MLX's affine_qmv_fast or affine_qmv; x: [vectors, columns]."""
    rows, (vectors, columns) = scales.shape[0], x.shape
    kernel = mx.fast.metal_kernel(
        name=f"calibrate_{name}",
        input_names=["w", "scales", "biases", "x", "columns", "rows"],
        output_names=["y"],
        header=STEEL + _header("steel/utils.h", "quantized_utils.h", "quantized.h"),
        source=QMV.format(name=name),
    )
    (y,) = kernel(
        inputs=[w, scales, biases, x, columns, rows],
        template=[("T", x.dtype), ("GROUP", columns // scales.shape[1]), ("BITS", bits)],
        grid=(32 * vectors, 2 * -(-rows // 8), 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(vectors, rows)],
        output_dtypes=[x.dtype],
    )
    return y


def softmax(x: mx.array) -> mx.array:
    """Run MLX's softmax_single_row; x: [rows, columns]."""
    rows, columns = x.shape
    kernel = mx.fast.metal_kernel(
        name="calibrate_softmax",
        input_names=["x", "columns"],
        output_names=["y"],
        header=_header("softmax.h"),
        source=SOFTMAX,
    )
    group = 32 * -(-columns // (4 * 32))
    (y,) = kernel(
        inputs=[x, columns],
        template=[("T", x.dtype)],
        grid=(group * rows, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y
