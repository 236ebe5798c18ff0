"""Random-weight checkpoints of true shape, in the streamed format, for the benchmarks.

Files, headers, quantization and config.json equal those of a real conversion, because
`flashmoe-convert` plans them from an imaginary bfloat16 checkpoint. This module only supplies the
bytes: random windows into small pools of random codes and scales. Weights have a variance of
1 / columns, so that activations stay finite and routers spread tokens over experts; the text is
nonsense.
"""

import contextlib
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..cli.doctor_model import examine
from ..convert.plan.parts import LayerPlan, Options, Plan, Quant, Spec, TrunkTensor
from ..convert.plan.plan import build_plan
from ..convert.source.checkpoint import Dims, Source, qwen_modules
from ..convert.source.foreign_code import SHIM_NAME
from ..convert.write.execute import record_entry, write_record
from ..convert.write.files import CHECKSUM, TensorFile, write_file, write_json
from ..convert.write.output import SHIM, write_index
from ..errors import FlashMoEError
from ..format import layout
from ..format.headers import TensorInfo
from ..format.layout import EXPERT_DIR
from ..format.names import is_expert
from ..models.qwen3_5.args import ModelArgs
from ..models.qwen3_5.geometry import GEOMETRIES
from ..models.qwen3_5.model import Model
from ..progress import bar
from .arguments import default_dir

VERSION = 1  # of the weights; part of the directory's name
CODES, SCALES = 1 << 21, 1 << 18  # elements of the pools; a window takes half of one at most
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")  # ids 256 to 258, after the bytes
LEAST_VOCABULARY = 256 + len(SPECIAL)
END_OF_TURN = 256 + SPECIAL.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Words = npt.NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """The description of a synthetic checkpoint; equal recipes give equal bytes.

    Attributes:
        geometry: a key of `GEOMETRIES`.
        layers: number of decoder layers.
        vocabulary: number of token ids.
        bits: bits per expert weight, 4 or 2. The trunk has 4, routers have 8.
    """

    geometry: str
    layers: int
    vocabulary: int
    bits: int

    def __post_init__(self) -> None:
        """Raise FlashMoEError if a value is out of range."""
        if self.geometry not in GEOMETRIES:
            known = ", ".join(GEOMETRIES)
            raise FlashMoEError(f"geometry {self.geometry!r} is unknown. Choose from {known}.")
        if self.bits not in (4, 2):
            raise FlashMoEError(f"bits must be 4 or 2, got {self.bits}")
        # Two layers, so that both kinds of attention occur.
        limits = {"layers": (2, 1000), "vocabulary": (LEAST_VOCABULARY, 10**7)}
        for name, (least, most) in limits.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise FlashMoEError(f"{name} must be from {least} to {most}, got {value}")

    @property
    def name(self) -> str:
        """The name of the directory."""
        size = f"{self.geometry}-{self.layers}-layers-{self.vocabulary}-tokens"
        return f"{size}-{self.bits}-bit-v{VERSION}"

    def config(self) -> dict[str, Any]:
        """Return the config.json of the bfloat16 checkpoint that is the plan's source."""
        text = text_config(self.geometry, self.layers, self.vocabulary)
        return {"model_type": "qwen3_5_moe", "text_config": text, "eos_token_id": END_OF_TURN}

    def plan(self) -> Plan:
        """Plan the checkpoint as flashmoe-convert plans a conversion."""
        config = self.config()
        args = ModelArgs.from_dict(config)
        trunk = {
            name: (Path(), TensorInfo("F32" if name.endswith("A_log") else "BF16", x.shape, 0, 0))
            for name, x in tree_flatten(Model(args).parameters())
            if not is_expert(name)
        }
        dims = Dims(
            args.num_hidden_layers, args.num_experts, args.num_experts_per_tok,
            args.hidden_size, args.moe_intermediate_size, tied=False,
        )  # fmt: skip
        source = Source(
            Path(), self.name, None, config, dims.top_k, qwen_modules(dims), trunk, None, {}
        )
        return build_plan(source, Options(quantize=True, bits=self.bits))


def text_config(geometry: str, layers: int, vocabulary: int) -> dict[str, Any]:
    """Return config.json's entry for the language model.

    With fewer than four layers the last one has full attention, because stock mlx-lm needs both
    kinds of layer.
    """
    sizes = GEOMETRIES[geometry]
    return sizes._asdict() | {
        "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "vocab_size": vocabulary,
        "num_hidden_layers": layers, "full_attention_interval": min(4, layers),
        "shared_expert_intermediate_size": sizes.moe_intermediate_size,
        "linear_conv_kernel_dim": 4, "attention_bias": False, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
            "mrope_interleaved": True, "mrope_section": [11, 11, 10],
        },
    }  # fmt: skip


def checkpoint(recipe: Recipe, directory: Path | None = None) -> Path:
    """Return a recipe's checkpoint; write it first unless `directory` has it complete.

    Args:
        recipe: the description of the checkpoint.
        directory: the directory of the checkpoints (default: in the user's cache directory).

    Raises:
        FlashMoEError: the disk has too little space, or writing fails.
    """
    path = (directory or default_dir()).expanduser() / recipe.name
    if _is_complete(path):
        return path
    plan = recipe.plan()
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        _check_disk_space(plan, path)
        (unfinished / EXPERT_DIR).mkdir(parents=True)
        _write(recipe, plan, unfinished)
        shutil.rmtree(path, ignore_errors=True)  # damaged
        os.replace(unfinished, path)
    except OSError as error:
        raise FlashMoEError(
            f"{error.filename or path}: cannot be written ({error.strerror}). Give another --dir."
        ) from error
    return path


def _is_complete(path: Path) -> bool:
    with contextlib.suppress(FlashMoEError, OSError, ValueError):
        return not examine(path).problems
    return False


def _check_disk_space(plan: Plan, path: Path) -> None:
    needed, free = plan.trunk_bytes + plan.expert_bytes, shutil.disk_usage(path.parent).free
    if needed > free:
        raise FlashMoEError(
            f"{path}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free. Free some "
            "space, give another --dir, or fewer --layers."
        )


def _write(recipe: Recipe, plan: Plan, directory: Path) -> None:
    """Write all files, the manifest last."""
    pools = Pools()
    write_json(directory / "config.json", plan.config)
    write_file(directory / SHIM_NAME, SHIM.encode())
    write_tokenizer(directory)
    for file in plan.trunk:
        with TensorFile(directory / file.name, file.outputs) as target:
            for tensor in file.tensors:
                _write_tensor(target, tensor, pools)
    write_index(plan, directory)
    layers = []
    with bar(len(plan.layers), " layers", f"writing {recipe.name}") as progress:
        for layer in plan.layers:
            layers.append(_write_layer(directory / EXPERT_DIR, layer, pools))
            progress.update()
    manifest = {
        "format": layout.MANIFEST_FORMAT, "version": layout.MANIFEST_VERSION,
        "source": asdict(recipe), "num_experts": plan.layers[0].experts,
        "checksum": CHECKSUM, "layers": layers,
    }  # fmt: skip
    write_json(directory / EXPERT_DIR / layout.MANIFEST, manifest)


def _write_layer(directory: Path, plan: LayerPlan, pools: "Pools") -> dict[str, Any]:
    """Write one layer's experts, and return its manifest entry."""
    rng = _rng(plan.file)
    with TensorFile(directory / plan.file, plan.outputs, layout.DATA_ALIGNMENT) as file:
        for expert in range(plan.experts):
            matrices = (pools.matrix(x.outputs, x.after, rng) for x in plan.projections if x.after)
            write_record(
                file, expert, plan.record[0].name, [part for matrix in matrices for part in matrix]
            )
        return file.entry() | record_entry(plan, file)


def _write_tensor(file: TensorFile, tensor: TrunkTensor, pools: "Pools") -> None:
    spec, start = tensor.outputs[0], 0
    rng = _rng(spec.name)
    quant = tensor.quant
    for part in pools.matrix(tensor.outputs, quant, rng) if quant else [_small(spec, rng)]:
        file.write(spec.name, part.data, start)  # weight, scales and biases are contiguous
        start += part.nbytes


def _small(spec: Spec, rng: np.random.Generator) -> Words:
    """Return an unquantized tensor: norms near 1, decay rates from slow to fast, or normals."""
    if spec.name.endswith("A_log"):
        return np.log(rng.uniform(0.01, 8, spec.shape)).astype(np.float32)
    mean, deviation = 1.0, 0.1
    if spec.name.endswith(("conv1d.weight", "dt_bias")):
        mean, deviation = 0.0, 0.5
    return _bfloat16(rng.normal(mean, deviation, spec.shape))


class Pools:
    """Random codes, scales and biases; tensors are windows into them."""

    def __init__(self) -> None:
        """Draw the codes; draw scales later for each kind of matrix."""
        self._rng = _rng("pools")
        self._codes = self._rng.integers(0, 1 << 32, CODES, np.uint32)
        self._affine: dict[tuple[int, int], tuple[Words, Words]] = {}

    def matrix(
        self, outputs: Sequence[Spec], quant: Quant, rng: np.random.Generator
    ) -> Iterator[Words]:
        """Yield a quantized matrix in pieces: codes, then scales, then biases."""
        codes, scales, _ = outputs
        columns = codes.shape[1] * 32 // quant.bits
        yield from windows(self._codes, math.prod(codes.shape), rng)
        seed = rng.integers(1 << 63)  # the same for both, since each bias belongs to a scale
        for pool in self._scales_and_biases(columns, quant.bits):
            yield from windows(pool, math.prod(scales.shape), np.random.default_rng(seed))

    def _scales_and_biases(self, columns: int, bits: int) -> tuple[Words, Words]:
        """Return pools that give weights mean 0 and variance 1 / columns."""
        if (columns, bits) not in self._affine:
            # Uniform codes have the variance (4^bits - 1) / 12. Scales differ between groups, so
            # that a kernel that uses a neighboring group's scale gives a wrong result.
            deviation = math.sqrt(12 / (columns * (4**bits - 1)))
            scales = _bfloat16(deviation * self._rng.uniform(0.8, 1.2, SCALES))
            rounded = (scales.astype(np.uint32) << 16).view(np.float32)
            self._affine[columns, bits] = scales, _bfloat16(rounded * (1 - 2**bits) / 2)
        return self._affine[columns, bits]


def windows(pool: Words, count: int, rng: np.random.Generator) -> Iterator[Words]:
    """Yield `count` elements in pieces of the pool that start at random offsets."""
    most = pool.size // 2
    for start in range(0, count, most):
        place = int(rng.integers(most))
        yield pool[place : place + min(most, count - start)]


def _bfloat16(values: npt.NDArray[np.float64]) -> Words:
    """Round to bfloat16, as uint16 bit patterns."""
    rounded = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    return np.array(rounded.view(mx.uint16))


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer: ids are the bytes, then the special tokens."""
    ids = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    write_file(directory / "tokenizer.json", tokenizer.to_str().encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    write_json(directory / "tokenizer_config.json", settings)
