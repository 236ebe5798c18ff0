"""From a directory to a model: `bind` for stock mlx-lm's `model_file`, `load` for Python."""

from .requirements import check_mlx

check_mlx()  # before the packages are imported

import difflib
import glob
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from .binding import bound_classes, has_fast_path
from .errors import FlashMoEError, named
from .format.headers import checkpoint_headers, weight_files
from .format.json_file import exists
from .format.model_files import check_small_files, is_local, read_config
from .models.patch import stock_modules, vocabulary
from .models.qwen3_5.args import ModelArgs
from .models.qwen3_5.model import Model
from .models.trunk_checks import REMEDY, check_readable
from .progress import bar

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
    with bar(sum(array.nbytes for array in arrays), "B", "loading the trunk") as progress:
        for start in range(0, len(arrays), READ_AT_ONCE):
            part = arrays[start : start + READ_AT_ONCE]
            mx.eval(part)
            progress.update(sum(array.nbytes for array in part))


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
