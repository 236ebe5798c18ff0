"""Faults of the network, the disk and the names: what passes is retried, what stays is named."""

import errno
import re

import pytest
from hub_helpers import (
    JOURNAL,
    MANIFEST,
    NAME,
    assert_same,
)
from hub_server import Fault
from huggingface_hub import constants, file_download

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.source import hub
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.errors import FlashMoEError


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
