"""`--upload-repo`: publish a converted directory on the Hugging Face Hub.

What can be refused is refused before the conversion begins. The manifest goes last, as it does on
disk; so who downloads half an upload is told that it is unfinished.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR
from ..plan.parts import flags
from ..source.hub import CARD, MAX_REASON, WAITS, WEIGHTS, causes, patiently, reason
from ..verify.verify import entries, read_checksums
from ..write.journal import JOURNAL, locked
from .card import PLACE
from .published import LAST, left_out, listed, own_card

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
SILENCE_S = 60.0  # without a byte, after which a connection is given up; a large commit takes long
NONSENSE = AttributeError, LookupError, TypeError, ValueError
MESSAGE = "Upload a model whose experts are read from disk by flashmoe-mlx"


@dataclass(frozen=True)
class Destination:
    """Where to upload to: OWNER/NAME, and whether others are not to see it."""

    repo: str
    private: bool

    def __str__(self) -> str:
        """Return both."""
        return f"{self.repo} ({'private' if self.private else 'public'})"


@contextmanager
def impatient() -> Iterator[None]:
    """Give the Hub's client a timeout: of itself it waits for an answer without limit."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY  # which the library does not tell otherwise

    def client() -> Any:
        made = make()
        made.timeout = SILENCE_S
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(make)


def said(error: BaseException) -> str:
    """Return what the Hub said, or that its answer makes no sense."""
    *_, first = causes(error)
    is_answer = getattr(first, "response", None) is not None  # a refusal, which may be a ValueError
    if isinstance(first, NONSENSE) and not is_answer:
        return f"its answer makes no sense: {type(first).__name__}: {reason(error)}"
    return reason(error)


def check_repo(repo: str, private: bool | None) -> Destination:
    """Check a repository's name, and that the user's token may write there; return both.

    Args:
        repo: OWNER/NAME.
        private: whether others are not to see it; None if the user did not say.

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
    if private is None:
        raise FlashMoEError(
            f"--upload-repo {repo}: who may see it? Add --private (you, or your organization) or "
            "--public (everybody)."
        )
    if not get_token():
        raise FlashMoEError(f"--upload-repo {repo}: no token for the Hugging Face Hub. {LOG_IN}")
    try:
        name, role, owners = _who(patiently(repo, HfApi().whoami, WAITS[:2]))
    except Exception as error:  # a dozen kinds: network, a token that is none
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub does not know whose token this is "
            f"({said(error)}). {LOG_IN}"
        ) from error
    _check_rights(repo, owner, name, role, owners)
    _check_seen(repo, private)
    return Destination(repo, private)


def _who(user: dict[str, Any]) -> tuple[str, str | None, set[str]]:
    """Return a token's owner, its role, and whose repositories the owner may write to."""
    name, role = user["name"], user.get("auth", {}).get("accessToken", {}).get("role")
    owners = {name, *(org["name"] for org in user.get("orgs", ()))}
    if not all(isinstance(owner, str) for owner in owners):
        raise TypeError("a name that is no text")
    return name, role, owners


def _check_rights(repo: str, owner: str, name: str, role: str | None, owners: set[str]) -> None:
    if role not in ("read", "write"):  # one of fine grain, of which only the Hub knows the rights
        return
    if owner not in owners:
        raise FlashMoEError(
            f"--upload-repo {repo}: the token is {name}'s, who is not a member of {owner}. Give "
            f"{name}/NAME, or another token."
        )
    if role == "read":
        raise FlashMoEError(
            f"--upload-repo {repo}: the token may only read. Make one that may write, at "
            "https://huggingface.co/settings/tokens."
        )


def _check_seen(repo: str, private: bool) -> None:
    """Check that a repository that is there is as private as it is to be."""
    from huggingface_hub import HfApi

    try:
        found = patiently(repo, partial(HfApi().model_info, repo), WAITS[:2]).private
    except Exception as error:  # a dozen kinds
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
            return  # it is not there, or the token does not see it; the upload will tell
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub does not say whether it is there "
            f"({said(error)}). Check the network."
        ) from error
    if found is not None:
        _agree(repo, private, found)


def _agree(repo: str, private: bool, found: object) -> None:
    """Refuse to publish in a repository that others see although they should not, or the reverse.

    Args:
        repo: OWNER/NAME, which is there.
        private: as the user wants it.
        found: as the Hub has it; None if it does not say.
    """
    if (found is True) == private or (found is None and not private):
        return
    is_, flag = ("public", "--private") if private else ("private", "--public")
    raise FlashMoEError(
        f"--upload-repo {repo}: the repository is there and {is_}, so {flag} does not fit. Give "
        f"--{is_}, another name, or change it at https://huggingface.co/{repo}/settings."
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
            f"({' '.join(str(error).split())[:MAX_REASON]}). Correct the front matter of the "
            f"source's {CARD}."
        ) from error
    except Exception as error:  # a dozen kinds
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hugging Face Hub cannot check the model card "
            f"({said(error)}). Check the network."
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


def card_of(out: Path, card: bytes) -> bytes:
    """Return the model card to publish: the directory's, which may be edited, or what it gets."""
    return own_card(out) or card


def upload(out: Path, to: Destination, card: bytes) -> None:
    """Create the repository if it is not there, and upload what the manifest lists, and the card.

    What an upload that was broken off brought there is not sent again.

    Args:
        out: the directory.
        to: where to.
        card: its model card, in case that it has none.

    Raises:
        FlashMoEError: a file is not what the manifest says, or the Hub refuses, or cannot be
            reached.
    """
    with locked(out):
        names = listed(out)
        card = card_of(out, card).replace(
            f"--model {PLACE} ".encode(), f"--model {to.repo} ".encode()
        )
        if others := left_out(out, names):
            print(f"Left out, because the manifest does not list it: {others}")
        try:
            _create(to.repo, to.private)
            _upload(out, to.repo, names, card)
        except FlashMoEError:
            raise
        except Exception as error:  # a dozen kinds: network, permissions, quotas
            raise FlashMoEError(
                f"{out}: is whole, but its upload to {to.repo} was broken off ({said(error)}). Run "
                "the same command again to go on with it."
            ) from error


def _upload(out: Path, repo: str, names: set[str], card: bytes) -> None:
    """Send the files, see that they are there, and then send card and manifest."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    send = partial(
        api.upload_folder,
        repo_id=repo,
        folder_path=out,
        allow_patterns=[escape(name) for name in sorted(names)],
        commit_message=MESSAGE,
    )
    patiently(repo, send)
    _check_arrived(repo, names)

    def finish() -> None:
        last = [CommitOperationAdd(CARD, card), CommitOperationAdd(LAST, out / LAST)]
        api.create_commit(repo, last, commit_message=f"{MESSAGE}: the manifest, which comes last")

    patiently(repo, finish)


def _create(repo: str, private: bool) -> None:
    """Make the repository, or see that it is there and as private as it is to be."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        patiently(repo, partial(api.create_repo, repo, private=private))
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 402, 403, 409):  # else it may be there
            raise
        try:
            found = patiently(repo, partial(api.model_info, repo)).private
        except HfHubHTTPError:
            raise error from None
        _agree(repo, private, found)


def _check_arrived(repo: str, names: set[str]) -> None:
    """Check that the Hub lists every file; a .gitignore there keeps some out without a word."""
    from huggingface_hub import HfApi

    info = patiently(repo, partial(HfApi().model_info, repo))
    found = {file.rfilename for file in info.siblings or ()}
    if found and (missing := sorted(names - found)):
        raise FlashMoEError(
            f"--upload-repo {repo}: the Hub took the upload but does not list {missing[0]} "
            f"({len(missing)} of {len(names)} files are missing). Delete .gitignore in the "
            "repository, if it has one, and run the same command again."
        )
