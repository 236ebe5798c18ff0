"""From a directory to a model: `bind` for stock mlx-lm's `model_file`, `load` for Python."""

from .requirements import check_once

check_once()  # before the packages are imported

import atexit
import difflib
import glob
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from .custom_kernels.cpu.compile import check_cpu_kernels, prepare
from .custom_kernels.device import computes_at_once
from .errors import FlashMoEError, named
from .format.headers import TensorInfo, checkpoint_headers, weight_files
from .format.json_file import exists
from .format.layout import ExpertLayout, open_layout, quantization
from .format.model_files import check_small_files, is_local, read_config
from .format.modules import MODES, ExpertModule, open_modules, quantizations
from .format.names import PROJECTIONS, is_expert
from .models.patch import patched_classes, stock_modules, top_k, vocabulary
from .models.qwen3_5.args import MODEL_TYPES, ModelArgs, activation_bytes, check_top_k
from .models.qwen3_5.model import Model
from .models.trunk_checks import REMEDY, check_readable, check_trunk
from .progress import bar
from .settings import StreamConfig
from .store.checks import RecordChecks
from .store.devices import choose
from .store.io_mode import plan_io, plan_load
from .store.memory import available_bytes
from .store.sizing import plan_cache, requested_slots
from .store.slots import DTYPES
from .store.store import ExpertStore

Format = tuple[int, int, str]
READ_AT_ONCE = 16  # arrays of the trunk
BUNDLED_MODEL = Path(__file__).parent / "bundled"
# Any exception: transformers and Rust only parse here.
TOKENIZER = "its tokenizer cannot be loaded", REMEDY, (Exception,)
DOWNLOAD_PATTERNS = [
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja",
]  # fmt: skip


def bind(shim: str) -> tuple[type[nn.Module], Any]:
    """Return the classes from which stock mlx-lm builds a converted model.

    A converted directory's `flashmoe_model.py` calls this with its own `__file__`.
    """
    directory = Path(shim).parent
    return bound_classes(directory, read_config(directory))


def bound_classes(
    directory: Path, config: Mapping[str, Any], **settings: Any
) -> tuple[type[nn.Module], Any]:
    """Return (model class, arguments class) whose experts stream from `directory`.

    Args:
        directory: the model's directory.
        config: its config.json.
        settings: `StreamConfig` fields; None means not given.
    """
    if not has_fast_path(config):
        return generic_classes(directory, config, settings)

    class BoundModel(Model):
        """A `Model` with an expert store on one directory."""

        def __init__(self, args: ModelArgs) -> None:
            """Open the store, then build the model."""
            stream = StreamConfig.resolve(args.flashmoe, **settings)
            if stream.experts_per_token is not None:
                check_top_k(stream.experts_per_token, args.num_experts, "experts_per_token")
                args = replace(args, num_experts_per_tok=stream.experts_per_token)
            super().__init__(args, open_store(directory, args, stream))

    return BoundModel, ModelArgs


def has_fast_path(config: Mapping[str, Any]) -> bool:
    """Say whether this package has its own model code for a config.json.

    Raises:
        FlashMoEError: FLASHMOE_MODEL is neither auto nor generic.
    """
    mode = os.environ.get("FLASHMOE_MODEL") or "auto"
    if mode not in ("auto", "generic"):
        raise FlashMoEError(f"FLASHMOE_MODEL = {mode!r} is not valid. Set it to auto or generic.")
    return mode == "auto" and is_own(config)


def is_own(config: Mapping[str, Any]) -> bool:
    """Say whether this package's model code takes a config.json: Qwen3.5 in affine modes."""
    entry = config.get("quantization")
    other = isinstance(entry, Mapping) and entry.get("mode") in MODES.values()
    return config.get("model_type") in MODEL_TYPES and not other


def generic_classes(
    directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[type[nn.Module], Any]:
    """Return mlx-lm's own classes with streamed experts: see `patched_classes`."""
    stream = StreamConfig.resolve(config.get("flashmoe") or {}, **settings)
    if stream.lookahead == "on":
        raise FlashMoEError(
            f"lookahead = 'on': no prefetch for model_type {config.get('model_type')!r}. Choose "
            "auto, or off."
        )

    def open_experts(args: Any, modules: Sequence[ExpertModule]) -> ExpertStore:
        layout = open_modules(directory, modules)
        if stream.verify and layout.kind == "stock":
            raise FlashMoEError(
                f"verify = true: {directory} is not a converted model, so its experts have no "
                "checksums. Leave verify out."
            )
        found = quantizations(layout, modules)
        formats = {(q.bits, q.group_size, dtype) for q, dtype in found if q.mode == "affine"}
        name = "config.json: top-k" if stream.experts_per_token is None else "experts_per_token"
        check_top_k(top_k(args), min(m.num_experts for m in modules), name)
        experts = tuple(prefix for module in modules for prefix in module.prefixes)
        headers = checkpoint_headers(directory)
        trunk = {k: info for k, (_, info) in headers.items() if not k.startswith(experts)}
        formats |= entry_formats(config.get("quantization") or {}, trunk)
        widest = max(max(shape) for module in modules for shape in module.shapes.values())
        size = Size(top_k(args), trunk_bytes(trunk), activation_bytes(top_k(args), widest))
        return start_store(layout, size, named_dtypes(formats), replace(stream, lookahead="off"))

    return patched_classes(config, open_experts, stream.experts_per_token)


@dataclass(frozen=True)
class Size:
    """What the size of the expert cache depends on, besides the experts.

    Attributes:
        top_k: experts per token.
        trunk: bytes of resident weights.
        activations: bytes of a prompt chunk's activations.
    """

    top_k: int
    trunk: int
    activations: int


def open_store(directory: Path, args: ModelArgs, stream: StreamConfig) -> ExpertStore:
    """Open a directory's experts with the configured cache, and preload them if all fit.

    Raises:
        FlashMoEError: experts are missing or damaged, or the cache is smaller than one token needs.
    """
    layout = open_layout(directory, args.num_hidden_layers, args.num_experts)
    headers = checkpoint_headers(directory)
    check_trunk(directory, headers, args)
    if not computes_at_once():
        if stream.lookahead == "on":
            raise FlashMoEError(
                "lookahead = 'on': prefetch needs this package's CPU kernels, which are not used "
                "here. Choose auto, or off."
            )
        stream = replace(stream, lookahead="off")
    trunk = without_experts(headers)
    size = Size(args.num_experts_per_tok, trunk_bytes(trunk), args.activation_bytes)
    return start_store(layout, size, kernel_formats(trunk, args, layout), stream)


def start_store(
    layout: ExpertLayout, size: Size, formats: set[Format], stream: StreamConfig
) -> ExpertStore:
    """Open a layout's experts: plan the cache, compile the kernels, preload if all fit.

    Args:
        layout: where the experts lie.
        size: of the rest of the model.
        formats: of the matrices that the CPU kernels compute.
        stream: settings.
    """
    backend = choose()
    checks = RecordChecks(layout, backend) if stream.verify else None
    requested_slots(stream.expert_cache, layout, size.top_k)  # raises early
    prepare(formats)
    check_cpu_kernels(formats)
    available = available_bytes()  # after the kernels, which take memory
    io = plan_io(stream.io_mode, layout, available - size.trunk)
    own = backend.free_bytes
    plan = plan_cache(
        stream.expert_cache,
        layout,
        size.top_k,
        size.trunk,
        available if own is None else own,
        io,
        size.activations,
        apart=own is not None,
    )
    if plan.slots == layout.num_experts:  # nothing is read after loading
        plan = replace(plan, io=plan_load(stream.io_mode, layout, io))
        stream = replace(stream, lookahead="off")
    store = ExpertStore(layout, plan, stream.io_threads, True, checks, stream.lookahead, backend)
    if stream.stats:
        print(f"[flashmoe] {plan}", file=sys.stderr)
        if store.stats.bytes_preloaded:
            print(f"[flashmoe] Experts: {store.stats.preloaded}", file=sys.stderr)
        atexit.register(
            lambda: print(
                f"[flashmoe] {store.stats}; lookahead: {store.lookahead}", file=sys.stderr
            )
        )
    return store


def trunk_bytes(trunk: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of resident tensors."""
    return sum(info.nbytes for info in trunk.values())


def kernel_formats(
    trunk: dict[str, TensorInfo], args: ModelArgs, layout: ExpertLayout
) -> set[Format]:
    """Return (bits, group size, dtype of the scales) of all matrices."""
    formats = set()
    for layer in layout.layers:
        for index, projection in enumerate(PROJECTIONS):
            shape = args.expert_shape(projection)
            dtype = layer.fields[3 * index + 1].dtype
            formats.add((*quantization(layer, projection, shape), dtype))
    return named_dtypes(formats | entry_formats(args.quantization, trunk))


def entry_formats(
    entry: Mapping[str, Any], trunk: Mapping[str, TensorInfo]
) -> set[tuple[int, int, str]]:
    """Return the formats of the trunk's matrices by config.json's "quantization"."""
    dtypes = {info.dtype for name, info in trunk.items() if name.endswith(".scales")}
    return {
        (found["bits"] or 4, found["group_size"] or 64, dtype)  # null stands for the default
        for found in (entry, *entry.values())
        if isinstance(found, Mapping) and {"bits", "group_size"} <= found.keys()
        for dtype in dtypes & {"BF16", "F16", "F32"}
    }


def named_dtypes(formats: set[tuple[int, int, str]]) -> set[Format]:
    """Return formats with MLX's names of dtypes."""
    return {(b, g, str(DTYPES[d]).split(".")[-1]) for b, g, d in formats}


def without_experts(headers: dict[str, tuple[Path, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the resident tensors among those of the headers."""
    return {name: info for name, (_, info) in headers.items() if not is_expert(name)}


def find_model(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return a local directory, after a download from the Hugging Face Hub if it is not local.

    Raises:
        FlashMoEError: it lacks config.json or weights, or the Hub does not deliver it.
    """
    path = Path(path_or_hub_id).expanduser()
    if not exists(path):
        if is_local(str(path_or_hub_id)):
            raise FlashMoEError(
                f"{path_or_hub_id}: no such directory.{_similar(path)} Give a model's directory, "
                "or its name on the Hugging Face Hub such as mlx-community/Qwen3.5-35B-A3B-4bit."
            )
        try:
            path = Path(
                snapshot_download(
                    str(path_or_hub_id), revision=revision, allow_patterns=DOWNLOAD_PATTERNS
                )
            )
        except Exception as error:
            raise FlashMoEError(
                f"{path_or_hub_id}: not a directory here.{_similar(path)} The Hugging Face Hub did "
                f"not deliver it ({type(error).__name__}: {str(error).splitlines()[0]}). Check the "
                "name, the revision and the network; a private or gated repository needs "
                "`hf auth login`."
            ) from error
    read_config(path)
    weight_files(path)
    if glob.has_magic(str(path)):
        raise FlashMoEError(
            f"{path}: mlx-lm cannot read a directory with *, ? or [ in its name. Rename it."
        )
    return path


def _similar(path: Path) -> str:
    """Return a question about a directory with a similar name, or nothing."""
    names = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {path.parent / found[0]}?" if found else ""


def load(
    path_or_hub_id: str | Path,
    *,
    expert_cache: int | str | None = None,
    io_threads: int | None = None,
    experts_per_token: int | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    revision: str | None = None,
    io_mode: str | None = None,
    verify: bool | None = None,
    lookahead: str | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load a model whose experts stream from disk, and its tokenizer.

    Args:
        path_or_hub_id: a directory that flashmoe-convert wrote, an unmodified MLX checkpoint of any
            mixture of experts that mlx-lm has, or the Hub name of either.
        expert_cache: memory for the experts of all layers together, in bytes or as "512MiB";
            "auto" (the default) depends on the available memory. If all fit, all are read now.
        io_threads: reader threads (default 8).
        experts_per_token: top-k instead of the checkpoint's.
        tokenizer_config: extra arguments for the tokenizer.
        model_config: entries that replace those of config.json.
        adapter_path: LoRA adapters to apply.
        lazy: read the trunk on first use, which must be in the thread that loads.
        revision: branch, tag or commit on the Hub.
        io_mode: "buffered" reads experts through the page cache, "direct" bypasses it; "auto" (the
            default) bypasses it if it could hold few of them.
        verify: compare every expert with its checksum after its read, before its use. Needs a
            converted directory.
        lookahead: on a CPU, "on" prefetches likely experts while the layer's attention runs; "off"
            waits for the router; "auto" (the default) times both and keeps the faster.

    Returns:
        (model, tokenizer), for mlx_lm's and this package's `generate` functions. `model.close()`,
        or the end of `with model:`, closes files and stops threads.

    Raises:
        FlashMoEError: a file is missing, damaged or unsupported, or a value is out of range.
    """
    if adapter_path is not None and not Path(adapter_path).is_dir():
        raise FlashMoEError(
            f"adapter_path = {adapter_path!r} is not a directory. Give one that mlx_lm.lora wrote."
        )
    path = find_model(path_or_hub_id, revision)
    config = read_config(path) | (model_config or {})
    if has_fast_path(config):
        ModelArgs.from_dict(config)  # before anything is allocated
    else:
        stock_modules(config)
    check_small_files(path)
    # Before MLX reads them: its errors about damaged files say less.
    check_readable(checkpoint_headers(path))
    classes = bound_classes(
        path,
        config,
        expert_cache=expert_cache,
        io_threads=io_threads,
        experts_per_token=experts_per_token,
        io_mode=io_mode,
        verify=verify,
        lookahead=lookahead,
    )
    with named(path, "its weights do not fit its config.json", REMEDY):
        model, config = load_model(
            path,
            True,  # `read_trunk` shows how far it is
            # Not the directory's shim: these classes carry the settings.
            model_config={**(model_config or {}), "model_file": None},
            get_model_classes=lambda config: classes,
        )
        if not lazy:
            read_trunk(model)
    try:
        if adapter_path is not None:
            with named(adapter_path, "adapters that do not fit this model", "Train them on it"):
                model = load_adapters(model, adapter_path)
                model.eval()
        # The bundled tokenizer's class is part of this package. Unset, transformers asks on stdin.
        trusted = {"trust_remote_code": path == BUNDLED_MODEL}
        with named(path, *TOKENIZER):
            tokenizer = load_tokenizer(
                path, trusted | (tokenizer_config or {}), eos_token_ids=config.get("eos_token_id")
            )
        check_use(path, tokenizer, vocabulary(model.args))
    except BaseException:
        model.close()
        raise
    return model, tokenizer


def read_trunk(model: nn.Module) -> None:
    """Read a lazily loaded model's parameters, and show how far it is."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    with bar(sum(array.nbytes for array in arrays), "B", "loading the trunk") as add:
        for start in range(0, len(arrays), READ_AT_ONCE):
            part = arrays[start : start + READ_AT_ONCE]
            mx.eval(part)
            add(sum(array.nbytes for array in part))


def check_tokenizer(directory: Path, vocab_size: int | None) -> None:
    """Check that a directory's tokenizer loads, without running code of that directory.

    Raises:
        FlashMoEError: it does not, or has tokens that the model lacks.
    """
    check_small_files(directory)
    with named(directory, *TOKENIZER):
        tokenizer = load_tokenizer(directory, {"trust_remote_code": False})
    check_use(directory, tokenizer, vocab_size)


def check_use(directory: Path, tokenizer: TokenizerWrapper, vocab_size: int | None) -> None:
    """Try a tokenizer, and refuse ids that MLX would read out of bounds or mlx-lm cannot print.

    Raises:
        FlashMoEError: it fails, or has such an id.
    """
    with named(directory, *TOKENIZER):
        tokenizer.decode(tokenizer.encode("Hello"))
        vocabulary = tokenizer.get_vocab()
        fast = getattr(tokenizer, "backend_tokenizer", None)
        # Added tokens may leave gaps between their ids.
        own = fast.get_vocab(with_added_tokens=False) if fast else {}
    token, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if vocab_size is not None and largest >= vocab_size:
        raise FlashMoEError(
            f"{directory}: its tokenizer maps {token!r} to id {largest}, but the model has "
            f"vocab_size = {vocab_size}. {REMEDY}."
        )
    known = set(vocabulary.values())
    numbers = range(max(own.values(), default=0))
    missing = next((number for number in numbers if number not in known), None)
    if missing is not None:
        raise FlashMoEError(f"{directory}: its tokenizer has no token for id {missing}. {REMEDY}.")
