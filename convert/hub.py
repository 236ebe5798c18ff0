"""Find a checkpoint: a local directory, or a repository of the Hugging Face Hub."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashmoe_mlx.errors import FlashMoEError

# What mlx-lm downloads.
PATTERNS = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja",
)  # fmt: skip


@contextmanager
def located(
    path_or_repo: str, revision: str | None, headers_only: bool
) -> Iterator[tuple[Path, str | None]]:
    """Yield the checkpoint's directory and, if it came from the Hub, its commit.

    With `headers_only`, a repository is not downloaded: the directory lasts as long as the block,
    and its weight files are outlines, with a header but no data.

    Raises:
        FlashMoEError: there is no such directory, or the Hub does not deliver.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise FlashMoEError(
                f"--revision {revision} has no effect on the local directory {path}. Drop it."
            )
        yield path, None
        return
    if path.exists() or path_or_repo.startswith(("/", ".", "~")) or path_or_repo.count("/") != 1:
        raise FlashMoEError(
            f"{path_or_repo}: not a directory. Give a checkpoint's directory, or its name on the "
            "Hugging Face Hub such as Qwen/Qwen3.5-35B-A3B."
        )
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as temporary:
        try:
            fetch = _outline if headers_only else _download
            found = fetch(path_or_repo, revision, Path(temporary))
        except Exception as error:  # a dozen kinds: network, names, permissions, disk
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FlashMoEError(
                f"{path_or_repo}: not a local directory, and the Hugging Face Hub did not deliver "
                f"it ({reason}). Check the name, --revision and the network."
            ) from error
        yield found


def _download(repo: str, revision: str | None, temporary: Path) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download  # slow to import, seldom needed

    snapshot = snapshot_download(repo, revision=revision, allow_patterns=list(PATTERNS))
    return Path(snapshot), Path(snapshot).name


def _outline(repo: str, revision: str | None, temporary: Path) -> tuple[Path, str]:
    """Rebuild the weight files' headers, which cost kilobytes, over holes in place of the data."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    config = Path(hf_hub_download(repo, "config.json", revision=revision))
    (temporary / "config.json").write_bytes(config.read_bytes())
    metadata = get_safetensors_metadata(repo, revision=revision)
    for name, file in metadata.files_metadata.items():
        header = {
            key: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for key, t in file.tensors.items()
        }
        size = max((t.data_offsets[1] for t in file.tensors.values()), default=0)
        text = json.dumps(header).encode()
        with open(temporary / Path(name).name, "wb") as outline:
            outline.write(len(text).to_bytes(8, "little") + text)
            outline.truncate(8 + len(text) + size)
    return temporary, config.parent.name
