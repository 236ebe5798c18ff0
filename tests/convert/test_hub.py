"""Conversions from the Hub, file by file: its real client, against a server on loopback."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest
from convert_helpers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    KILLER,
    LAYERS,
    Weights,
    contents,
    extras,
    flip,
    fused,
    make_config,
    make_weights,
    read,
    save,
    spell,
    write_tokenizer,
)
from hub_server import Fault, HubServer, commit
from huggingface_hub import constants, file_download, snapshot_download
from mlx_lm.convert import convert as stock_convert

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.source import hub, shards
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.convert.write import journal, output
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import read_header

MANIFEST = "model_experts/manifest.json"
JOURNAL = "model_experts/unfinished.json"
NAME = "owner/chain"
LAYER_BYTES = EXPERTS * 3 * INTERMEDIATE * HIDDEN * 9 // 16
FEW = 20_000  # bytes of the client's metadata and of the journal


def _layer(name: str) -> int:
    match = re.search(r"layers\.(\d+)", name)
    return int(match[1]) if match else -("embed" in name)


def save_chain(directory: Path, weights: Weights, limit: int) -> Path:
    """Write a checkpoint whose layers follow one another through its files, as on the Hub."""
    save(directory, make_config(), {})
    (directory / "model.safetensors").unlink()
    parts: list[Weights] = [{}]
    for name, value in sorted(weights.items(), key=lambda item: (_layer(item[0]), item[0])):
        if parts[-1] and value.nbytes + sum(part.nbytes for part in parts[-1].values()) > limit:
            parts.append({})
        parts[-1][name] = value
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model.safetensors-{number:05d}-of-{len(parts):05d}.safetensors"
        mx.save_safetensors(str(directory / file), part, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    weights = spell(fused(make_weights(make_config())), "model.language_model.") | extras()
    save_chain(root / "chain", weights, 400_000)
    convert(root / "chain", root / "whole", quantize=True)
    return root


@contextlib.contextmanager
def serving(root: Path, cache: Path) -> Iterator[HubServer]:
    """A server that this process's client uses as the Hub."""
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.add(NAME, root / "chain")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for key, value in {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, key, value)
        monkeypatch.setattr(hub, "WAITS", (0.0,) * 3)
        yield server


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[HubServer]:
    with serving(root, tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="module")
def half_done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that was interrupted at its fifth step."""
    folder, real, steps = tmp_path_factory.mktemp("half"), output.write_weights, []

    def write_weights(*arguments):
        steps.append(arguments)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with serving(root, folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_weights", write_weights)
        with pytest.raises(KeyboardInterrupt):
            convert(NAME, folder / "out", quantize=True)
    return folder / "out"


@pytest.fixture
def half(half_done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half_done, tmp_path / "half")


@pytest.fixture(scope="module")
def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "chain").glob("*.safetensors"))


@pytest.fixture(scope="module")
def sizes(root: Path, files: list[str]) -> dict[str, int]:
    return {name: (root / "chain" / name).stat().st_size for name in files}


def assert_same(root: Path, out: Path) -> None:
    """Equal to the conversion of the directory except for its name."""
    made, whole = contents(out), contents(root / "whole")
    assert made.pop("README.md") == hub_card(whole.pop("README.md"))
    old, new = (json.loads(c.pop(MANIFEST)) for c in (whole, made))
    assert made == whole
    assert new.pop("source") == {"repo": NAME, "revision": commit("a")} and old.pop("source")
    assert new.pop("manifest_checksum") and old.pop("manifest_checksum")
    assert new == old


def hub_card(card: bytes) -> bytes:
    """The card of a directory's conversion, changed to that of the same checkpoint on the Hub."""
    link = f"[{NAME}](https://huggingface.co/{NAME}) in a form"
    text = card.decode().replace("\nchain in a form", f"\n{link}")
    text = text.replace("made from | chain", f"made from | {NAME} at {commit('a')}")
    text = text.replace("--hf-path chain", f"--hf-path {NAME} --revision {commit('a')}")
    return text.replace("---\n", f"---\nbase_model: {NAME}\n", 1).encode()


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, while files are created and deleted."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


# --- what comes, and when it goes ----------------------------------------------------------------


def test_same_bytes_within_the_bound(root, server, sizes, tmp_path, monkeypatch):
    """Every file is downloaded once, and the disk holds the output and at most two of them."""
    out, held, total = tmp_path / "out", [], []

    def look(*arguments: object) -> None:
        held.append(on_disk(out / FOLDER))
        total.append(on_disk(out))

    def write_weights(*arguments, real=output.write_weights):
        look()
        entry = real(*arguments)
        look()
        return entry

    monkeypatch.setattr(output, "write_weights", write_weights)
    server.listener = look
    convert(NAME, out, quantize=True)
    assert_same(root, out)
    for name, size in sizes.items():
        assert size <= server.sent[name] <= size + hub.FIRST_BYTES
    *_, second, first = sorted(sizes.values())
    assert first < max(held) <= first + second + FEW
    assert max(total) <= on_disk(out) + first + second + FEW
    assert sum(sizes.values()) > 3 * (first + second)
    assert not (out / FOLDER).exists()


def test_dry_run_fetches_headers_only(root, server, files, sizes, tmp_path, capsys):
    convert(root / "chain", tmp_path / "out", quantize=True, dry_run=True)
    local = capsys.readouterr().out.splitlines()
    convert(NAME, tmp_path / "out", quantize=True, dry_run=True)
    rows = capsys.readouterr().out.splitlines()
    (fetching,) = (row for row in rows if row.startswith("to fetch"))
    rows.remove(fetching)
    assert rows[0].startswith(f"source      {NAME} (") and rows[1:-2] == local[1:-2]
    took = r"time +about \d+ s to compute on this machine, 1 s to fetch at 100 MB/s, plus disk time"
    assert re.fullmatch(took, rows[-1])
    assert fetching.startswith(f"to fetch    {len(files)} files, {sum(sizes.values()):,} bytes (")
    assert "; at once at most 2, " in fetching
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files)
    assert set(server.sent) - set(files) == {
        "config.json", "model.safetensors.index.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_code_that_it_did_not_run(root, server, files, tmp_path, capsys):
    """It names the repository's modules, and those of other repositories in its configuration."""
    source = shutil.copytree(root / "chain", tmp_path / "code")
    (source / "tokenizer_evil.py").write_text("raise SystemExit")
    (source / "processor_config.json").write_text('{"auto_map": {"A": "owner/name--evil.P"}}')
    server.add("owner/code", source)
    convert("owner/code", tmp_path / "out", quantize=True, dry_run=True)
    named = "tokenizer_evil.py, evil.py of owner/name. --trust-remote-code would run it;"
    assert f"\ncode        of owner/code: {named}" in capsys.readouterr().out
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files)
    convert("owner/code", tmp_path / "out", quantize=True, no_remote_code=True)
    assert [path.name for path in (tmp_path / "out").rglob("*.py")] == ["flashmoe_model.py"]
    assert (tmp_path / "out/processor_config.json").read_bytes() == b"{}"


@dataclass
class Usage:
    free: int


def test_room_for_the_output_and_what_is_held(root, server, tmp_path, monkeypatch, capsys):
    """With one byte too few, nothing is written."""
    convert(NAME, tmp_path / "out", quantize=True, dry_run=True)
    rows = capsys.readouterr().out
    figures = re.findall(r"at most 2, ([\d,]+) bytes|to write +([\d,]+) bytes", rows)
    needed = sum(int((a or b).replace(",", "")) for a, b in figures)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(FlashMoEError, match=r"needs 1.\d\d MB \(0.\d\d MB of them temporarily\)"):
        convert(NAME, tmp_path / "out", quantize=True)
    assert not (tmp_path / "out").exists()
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(needed))
    (tmp_path / "out").mkdir()  # it may be a mount point
    convert(NAME, tmp_path / "out", quantize=True)
    assert tmp_path / "out" in asked and tmp_path not in asked
    assert_same(root, tmp_path / "out")


def test_quantized_sources(root, server, tmp_path):
    """mlx-lm's output, and flashmoe-convert's, layer by layer."""
    stock_convert(str(root / "chain"), str(tmp_path / "stock"), quantize=True)
    for name, source in (("stock", tmp_path / "stock"), ("packed", root / "whole")):
        server.add(f"owner/{name}", source)
        local, out = tmp_path / f"{name}-local", tmp_path / f"{name}-out"
        convert(source, local, quantize=name == "packed", q_bits={"packed": 8}.get(name))
        convert(f"owner/{name}", out, quantize=name == "packed", q_bits={"packed": 8}.get(name))
        made, expected = contents(out), contents(local)
        for differs in (MANIFEST, "README.md"):
            assert made.pop(differs) != expected.pop(differs)
        assert made == expected


@pytest.mark.parametrize("cached", [False, True])
def test_the_model_card_comes_along(root, server, tmp_path, cached):
    """The licence in its front matter is kept. mlx-lm does not download the card to the cache."""
    shutil.copytree(root / "chain", tmp_path / "chain")
    (tmp_path / "chain/README.md").write_text("---\nlicense: mit\nbase_model: other/x\n---\n# It")
    server.add(NAME, tmp_path / "chain")
    if cached:
        snapshot_download(NAME, allow_patterns=list(hub.PATTERNS))
        server.reset()
    convert(NAME, tmp_path / "out", quantize=True)
    assert set(server.sent) == {"README.md"} or not cached
    assert server.asked["README.md"] == 1
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith(f"---\nbase_model: {NAME}\nlibrary_name: mlx\nlicense: mit\n")


def test_what_the_cache_has_is_used_and_stays(root, server, files, tmp_path, monkeypatch):
    server.add(NAME, root / "chain")
    convert(NAME, tmp_path / "kept", quantize=True, keep_source=True)
    assert_same(root, tmp_path / "kept")
    cache = tmp_path / "cache"
    before = contents(cache)
    assert {path.split("/")[-1] for path in before} >= {*files, "config.json"}
    server.reset()
    convert(NAME, tmp_path / "online", quantize=True)
    assert not server.sent
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        convert(NAME, tmp_path / "offline", quantize=True)
    for name in ("online", "offline"):
        assert_same(root, tmp_path / name)
    assert contents(cache) == before
    (snapshot,) = (path.parent for path in cache.rglob(files[2]))
    os.unlink((snapshot / files[2]).resolve())
    os.unlink(snapshot / files[2])
    before = contents(cache)
    convert(NAME, tmp_path / "partly", quantize=True)
    assert_same(root, tmp_path / "partly")
    assert contents(cache) == before
    assert [name for name in files if server.sent[name] > hub.FIRST_BYTES] == [files[2]]


# --- what goes wrong on the way ------------------------------------------------------------------


def test_faults_that_pass(root, server, files, sizes, tmp_path, capfd):
    """A dropped connection resumes at its offset; refusals and wrong bytes are retried."""
    data = (root / "chain" / files[3]).read_bytes()
    right, wrong = Fault("etag", "2" * 64, "HEAD"), data[:-1] + bytes([data[-1] ^ 1])
    server.faults |= {
        NAME: [Fault("status", 503)],
        "config.json": [Fault("bytes", b"{}")],
        files[0]: [Fault("status", 503), Fault("status", 502, "HEAD")],
        files[1]: [Fault("drop", 5000), Fault("drop", sizes[files[1]] - 1000)],
        files[2]: [Fault("etag", "0" * 64, "HEAD"), Fault("etag", "1" * 64)],
        files[3]: [right, Fault("bytes", wrong), Fault("bytes", data[:-10]), Fault("status", 429)],
    }
    convert(NAME, tmp_path / "out", quantize=True)
    assert_same(root, tmp_path / "out")
    assert not any(server.faults.values())
    assert (
        server.sent[files[1]] == sizes[files[1]] + 5000 + hub.FIRST_BYTES
    )  # no byte is sent twice
    told = capfd.readouterr().err
    assert f"{NAME}: Server error '503 Service Unavailable'" in told
    assert re.search(
        rf"{NAME}: {files[3]}: received {len(data):,} bytes with checksum \w+, exp", told
    )


def test_connections_that_stall(root, server, files, sizes, tmp_path, monkeypatch):
    """Timeouts apply to the list, a header, the ETag, and the rest of a file."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    server.faults |= {
        NAME: [Fault("stall", 0)],
        files[0]: [Fault("stall", 0), Fault("stall", 0, "HEAD")],
        files[1]: [Fault("stall", 5000), Fault("stall", sizes[files[1]] - 1000)],
    }
    convert(NAME, tmp_path / "out", quantize=True)
    assert_same(root, tmp_path / "out")
    assert not any(server.faults.values()) and not server.outwaited
    assert (
        server.sent[files[1]] == sizes[files[1]] + 5000 + hub.FIRST_BYTES
    )  # no byte is sent twice


def test_a_busy_server_sets_the_wait(root, server, files, tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    server.faults |= {
        files[0]: [Fault("busy", {"Retry-After": "7"})],
        files[1]: [Fault("busy", {"RateLimit": '"resolvers";r=0;t=123'})],
        files[2]: [Fault("busy", {"Retry-After": "99999"})],
        files[3]: [Fault("busy", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})],
    }
    convert(NAME, tmp_path / "out", quantize=True, dry_run=True)
    assert not any(server.faults.values())
    assert sorted(waited) == [0, 7, 123, hub.LONGEST_WAIT]


@pytest.mark.parametrize("kind", ["bytes", "status", "gone"])
def test_faults_that_stay(root, server, files, tmp_path, kind):
    """The error names the file, no wrong bytes stay on disk, and the same command resumes later."""
    out, file = tmp_path / "out", files[5]
    fault, reason = {
        "bytes": (
            Fault("bytes", (root / "chain" / file).read_bytes()[::-1]),
            "with checksum .*, expected",
        ),
        "status": (Fault("status", 500), "500 Internal Server Error"),
        "gone": (Fault("status", 404), "404 Not Found"),
    }[kind]
    begun = Fault("etag", "2" * 64, "HEAD")  # after the header was read
    server.faults[file] = [begun, *[fault] * 100]
    with pytest.raises(FlashMoEError, match=rf"did not deliver {file} of .*{reason}.* to resume"):
        convert(NAME, out, quantize=True)
    assert (out / JOURNAL).exists() and not (out / MANIFEST).exists()
    assert not list((out / FOLDER).rglob(f"*{file}")) and len(server.faults[file]) > 90
    server.faults.clear()
    server.reset()
    convert(NAME, out, quantize=True)
    assert_same(root, out)
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files[:3])  # they are packed


def test_full_disk(root, server, files, tmp_path, monkeypatch):
    """The error says so, and the same command resumes once there is space."""
    out, real, fetched = tmp_path / "out", file_download.http_get, []

    def http_get(url, temp_file, **options):
        fetched.append(url)
        if url.endswith(files[5]):
            temp_file.write(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(url, temp_file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", http_get)
        with pytest.raises(FlashMoEError, match=r"\(No space left on device\). Free some space. R"):
            convert(NAME, out, quantize=True)
    assert len([url for url in fetched if url.endswith(files[5])]) == 1  # not retried
    assert not (out / MANIFEST).exists()
    convert(NAME, out, quantize=True)
    assert_same(root, out)


def test_names_that_do_not_exist(server, tmp_path, capsys):
    """Not retried; the error has a remedy; nothing is written."""
    for arguments in (["--model", "owner/none"], ["--model", NAME, "--revision", "nowhere"]):
        out = tmp_path / "out"
        assert main([*arguments, "-q", "--mlx-path", str(out)]) == 2
        told = capsys.readouterr().err
        assert (
            "did not deliver it (" in told and "404 Not Found" in told and "retrying in" not in told
        )
        assert "Check the name, --revision and the network" in told
        assert not out.exists()


def test_names_of_files_that_lead_elsewhere(root, server, tmp_path):
    """Files of other folders, above all outside the repository, are not downloaded."""
    lfs = {"sha256": "0" * 64, "size": 9, "pointerSize": 1}
    names = ("../model.safetensors", "/model.safetensors", "onnx/model.safetensors", "a/../x.json")
    server.listing = [{"rfilename": n, "size": 9, "blobId": "0" * 40, "lfs": lfs} for n in names]
    convert(NAME, tmp_path / "out", quantize=True)
    assert_same(root, tmp_path / "out")
    server.listing = [{"rfilename": "model-x.safetensors", "size": None, "blobId": None}]
    with pytest.raises(FlashMoEError, match=r"no size and checksum of model-x.safetensors"):
        convert(NAME, tmp_path / "out2", quantize=True)


# --- going on ------------------------------------------------------------------------------------


def environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def test_killed_while_a_file_comes(root, server, files, sizes, tmp_path):
    """Half of a file is on disk and is deleted; packed files are not downloaded again."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flashmoe_mlx.convert.cli", "--model", NAME, "-q"]
    process = subprocess.Popen(
        [*command, "--mlx-path", str(out)], env=environment(server, tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def kill(file: str, sent: int) -> None:
        if file == files[6] and sent > 100_000:
            process.kill()

    server.listener = kill
    assert process.wait() == -signal.SIGKILL
    assert (out / JOURNAL).exists()
    assert list((out / FOLDER).rglob("*.incomplete"))
    held: list[int] = []
    server.listener = lambda file, sent: held.append(on_disk(out / FOLDER))
    server.reset()
    convert(NAME, out, quantize=True)
    assert_same(root, out)
    *_, second, first = sorted(sizes.values())
    assert max(held[1:]) <= first + second + FEW
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files[:5])


@pytest.mark.parametrize("content", ["right", "wrong", "holes", "no ranges"])
def test_half_a_file_is_resumed(root, server, half, files, content):
    """The client never resumes the file that it left when it was killed; we do."""
    name = next(f for f in files if not (half / FOLDER / f).exists() and f > files[4])
    data = (root / "chain" / name).read_bytes()
    left = half / FOLDER / ".cache/huggingface/download"
    checksum = hashlib.sha256(data).hexdigest()
    for path, size in ((f"x.{checksum}.0123abcd", 200_000), (f"y.{'0' * 64}.0123abcd", 1000)):
        (left / f"{path}.incomplete").write_bytes(
            {"wrong": bytes(size), "holes": b""}.get(content, data[:size])
        )
        if content == "holes":
            os.truncate(left / f"{path}.incomplete", size)
    server.reset()
    server.faults[name] = [Fault("drop", 5000)]  # of the header
    if content == "no ranges":
        server.faults[name] += [Fault("etag", "0" * 64), Fault("plain", True)]
    convert(NAME, half, quantize=True)
    assert_same(root, half)
    rest = len(data) - 200_000
    came = {"right": rest, "wrong": rest + len(data)}.get(content, len(data))
    assert server.sent[name] == 5000 + hub.FIRST_BYTES + came


def test_killed_anywhere(root, server, tmp_path):
    """At system calls of every kind; threads make them, so their order varies from run to run."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER, NAME], env=environment(server, tmp_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout

    def killed_at(call: int, out: Path) -> str:
        print(call, out, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    for point in random.Random(5).sample(range(40, 700), 3):  # of nearly a thousand
        out = tmp_path / f"killed-at-{point}"
        assert killed_at(point, out) == str(int(signal.SIGKILL))
        assert not (out / MANIFEST).exists()
        convert(NAME, out, quantize=True)
        assert_same(root, out)
    process.communicate("")


@pytest.mark.parametrize("name", ["write_manifest", "remove_journal"])
def test_stopped_at_the_end(root, server, half, files, name, monkeypatch):
    """The downloads are deleted by then, and none is downloaded again."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr({"write_manifest": output, "remove_journal": journal}[name], name, stop)
        convert(NAME, half, quantize=True)
    assert not (half / FOLDER).exists()
    server.reset()
    convert(NAME, half, quantize=True)
    assert_same(root, half)
    assert all(server.sent[file] <= hub.FIRST_BYTES for file in files)


def test_a_branch_that_moved_is_refused(root, server, half, tmp_path):
    """Two commits are not mixed; --revision finishes the first."""
    shutil.copytree(root / "chain", tmp_path / "later")
    server.add(NAME, tmp_path / "later", "b")
    before = f"source {NAME} {commit('a')}, not {NAME} {commit('b')}"
    with pytest.raises(FlashMoEError, match=rf"{before}. Give --revision {commit('a')} to fin"):
        convert(NAME, half, quantize=True)
    convert(NAME, half, quantize=True, revision=commit("a"))
    assert_same(root, half)


@pytest.mark.parametrize("damage", ["gone", "byte", "short", "entry"])
def test_partial_files_that_changed_are_written_again(root, server, half, damage):
    path = half / "model.safetensors.tmp"
    entry = read(half / JOURNAL)["files"]["model.safetensors"]
    assert any(entry["written"]) and not all(entry["written"])
    if damage == "gone":
        path.unlink()
    elif damage == "byte":
        flip(path, next(place for place, byte in enumerate(path.read_bytes()) if byte))
    elif damage == "short":
        os.truncate(path, 5000)
    else:
        text = (half / JOURNAL).read_text().replace('"written": ["', '"written": ["0", "')
        (half / JOURNAL).write_text(text)
    convert(NAME, half, quantize=True)
    assert_same(root, half)


def test_a_dry_run_reports_what_is_left(root, server, half, sizes, capsys):
    convert(NAME, half, quantize=True, dry_run=True)
    text = capsys.readouterr().out
    (fetch, left) = re.search(r"to fetch +(\d+) files[^$]*to write +([\d,]+) by", text).groups()
    assert 0 < int(fetch) < len(sizes)
    begun = read(half / JOURNAL)["files"]
    trunk = read_header(root / "whole/model.safetensors")
    written = zip(trunk.values(), begun["model.safetensors"]["written"], strict=True)
    done = sum(tensor.nbytes for tensor, checksum in written if checksum)
    done += sum(LAYER_BYTES for name in begun if name.startswith("model_experts/"))
    total = sum(tensor.nbytes for tensor in trunk.values()) + LAYERS * LAYER_BYTES
    assert int(left.replace(",", "")) == total - done


# --- repair --------------------------------------------------------------------------------------


def test_repair_fetches_only_what_differs(root, server, files, sizes, tmp_path):
    out = shutil.copytree(root / "whole", tmp_path / "out")
    layer = out / "model_experts/layer_02.safetensors"
    flip(layer, layer.stat().st_size - 100)
    command = ["verify", str(out), "--repair", "--hf-path"]
    server.faults[files[4]] = [Fault("status", 503)]
    assert main([*command, NAME]) == 0
    assert contents(out) == contents(root / "whole")
    record = 3 * 2 * 128 * 64
    assert sum(server.sent[name] for name in files) <= len(files) * hub.FIRST_BYTES + record
    assert contents(tmp_path / "cache") == {}
    flip(out / "model.safetensors", 9000)
    assert main([*command, NAME]) == 0
    assert contents(out) == contents(root / "whole")


def test_repair_is_refused_other_bytes(root, server, tmp_path, capsys):
    out = shutil.copytree(root / "whole", tmp_path / "out")
    weights = spell(fused(make_weights(make_config(), seed=8)), "model.language_model.")
    server.add("owner/other", save_chain(tmp_path / "other", weights, 900_000))
    layer = out / "model_experts/layer_02.safetensors"
    flip(layer, layer.stat().st_size - 100)
    assert main(["verify", str(out), "--repair", "--hf-path", "owner/other"]) == 2
    assert "owner/other: gives model_experts/layer_02.safetensors" in capsys.readouterr().err


# --- one rank of several -------------------------------------------------------------------------

RANK = {"quantize": True, "ranks": 2, "rank": 1}
OTHERS = LAYERS * EXPERTS // 2 * 3 * INTERMEDIATE * HIDDEN * 2  # bytes of another rank's experts


def without_source(out: Path) -> dict[str, bytes]:
    """Contents apart from where they came from."""
    found = {name: data for name, data in contents(out).items() if name != "README.md"}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["source"], manifest["manifest_checksum"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


@pytest.mark.parametrize("gap", [1, shards.GAP_BYTES])
def test_a_rank_fetches_only_its_experts(root, server, files, sizes, tmp_path, monkeypatch, gap):
    """Unless its gaps cost more requests than they save bytes, as in these small files."""
    monkeypatch.setattr(shards, "GAP_BYTES", gap)
    monkeypatch.setattr(hub, "PIECE_BYTES", 50_000)
    convert(root / "chain", tmp_path / "local", **RANK)
    server.faults[files[2]] = [Fault("drop", 9), Fault("drop", 9)]  # the header, and a range
    convert(NAME, tmp_path / "out", **RANK)
    assert without_source(tmp_path / "out") == without_source(tmp_path / "local")
    assert not (tmp_path / "out" / FOLDER).exists()
    headers = sum(min(hub.FIRST_BYTES, size) for size in sizes.values())
    left_out = sum(sizes.values()) + headers - sum(server.sent[name] for name in files)
    assert left_out == pytest.approx(OTHERS if gap == 1 else 0, abs=FEW)


def test_a_rank_resumes_with_the_ranges_on_disk(root, server, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "GAP_BYTES", 1)
    real, out, steps = output.write_weights, tmp_path / "out", []

    def write_weights(*arguments):
        steps.append(arguments)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_weights", write_weights)
        with pytest.raises(KeyboardInterrupt):
            convert(NAME, out, **RANK)
    held = {path.name for path in (out / FOLDER).glob("*.safetensors")}
    assert held
    server.reset()
    convert(NAME, out, **RANK, dry_run=True)
    fetched = re.search(r"to fetch +\d+ files, ([\d,]+) bytes", capsys.readouterr().out)
    looked = sum(server.sent[name] for name in files)
    server.reset()
    (begun,) = (name for name in files[-2:-1] if name not in held)
    (out / FOLDER / f"{begun}.half").write_bytes(b"the begin of a killed download")
    convert(NAME, out, **RANK)
    assert sum(server.sent[name] for name in files) - looked == int(fetched[1].replace(",", ""))
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in held)
    convert(root / "chain", tmp_path / "local", **RANK)
    assert without_source(out) == without_source(tmp_path / "local")


def test_snapshots_of_the_real_client(root, server, tmp_path):
    """The server speaks enough of the API for the client's own download of everything."""
    path = snapshot_download(NAME)
    assert contents(Path(path)) == contents(root / "chain")
