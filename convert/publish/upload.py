"""`--upload-repo`: publish a converted directory on the Hugging Face Hub.

Checks run before the conversion begins. The manifest is uploaded last, as on disk, so that a
partial upload is recognized as unfinished.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR
from ..plan.parts import flags
from ..source.hub import CARD, MAX_REASON, WEIGHTS, causes, reason, retry, status_of
from ..verify.verify import entries, read_checksums
from ..write.journal import JOURNAL, locked
from .card import PLACE
from .published import LAST, check_listed, own_card, unlisted

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
SILENCE_S = 60.0  # a large commit takes long to answer
NONSENSE = AttributeError, LookupError, TypeError, ValueError
MESSAGE = "Upload a model whose experts are read from disk by flashmoe-mlx"


@contextmanager
def client_timeout() -> Iterator[None]:
    """Give the Hub's client a timeout; its default is to wait forever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY  # the library has no getter

    def client() -> Any:
        made = make()
        made.timeout = SILENCE_S
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(make)


def _why(error: Exception) -> str:
    """Return the Hub's reason, or that its answer makes no sense."""
    *_, first = causes(error)
    is_answer = getattr(first, "response", None) is not None  # a refusal may be a ValueError
    if isinstance(first, NONSENSE) and not is_answer:
        return f"its answer makes no sense: {type(first).__name__}: {reason(error)}"
    return reason(error)


def _failure(repo: str, what: str, error: Exception, remedy: str) -> FlashMoEError:
    why = _why(error)
    return FlashMoEError(f"--upload-repo {repo}: the Hugging Face Hub {what} ({why}). {remedy}")


def check_repo(repo: str, private: bool | None) -> None:
    """Check that the user's token may write to OWNER/NAME, and that its visibility fits.

    Raises:
        FlashMoEError: the name, the visibility or the token is missing or wrong.
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
    if private is None:
        raise FlashMoEError(
            f"--upload-repo {repo}: who may see it? Add --private (you, or your organization) or "
            "--public (everybody)."
        )
    if not get_token():
        raise FlashMoEError(f"--upload-repo {repo}: no token for the Hugging Face Hub. {LOG_IN}")
    try:
        user = retry(repo, HfApi().whoami, 2)
        name, role = user["name"], user.get("auth", {}).get("accessToken", {}).get("role")
        owners = {name, *(org["name"] for org in user.get("orgs", ()))}
        if not all(isinstance(owner, str) for owner in owners):
            raise TypeError("a name is not a string")
    except Exception as error:  # a dozen kinds: network, invalid tokens
        raise _failure(repo, "does not know whose token this is", error, LOG_IN) from error
    if role in ("read", "write"):  # the Hub alone knows the rights of fine-grained tokens
        if owner not in owners:
            raise FlashMoEError(
                f"--upload-repo {repo}: the token is {name}'s, who is not a member of {owner}. "
                f"Give {name}/NAME, or use another token."
            )
        if role == "read":
            raise FlashMoEError(
                f"--upload-repo {repo}: the token may only read. Create a write token at "
                "https://huggingface.co/settings/tokens."
            )
    _check_existing(repo, private)


def _check_existing(repo: str, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        found = retry(repo, partial(HfApi().model_info, repo), 2).private
    except Exception as error:  # a dozen kinds
        if status_of(error) in (401, 403, 404):
            return  # it does not exist, or the token cannot see it; `_create` decides
        what = "does not say whether it exists"
        raise _failure(repo, what, error, "Check the network.") from error
    if found is not None:
        _check_visibility(repo, private, found)


def _check_visibility(repo: str, private: bool, found: object) -> None:
    """Refuse a repository that is public though the user asked for private, or the reverse.

    `found` is the Hub's answer, or None if it has none.
    """
    if (found is True) == private or (found is None and not private):
        return
    is_, flag = ("public", "--private") if private else ("private", "--public")
    raise FlashMoEError(
        f"--upload-repo {repo}: the repository exists and is {is_}, but {flag} was given. Give "
        f"--{is_}, another name, or change it at https://huggingface.co/{repo}/settings."
    )


def check_card(repo: str, card: bytes) -> None:
    """Let the Hub check a model card's front matter; raises FlashMoEError if it refuses it."""
    from huggingface_hub import ModelCard

    try:
        retry(repo, partial(ModelCard(card.decode()).validate, "model"), 2)
    except ValueError as error:
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub does not take the model card "
            f"({' '.join(str(error).split())[:MAX_REASON]}). Correct the front matter of the "
            f"source's {CARD}."
        ) from error
    except Exception as error:  # a dozen kinds
        raise _failure(repo, "cannot check the model card", error, "Check the network.") from error


def is_finished(out: Path) -> bool:
    """Whether the directory holds a finished conversion."""
    return (out / LAST).is_file() and not (out / EXPERT_DIR / JOURNAL).exists()


def check_finished(out: Path, made: dict[str, Any]) -> None:
    """Refuse a finished conversion of another source or options, or with missing files.

    Args:
        out: its directory.
        made: source, options and placement to expect in the manifest.
    """
    manifest = read_checksums(out)
    for key, now in made.items():
        if manifest.get(key) != now:
            raise FlashMoEError(
                f"{out}: exists already, made with {key} {_shown(manifest.get(key))}, not "
                f"{_shown(now)}. Give the same, or another --mlx-path."
            )
    for name, entry in entries(manifest).items():
        path = out / name
        if not path.is_file() or (name.endswith(WEIGHTS) and path.stat().st_size != entry["size"]):
            raise FlashMoEError(
                f"{path}: missing, or not of {entry['size']} bytes. Run flashmoe-convert verify "
                f"{out} before you upload it."
            )


def _shown(made: dict[str, Any] | None) -> str:
    if made is None:
        return "none"
    return flags(made) if "quantize" in made else " ".join(map(str, made.values()))


def upload(out: Path, repo: str, private: bool, card: bytes) -> None:
    """Upload what the manifest lists, and the card; files that arrived before are not sent again.

    Args:
        out: the directory.
        repo: OWNER/NAME, created if necessary.
        private: its visibility.
        card: the model card, unless the directory has one.

    Raises:
        FlashMoEError: a file differs from the manifest, or the Hub refuses or cannot be reached.
    """
    with locked(out):
        names = check_listed(out)
        card = (own_card(out) or card).replace(
            f"--model {PLACE} ".encode(), f"--model {repo} ".encode()
        )
        if others := unlisted(out, names):
            print(f"Not uploaded, because the manifest does not list it: {others}")
        try:
            _create(repo, private)
            _upload(out, repo, names, card)
        except FlashMoEError:
            raise
        except Exception as error:  # a dozen kinds: network, permissions, quotas
            raise FlashMoEError(
                f"{out}: is finished, but its upload to {repo} failed ({_why(error)}). Run the "
                "same command again to resume it."
            ) from error


def _upload(out: Path, repo: str, names: set[str], card: bytes) -> None:
    """Upload the files, check that the Hub lists them, then upload card and manifest."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    send = partial(
        api.upload_folder,
        repo_id=repo,
        folder_path=out,
        allow_patterns=[escape(name) for name in sorted(names)],
        commit_message=MESSAGE,
    )
    retry(repo, send)
    found = {file.rfilename for file in retry(repo, partial(api.model_info, repo)).siblings or ()}
    if found and (missing := sorted(names - found)):
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hub took the upload but does not list {missing[0]} "
            f"({len(missing)} of {len(names)} files are missing). Delete .gitignore in the "
            "repository, if it has one, and run the same command again."
        )

    def finish() -> None:
        last = [CommitOperationAdd(CARD, card), CommitOperationAdd(LAST, out / LAST)]
        api.create_commit(repo, last, commit_message=f"{MESSAGE}: the manifest, which comes last")

    retry(repo, finish)


def _create(repo: str, private: bool) -> None:
    """Create the repository, or check the visibility of the existing one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        retry(repo, partial(api.create_repo, repo, private=private))
    except HfHubHTTPError as error:
        if status_of(error) not in (401, 402, 403, 409):  # otherwise it may exist
            raise
        try:
            found = retry(repo, partial(api.model_info, repo)).private
        except HfHubHTTPError:
            raise error from None
        _check_visibility(repo, private, found)
