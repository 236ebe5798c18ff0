"""Find a checkpoint: a local directory, or a repository of the Hugging Face Hub."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST
from ...format.model_files import is_local
from .checkpoint import INDEX
from .foreign_code import CODE, CONFIGS
from .hub import CARD, CONNECTIONS, PATTERNS, WEIGHTS, Repo, find_repo, reason

TO_PLAN = ("config.json", INDEX, f"{EXPERT_DIR}/{MANIFEST}")


@dataclass(frozen=True)
class Found:
    """A checkpoint.

    Attributes:
        directory: its files.
        commit: its commit, if it came from the Hub.
        repo: set if `directory` holds outlines of the weight files (the header, then a hole);
            `repo` has their data.
    """

    directory: Path
    commit: str | None = None
    repo: Repo | None = None


@contextmanager
def located(
    path_or_repo: str, revision: str | None, plan_only: bool = False, whole: bool = False
) -> Iterator[Found]:
    """Yield the checkpoint; a repository's outlines are deleted after the block.

    Args:
        path_or_repo: a directory, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        plan_only: skip files that a plan does not need.
        whole: download the whole repository into the Hub's cache instead of outlines.

    Raises:
        FlashMoEError: the directory does not exist, or the Hub does not deliver.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise FlashMoEError(
                f"--revision {revision} has no effect on the local directory {path}. Drop it."
            )
        yield Found(path)
        return
    if path.exists() or is_local(path_or_repo) or "/" not in path_or_repo:
        raise FlashMoEError(
            f"{path_or_repo}: not a directory. Give a checkpoint's directory, or its name on the "
            "Hugging Face Hub such as Qwen/Qwen3.5-35B-A3B."
        )
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as temporary:
        try:
            found = _from_hub(path_or_repo, revision, Path(temporary), plan_only, whole)
        except FlashMoEError:
            raise
        except Exception as error:  # a dozen kinds: network, names, permissions, disk
            raise FlashMoEError(
                f"{path_or_repo}: not a local directory, and the Hugging Face Hub did not deliver "
                f"it ({reason(error)}). Check the name, --revision and the network; a private or "
                "gated repository needs `hf auth login`."
            ) from error
        yield found


def _from_hub(name: str, revision: str | None, folder: Path, plan_only: bool, whole: bool) -> Found:
    from huggingface_hub import hf_hub_download  # slow to import, seldom needed

    if whole:
        return _snapshot(name, revision)
    try:
        repo = find_repo(name, revision)
    except Exception as error:
        try:
            return _snapshot(name, revision, local_files_only=True)
        except Exception:
            raise error from None
    cached = [repo.cached(file) for file in repo.files if file != CARD]
    if all(cached) and (config := repo.cached("config.json")):
        if CARD in repo.files and not repo.cached(CARD):  # mlx-lm does not download it
            hf_hub_download(name, CARD, revision=repo.commit)
        return Found(config.parent, repo.commit)
    return _outlined(repo, folder, plan_only)


def _snapshot(name: str, revision: str | None, local_files_only: bool = False) -> Found:
    from huggingface_hub import snapshot_download

    patterns = [*PATTERNS, CARD]
    path = snapshot_download(
        name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
    )
    return Found(Path(path), Path(path).name)


def _outlined(repo: Repo, folder: Path, plan_only: bool) -> Found:
    """Fill `folder` with a repository's small files and outlines of its weight files."""

    def fetch(name: str) -> None:
        if name.endswith(WEIGHTS):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as outline:
                outline.write(repo.header(name))
                outline.truncate(repo.files[name].size)
        elif not plan_only or name in TO_PLAN or name.endswith(CODE) or fnmatchcase(name, CONFIGS):
            repo.download(name, folder)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, repo.files))
    return Found(folder, repo.commit, repo)
