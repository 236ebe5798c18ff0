"""What an upload publishes, its visibility, and a Hub that answers nonsense."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from convert_helpers import contents, flip, read
from test_upload import REPO, assert_uploaded, command, refused
from test_upload import server as server
from upload_server import UploadServer

from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.publish import upload
from flashmoe_mlx.convert.source import hub
from flashmoe_mlx.convert.write.output import write_manifest

MANIFEST = "model_experts/manifest.json"
SECRET = b"the key to everything"


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A finished conversion, and a secret beside it."""
    (tmp_path / "secret").write_bytes(SECRET)
    yield shutil.copytree(root / "packed", tmp_path / "out")


def published(server: UploadServer) -> bytes:
    return b"".join(data for repo in server.repos.values() for data in repo.values())


# --- what the manifest lists, and nothing else ---------------------------------------------------


def put_file(out: Path) -> None:
    (out / ".env").write_bytes(SECRET)


def put_notes(out: Path) -> None:
    (out / "notes.txt").write_bytes(SECRET)


def put_weights(out: Path) -> None:
    (out / "model-extra.safetensors").write_bytes(SECRET)


def put_hidden_folder(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git/config").write_bytes(SECRET)


def put_folder(out: Path) -> None:
    (out / "model_experts/old").mkdir()
    (out / "model_experts/old/layer_00.safetensors").write_bytes(SECRET)


def put_temporary(out: Path) -> None:
    (out / "model_experts/layer_00.safetensors.tmp").write_bytes(SECRET)


def put_link(out: Path) -> None:
    os.symlink(out.parent / "secret", out / "vocab.txt")


def put_linked_folder(out: Path) -> None:
    os.symlink(out.parent, out / "more")


def put_pipe(out: Path) -> None:
    os.mkfifo(out / "merges.txt")


LEFT_OUT = [
    (put_file, ".env"), (put_notes, "notes.txt"), (put_weights, "model-extra.safetensors"),
    (put_hidden_folder, ".git/config"), (put_temporary, "model_experts/layer_00.safetensors.tmp"),
    (put_folder, "model_experts/old/layer_00.safetensors"), (put_link, "vocab.txt"),
    (put_linked_folder, "more"), (put_pipe, "merges.txt"),
]  # fmt: skip


def test_other_files_are_not_uploaded_but_named(root, out, server, capsys):
    for put, _ in LEFT_OUT:
        put(out)
    expected = contents(root / "packed").keys()
    assert main(command(root, out)) == 0
    assert server.repos[REPO].keys() == expected and SECRET not in published(server)
    names = ", ".join(sorted(name for _, name in LEFT_OUT))
    printed = f"Not uploaded, because the manifest does not list it: {names}\n"
    assert capsys.readouterr().out == f"{printed}Uploaded: https://huggingface.co/{REPO}\n"


def test_many_names_and_names_that_are_made_to_be_printed(root, out, server, capsys):
    (out / "a\x1b[2J\n").write_bytes(SECRET)
    for number in range(20):
        (out / f"b{number}").write_bytes(SECRET)
    assert main(command(root, out)) == 0
    (printed, _) = capsys.readouterr().out.splitlines()
    assert (
        printed.isprintable()
        and printed.endswith("and 11 more")
        and "'a\\x1b[2J\\n', b0" in printed
    )


def link(name: str) -> Callable[[Path], None]:
    """Put a symlink out of the directory in a file's place, to a file of the same content."""

    def change(out: Path) -> None:
        shutil.move(out / name, out.parent / "moved")
        os.symlink(out.parent / "moved", out / name)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).unlink()
        os.mkfifo(out / name)

    return change


def altered(name: str) -> Callable[[Path], None]:
    return lambda out: flip(out / name, (out / name).stat().st_size // 2)


def rewrite_shim(out: Path) -> None:
    """With the altered file's checksums in the manifest, as an attacker can write them."""
    text = b"import os\n"
    (out / "flashmoe_model.py").write_bytes(text)
    relist(out, "flashmoe_model.py", "flashmoe_model.py", text)


def name_another_model_file(out: Path) -> None:
    text = json.dumps(read(out / "config.json") | {"model_file": "tokenizer_evil.py"}).encode()
    (out / "config.json").write_bytes(text)
    relist(out, "config.json", "config.json", text)


def list_a_secret(out: Path) -> None:
    (out / ".env").write_bytes(SECRET)
    relist(out, "tokenizer.json", ".env", SECRET)


def list_a_pickle(out: Path) -> None:
    (out / "x.bin").write_bytes(SECRET)
    relist(out, "tokenizer.json", "x.bin", SECRET)


def unlist_a_pipe(name: str) -> Callable[[Path], None]:
    """Put a pipe in the place of a file that the manifest no longer lists."""

    def change(out: Path) -> None:
        manifest = read(out / MANIFEST)
        del manifest["manifest_checksum"]
        manifest["files"] = [entry for entry in manifest["files"] if entry["file"] != name]
        write_manifest(out, manifest)
        pipe(name)(out)

    return change


def relist(out: Path, name: str, new: str, text: bytes) -> None:
    manifest = read(out / MANIFEST)
    del manifest["manifest_checksum"]
    (entry,) = (entry for entry in manifest["files"] if entry["file"] == name)
    entry |= {"file": new, "size": len(text), "checksum": f"{zlib.crc32(text):08x}"}
    write_manifest(out, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link("tokenizer.json"), "tokenizer.json: a symlink out of the directory, to "),
        (link("model.safetensors"), "model.safetensors: a symlink out of the directory, to "),
        (link("model_experts"), ".safetensors: a symlink out of the directory, to "),
        (link(MANIFEST), "manifest.json: a symlink out of the directory, to "),
        (link("README.md"), "README.md: a symlink out of the directory, to "),
        (pipe("README.md"), "README.md: missing, or not a regular file."),
        (pipe("tokenizer.json"), "tokenizer.json: missing, or not of "),
        (altered("flashmoe_model.py"), "out: flashmoe_model.py: file differs ("),
        (altered("tokenizer.json"), "out: tokenizer.json: file differs ("),
        (altered("model.safetensors"), "out: model.safetensors: tensor "),
        (altered("model_experts/layer_02.safetensors"), "layer_02.safetensors: layer 2 expert "),
        (rewrite_shim, "flashmoe_model.py: not the two lines that flashmoe-convert writes, or "),
        (name_another_model_file, "or not what config.json names as model_file. Convert again."),
        (unlist_a_pipe("config.json"), "config.json: not a regular file. Convert again."),
        (unlist_a_pipe("flashmoe_model.py"), "flashmoe_model.py: not a regular file. Convert"),
        (list_a_secret, "manifest.json: lists '.env', which flashmoe-convert does not write."),
        (list_a_pickle, "manifest.json: lists 'x.bin', which flashmoe-convert does not write."),
        (lambda out: (out / "README.md").write_bytes(b"\xff"), "README.md: not UTF-8 ("),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(root, out, server, capsys, change, message):
    change(out)
    assert message in refused(capsys, command(root, out))
    assert not server.repos and not server.stored


def test_a_symlink_within_the_directory_is_uploaded(root, out, server):
    (out / "tokenizer.json").rename(out / "real.json")
    os.symlink("real.json", out / "tokenizer.json")
    assert main(command(root, out)) == 0
    assert server.repos[REPO].keys() == contents(root / "packed").keys()
    assert server.repos[REPO]["tokenizer.json"] == (out / "real.json").read_bytes()


# --- who may see it ------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_private_or_public(root, out, server, private):
    flag = "--private" if private else "--public"
    assert main(command(root, out, flag)) == 0
    assert server.private[REPO] is private
    assert main(command(root, out, flag)) == 0  # it exists now


def test_neither_or_both_or_without_an_upload(root, out, server, capsys):
    arguments = [word for word in command(root, out) if word != "--public"]
    line = refused(capsys, arguments)
    assert "--upload-repo alice/tiny: who may see it? Add --private (" in line
    assert "or --public (everybody)." in line
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--private", "--public"])
    assert "--public: not allowed with argument --private" in capsys.readouterr().err
    for flag in ("--private", "--public"):
        line = refused(capsys, [*arguments[:-2], flag])
        assert "--private and --public have no effect without --upload-repo. Add it," in line
    assert not server.asked


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_repository_of_the_other_visibility(root, out, server, capsys, private, late):
    """Also one that is created between the first check and the upload."""
    server.repos[REPO], server.private[REPO] = {}, not private
    flag, is_ = ("--private", "public") if private else ("--public", "private")
    if late:
        server.refuse = {f"/api/models/{REPO}": [404]}
    line = refused(capsys, command(root, out, flag))
    assert f"the repository exists and is {is_}, but {flag} was given. Give --{is_}," in line
    assert server.repos[REPO] == {} and not server.stored


# --- a Hub that answers nonsense -----------------------------------------------------------------

HTML = (200, "text/html", b"<html><body>Sign in to this network</body></html>")
NONSENSE = [
    HTML, (500, *HTML[1:]), (404, *HTML[1:]), (200, "application/json", b"[]"),
    (200, "application/json", b'{"name": [1], "auth": 5, "siblings": 3, "files": {}, "url": 7}'),
    (200, "application/json", b"null"), (200, "application/json", b"\xff\xfe"),
    (200, "truncated", b'{"name": "al'), (200, "silent", None),
]  # fmt: skip
PLACES = (
    "/api/whoami", "/api/validate-yaml", "/api/repos/create", "/api/models/alice/tiny/preupload",
    "/alice/tiny.git/info/lfs", "/put/", "/api/models/alice/tiny/commit",
)  # fmt: skip
BY_STATUS = "/api/validate-yaml", "/put/"  # the client reads the status only


@pytest.mark.parametrize("place", PLACES)
def test_nonsense_ends_in_one_sentence_and_loses_nothing(
    root, out, server, capsys, monkeypatch, place
):
    """For any answer of the Hub, or none; the same command then resumes."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own retries
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(upload, "SILENCE_S", 0.02)
        patch.setattr(hub, "WAITS", ())
        for status, kind, content in NONSENSE:
            if place in BY_STATUS and status == 200 and kind not in ("truncated", "silent"):
                continue
            server.nonsense = {place: (status, kind, content)}
            line = refused(capsys, command(root, out))
            assert len(line) < 1000 and line.isprintable() and REPO in line
            assert contents(out) == before and MANIFEST not in server.repos.get(REPO, {})
    server.nonsense = {}
    assert main(command(root, out)) == 0
    assert_uploaded(server, out)


def test_a_hub_that_takes_all_and_keeps_less(root, out, server, capsys):
    """A .gitignore in the repository makes the Hub drop files silently."""
    server.dropped = {"model.safetensors"}
    line = refused(capsys, command(root, out))
    assert "does not list model.safetensors (1 of " in line and "Delete .gitignore in" in line
    assert MANIFEST not in server.repos[REPO]
    server.dropped = set()
    assert main(command(root, out)) == 0
    assert_uploaded(server, out)


def test_the_client_waits_without_limit_for_others(root, out, server):
    """An upload restores the Hub client's settings."""
    from huggingface_hub import get_session

    assert main(command(root, out)) == 0
    assert get_session().timeout.read is None
