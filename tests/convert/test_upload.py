"""`--upload-repo`: the Hub's real client, against a server on loopback."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_helpers import contents, flip
from huggingface_hub import constants
from upload_server import TOKEN, USER, UploadServer

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.publish import upload
from flashmoe_mlx.convert.source import hub
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.convert.write import output
from flashmoe_mlx.errors import FlashMoEError

REPO = "alice/tiny"
LAST = "model_experts/manifest.json"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[UploadServer]:
    """A server that this process's client uses as the Hub, and a logged-in user."""
    with UploadServer() as server:
        for key, value in {
            "ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, key, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub, "WAITS", (0.0,) * 2)
        yield server


def command(root: Path, out: Path, *more: str) -> list[str]:
    given = ["--hf-path", str(root / "stock"), "--mlx-path", str(out), "--upload-repo", REPO]
    return [*given, *(() if {"--private", "--public"} & {*more} else ["--public"]), *more]


def assert_uploaded(server: UploadServer, out: Path, repo: str = REPO) -> None:
    """All files arrived; the card names the repository, and the manifest is last."""
    expected = contents(out)
    card = expected["README.md"]
    assert b"--model DIR " in card
    expected["README.md"] = card.replace(b"--model DIR ", b"--model %s " % repo.encode())
    assert server.repos[repo] == expected
    assert sorted(server.commits[-1]) == ["README.md", LAST]
    assert not any(LAST in files for files in server.commits[:-1])


def refused(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("flashmoe-convert: error: ")
    return line


def test_converted_and_uploaded(root, server, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(root, out)) == 0
    assert capsys.readouterr().out == f"Uploaded: https://huggingface.co/{REPO}\n"
    assert_uploaded(server, out)
    assert verify(out) == []
    convert(root / "stock", tmp_path / "alone")
    assert contents(tmp_path / "alone") == contents(out)


def test_a_finished_conversion_is_uploaded_as_it_is(root, server, tmp_path, monkeypatch):
    """To an organization; the user's edits of the card stay."""
    out = tmp_path / "out"
    convert(root / "stock", out)
    card = (out / "README.md").read_text() + "Mine.\n"
    (out / "README.md").write_text(card)
    monkeypatch.setattr(output, "write_weights", None)
    convert(root / "stock", out, upload_repo="team/tiny", private=False)
    assert_uploaded(server, out, "team/tiny")
    assert server.repos["team/tiny"]["README.md"].endswith(b"Mine.\n")
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("status", [0, 403, 500])
@pytest.mark.parametrize("where", ["/put/", "/api/models/alice/tiny/commit/"])
def test_a_failed_upload_resumes(root, server, tmp_path, capsys, status, where, monkeypatch):
    """The same command resumes: no file is written again, and complete ones are not sent again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own retries
    out = tmp_path / "out"
    convert(root / "stock", out)
    before = contents(out)
    server.refuse = {where: [403] if status == 403 else [status] * 99}
    line = refused(capsys, command(root, out))
    assert f"out: is finished, but its upload to {REPO} failed (" in line
    assert line.endswith("Run the same command again to resume it.")
    assert LAST not in server.repos[REPO] and contents(out) == before
    came = set(server.stored)
    assert came or where == "/put/"
    server.refuse = {}
    server.puts.clear()
    assert main(command(root, out)) == 0
    assert_uploaded(server, out)
    assert not came & set(server.puts) and contents(out) == before


def test_a_fault_that_passes_is_not_seen(root, server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.refuse = {"/put/": [0, 500], "/api/models/alice/tiny/commit/": [500, 0]}
    convert(root / "stock", tmp_path / "out", upload_repo=REPO, private=False)
    assert_uploaded(server, tmp_path / "out")


def test_interrupted(root, server, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            upload, "_upload", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main(command(root, out)) == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to resume\n")
    assert main(command(root, out)) == 0
    assert_uploaded(server, out)


def test_nothing_is_uploaded_of_a_conversion_that_fails(root, server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_manifest", full)
    with pytest.raises(FlashMoEError, match="No space left"):
        convert(root / "stock", tmp_path / "out", upload_repo=REPO, private=False)
    assert not server.repos


def test_uploading_again_changes_nothing(root, server, tmp_path):
    convert(root / "stock", tmp_path / "out", upload_repo=REPO, private=False)
    commits = len(server.commits)
    convert(root / "stock", tmp_path / "out", upload_repo=REPO, private=False)
    assert len(server.commits) == commits


def test_dry_run(root, server, tmp_path, capsys):
    assert main(command(root, tmp_path / "out", "--dry-run")) == 0
    assert capsys.readouterr().out.endswith(f"to upload   {REPO} (public)\n")
    assert not server.repos and not (tmp_path / "out").exists()


# --- what is refused before the conversion begins ------------------------------------------------


@pytest.mark.parametrize(
    ("token", "user", "message"),
    [
        ("", {}, "no token for the Hugging Face Hub. Log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_other", {}, "does not know whose token this is (Client error '401 Unauthorized'"),
        (TOKEN, {"auth": {"accessToken": {"role": "read"}}}, "the token may only read. Create a"),
        (TOKEN, {"name": "bob", "orgs": []}, "the token is bob's, who is not a member of alice."),
    ],
)
def test_tokens(root, server, tmp_path, capsys, monkeypatch, token, user, message):
    monkeypatch.setenv("HF_TOKEN", token)
    server.user = USER | user
    line = refused(capsys, command(root, tmp_path / "out"))
    assert f"--upload-repo {REPO}: " in line and message in line
    assert not (tmp_path / "out").exists() and not server.repos


def test_the_hub_judges_tokens_of_fine_grain(root, server, tmp_path):
    server.user = USER | {"orgs": [], "auth": {"accessToken": {"role": "fineGrained"}}}
    convert(root / "stock", tmp_path / "out", upload_repo="team/tiny", private=False)
    assert_uploaded(server, tmp_path / "out", "team/tiny")


def test_a_hub_that_cannot_be_reached(root, server, tmp_path, capsys):
    server.refuse = {"/api/whoami": [0] * 99}
    line = refused(capsys, command(root, tmp_path / "out"))
    assert "the Hugging Face Hub does not know whose token this is (" in line
    assert not (tmp_path / "out").exists()


def test_a_card_that_the_hub_refuses(root, server, tmp_path, capsys):
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    (source / "README.md").write_text("---\nlicense: my own\n---\n")
    line = refused(capsys, command(tmp_path, tmp_path / "out"))
    assert 'does not take the model card (- Error: "license" must not be my own)' in line
    assert not (tmp_path / "out").exists() and not server.repos


def test_another_conversion_is_there(root, server, tmp_path, capsys):
    out = tmp_path / "out"
    convert(root / "stock", out)
    line = refused(capsys, command(root, out, "-q", "--q-bits", "2"))
    assert "out: exists already, made with options none, not -q --q-bits 2. Give the same" in line
    shutil.copytree(root / "stock", tmp_path / "other/copy")
    line = refused(capsys, ["--hf-path", str(tmp_path / "other/copy"), *command(root, out)[2:]])
    assert "out: exists already, made with source stock, not copy. Give the same, or" in line
    assert not server.repos


@pytest.mark.parametrize("gone", ["tokenizer.json", "model_experts/layer_01.safetensors"])
def test_a_conversion_with_missing_files(root, server, tmp_path, capsys, gone):
    out = tmp_path / "out"
    convert(root / "stock", out)
    (out / gone).unlink()
    assert f"{out / gone}: missing, or not of " in refused(capsys, command(root, out))
    shutil.rmtree(out)
    convert(root / "stock", out)
    flip(out / LAST, 40)
    refused(capsys, command(root, out))
    assert not server.repos
