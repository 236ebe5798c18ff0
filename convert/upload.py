"""`--upload-repo`: publish a converted directory on the Hugging Face Hub.

What can be refused is refused before the conversion begins. The manifest goes last, as it does on
disk; so who downloads half an upload is told that it is unfinished.
"""

from functools import partial
from pathlib import Path
from typing import Any

from flashmoe_mlx.convert.card import PLACE
from flashmoe_mlx.convert.hub import CARD, WAITS, WEIGHTS, patiently, reason
from flashmoe_mlx.convert.journal import JOURNAL, locked
from flashmoe_mlx.convert.parts import flags
from flashmoe_mlx.convert.verify import entries, read_checksums
from flashmoe_mlx.convert.write import TEMPORARY
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.layout import EXPERT_DIR, MANIFEST

LAST = f"{EXPERT_DIR}/{MANIFEST}"
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


def check_repo(repo: str) -> None:
    """Check a repository's name, and that the user's token may write there.

    Raises:
        FlashMoEError: the name is none, there is no token, or it is not good for this.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        owner, _ = repo.split("/")
    except ValueError:
        raise FlashMoEError(
            f"--upload-repo {repo}: not the name of a repository. Give OWNER/NAME, of letters, "
            "digits, and single '-', '_' or '.' between them."
        ) from None
    if not get_token():
        raise FlashMoEError(f"--upload-repo {repo}: no token for the Hugging Face Hub. {LOG_IN}")
    try:
        user = patiently(repo, HfApi().whoami, WAITS[:2])
    except Exception as error:  # a dozen kinds: network, a token that is none
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub does not know whose token this is "
            f"({reason(error)}). {LOG_IN}"
        ) from error
    _check_rights(repo, owner, user)


def _check_rights(repo: str, owner: str, user: dict[str, Any]) -> None:
    name, role = user.get("name"), user.get("auth", {}).get("accessToken", {}).get("role")
    if role not in ("read", "write"):  # one of fine grain, of which only the Hub knows the rights
        return
    if owner not in (name, *(org.get("name") for org in user.get("orgs", ()))):
        raise FlashMoEError(
            f"--upload-repo {repo}: the token is {name}'s, who is not a member of {owner}. Give "
            f"{name}/NAME, or another token."
        )
    if role == "read":
        raise FlashMoEError(
            f"--upload-repo {repo}: the token may only read. Make one that may write, at "
            "https://huggingface.co/settings/tokens."
        )


def check_card(repo: str, card: bytes) -> None:
    """Have the Hub check a model card's front matter.

    Raises:
        FlashMoEError: it refuses it, or cannot be asked.
    """
    from huggingface_hub import ModelCard

    try:
        patiently(repo, partial(ModelCard(card.decode()).validate, "model"), WAITS[:2])
    except ValueError as error:
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub does not take the model card "
            f"({' '.join(str(error).split())}). Correct the front matter of the source's {CARD}."
        ) from error
    except Exception as error:  # a dozen kinds
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub cannot check the model card "
            f"({reason(error)}). Check the network."
        ) from error


def is_finished(out: Path) -> bool:
    """Say whether a conversion ended here."""
    return (out / LAST).is_file() and not (out / EXPERT_DIR / JOURNAL).exists()


def check_finished(out: Path, made: dict[str, Any]) -> None:
    """Check that a finished conversion is the one that was asked for, and that no file is missing.

    Args:
        out: its directory.
        made: source and options, as the manifest has them.

    Raises:
        FlashMoEError: it is another one, or files are missing or of another size.
    """
    manifest = read_checksums(out)
    for key, now in made.items():
        if manifest[key] != now:
            raise FlashMoEError(
                f"{out}: exists already, made with {key} {_shown(manifest[key])}, not "
                f"{_shown(now)}. Give the same again to upload it, or another --mlx-path."
            )
    for name, entry in entries(manifest).items():
        path = out / name
        if not path.is_file() or (name.endswith(WEIGHTS) and path.stat().st_size != entry["size"]):
            raise FlashMoEError(
                f"{path}: missing, or not of {entry['size']} bytes. Run flashmoe-convert verify "
                f"{out} before you upload it."
            )


def _shown(made: dict[str, Any]) -> str:
    return flags(made) if "quantize" in made else " ".join(map(str, made.values()))


def upload(out: Path, repo: str, card: bytes) -> None:
    """Create the repository if it is not there, and upload a whole conversion.

    What an upload that was broken off brought there is not sent again.

    Args:
        out: the directory.
        repo: OWNER/NAME.
        card: its model card, in case that it has none.

    Raises:
        FlashMoEError: the Hub refuses, or cannot be reached.
    """
    try:
        with locked(out):
            text = (out / CARD).read_bytes() if (out / CARD).is_file() else card
            text = text.replace(f"--model {PLACE} ".encode(), f"--model {repo} ".encode())
            patiently(repo, partial(_upload, out, repo, text))
    except FlashMoEError:
        raise
    except Exception as error:  # a dozen kinds: network, permissions, quotas
        raise FlashMoEError(
            f"{out}: is whole, but its upload to {repo} was broken off ({reason(error)}). Run the "
            "same command again to go on with it."
        ) from error


def _upload(out: Path, repo: str, card: bytes) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    message = "Upload a model whose experts are read from disk by flashmoe-mlx"
    api.upload_folder(
        repo_id=repo,
        folder_path=out,
        ignore_patterns=["*" + TEMPORARY, CARD, LAST],
        commit_message=message,
    )
    last = [CommitOperationAdd(CARD, card), CommitOperationAdd(LAST, out / LAST)]
    api.create_commit(repo, last, commit_message=f"{message}: the manifest, which comes last")
