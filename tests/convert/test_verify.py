"""Verification reads every byte and names what differs; repair restores it."""

import errno
import json
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest
from convert_helpers import EXPERTS, LAYERS, contents, flip, read
from verify_helpers import CARD, DATA, LAYER, MANIFEST, RECORD, assert_repaired, found

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.verify import repair, verify
from flashmoe_mlx.convert.write import files as write_files
from flashmoe_mlx.convert.write.output import write_manifest
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.layout import open_layout, read_manifest, record_checksums
from flashmoe_mlx.format.names import FIELDS


def test_an_untouched_directory_has_no_problems(root, capsys):
    assert main(["verify", str(root / "whole")]) == 0
    assert capsys.readouterr().out == f"{root / 'whole'}: every byte is as it was written.\n"


def test_checksums_of_parts_give_that_of_the_whole():
    chances = random.Random(1)
    parts = [chances.randbytes(chances.choice((0, 1, 7, 1000, 65536))) for _ in range(50)]
    whole = write_files.joined((zlib.crc32(part), len(part)) for part in parts)
    assert whole == zlib.crc32(b"".join(parts))
    assert write_files.joined([]) == zlib.crc32(b"") == 0


def test_the_manifest_has_the_checksum_of_every_file(root):
    entries = verify.entries(read(root / "whole" / MANIFEST))
    written = contents(root / "whole")
    assert entries.keys() == written.keys() - {MANIFEST, CARD}
    for name, entry in entries.items():
        assert (entry["size"], entry["checksum"]) == (
            len(written[name]), f"{zlib.crc32(written[name]):08x}",
        )  # fmt: skip


def test_record_checksums_match_the_records(root):
    manifest = read_manifest(root / "whole" / MANIFEST)
    checksums = record_checksums(manifest)
    data = (root / "whole" / LAYER).read_bytes()
    assert [len(layer) for layer in checksums] == [EXPERTS] * LAYERS
    assert checksums[2][5] == zlib.crc32(data[DATA + 5 * RECORD : DATA + 6 * RECORD])
    for change in ({"checksum": "md5"}, {"layers": 3}, {"layers": [{"records": ["x"]}]}):
        with pytest.raises(FlashMoEError, match=r"no checksum for every expert .* Convert"):
            record_checksums(manifest | change)


def test_every_byte_of_every_kind_of_file_counts(root, out):
    """One flipped bit anywhere is found; 12 places in each file, its first and last byte."""
    chances = random.Random(2)
    files = {name: data for name, data in contents(root / "whole").items() if name != CARD}
    for name, data in files.items():
        for place in (0, len(data) - 1, *(chances.randrange(len(data)) for _ in range(10))):
            flip(out / name, place, 1 << chances.randrange(8))
            if name == MANIFEST:
                with pytest.raises(
                    FlashMoEError, match=r"manifest.json: (damaged|altered|not a|not JSON|f)"
                ):
                    verify.verify(out)
            else:
                (problem,) = verify.verify(out)
                assert problem.file == name and "differs" in problem.text
            (out / name).write_bytes(data)
    assert found(out) == []
    (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(FlashMoEError, match=r"manifest.json: altered since it was written"):
        verify.verify(out)


@pytest.mark.parametrize("field", FIELDS)
def test_layer_expert_and_tensor_are_named(out, field):
    expert = 3
    tensor = read_header(out / LAYER)[f"experts.{expert}.{field}"]
    flip(out / LAYER, tensor.offset + tensor.nbytes - 1)
    start = DATA + expert * RECORD
    (line,) = found(out)
    assert line.startswith(
        f"{LAYER}: layer 2 expert 3 {field} differs (bytes {start} to {start + RECORD}: checksum "
    )


def test_tensors_of_the_trunk_are_named(out):
    for name, tensor in list(read_header(out / "model.safetensors").items())[::7]:
        flip(out / "model.safetensors", tensor.offset)
        (line,) = found(out)
        assert line.startswith(f"model.safetensors: tensor {name} differs (bytes {tensor.offset} ")
        flip(out / "model.safetensors", tensor.offset)


def test_truncated_extended_missing(root, out):
    size = (out / LAYER).stat().st_size
    os.truncate(out / LAYER, size - 7)
    with open(out / "model.safetensors", "ab") as file:
        file.write(b"\0")
    (out / "tokenizer.json").unlink()
    trunk = (root / "whole/model.safetensors").stat().st_size
    assert found(out) == [
        f"model.safetensors: extended: {trunk + 1} bytes long, {trunk} were written",
        "tokenizer.json: missing",
        f"{LAYER}: truncated: {size - 7} bytes long, {size} were written",
    ]
    assert_repaired(root, out)


def test_swapped_layer_files(root, out):
    first, second = (out / f"model_experts/layer_0{n}.safetensors" for n in (1, 3))
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)
    open_layout(out, LAYERS, EXPERTS)  # whose headers are the same
    assert found(out) == [
        "model_experts/layer_01.safetensors: holds the experts of layer 3 instead of its own",
        "model_experts/layer_03.safetensors: holds the experts of layer 1 instead of its own",
    ]
    assert_repaired(root, out)


def test_swapped_experts(root, out):
    data = bytearray((out / LAYER).read_bytes())
    start = DATA + RECORD
    data[start : start + 2 * RECORD] = (
        data[start + RECORD : start + 2 * RECORD] + data[start : start + RECORD]
    )
    (out / LAYER).write_bytes(data)
    one, two = found(out)
    assert "layer 2 expert 1 gate_proj.weight, " in one and "bytes of layer 2 expert 2" in one
    assert "layer 2 expert 2 gate_proj.weight, " in two and "bytes of layer 2 expert 1" in two
    assert_repaired(root, out)


def test_edited_header(root, out):
    data = (out / LAYER).read_bytes()
    swapped = data.replace(b"experts.2.up_proj.scales", b"experts.2.up_proj.biases", 1)
    (out / LAYER).write_bytes(swapped)
    (line,) = found(out)
    assert line.startswith(f"{LAYER}: header differs (bytes 0 to {DATA}: checksum ")
    assert_repaired(root, out)


def test_a_bad_sector(root, out, monkeypatch):
    """The unreadable expert is named, and all others are read."""
    real, inode = os.preadv, (out / LAYER).stat().st_ino

    def preadv(file, buffers, offset, *flags):
        size = sum(len(buffer) for buffer in buffers)
        bad = DATA + 4 * RECORD + 100
        if os.fstat(file).st_ino == inode and offset <= bad < offset + size:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, buffers, offset, *flags)

    flip(out / LAYER, DATA + 7 * RECORD)
    monkeypatch.setattr(os, "preadv", preadv)
    problems = verify.verify(out)
    monkeypatch.undo()
    assert [(problem.layer, problem.expert) for problem in problems] == [(2, 4), (2, 7)]
    assert f"layer 2 expert 4: {out / LAYER}: unreadable (Input/o" in str(problems[0])
    assert repair.repair(out, problems, root / "hf") == []
    assert contents(out) == contents(root / "whole")


def test_an_unlisted_weight_file(root, out):
    shutil.copy(out / "model.safetensors", out / "model-extra.safetensors")
    problems = verify.verify(out)
    line = "model-extra.safetensors: not in the manifest, but mlx-lm would load it; remove it"
    assert [str(problem) for problem in problems] == [line]
    assert repair.repair(out, problems, root / "hf") == problems


def test_repair_writes_only_the_experts_that_differ(root, out, monkeypatch):
    """Other experts are not even read from the source, and the file is not replaced."""
    inode = (out / LAYER).stat().st_ino
    flip(out / LAYER, DATA + 6 * RECORD)
    flip(out / LAYER, DATA + 7 * RECORD - 1)
    flip(out / LAYER, DATA + 1 * RECORD)
    writes = []
    real = repair.write_at
    monkeypatch.setattr(
        repair, "write_at", lambda f, data, at: (writes.append((at, len(data))), real(f, data, at))
    )
    assert_repaired(root, out)
    assert writes == [(DATA + expert * RECORD, RECORD) for expert in (1, 6)]
    assert (out / LAYER).stat().st_ino == inode


def test_repair_of_a_copied_conversion(root, tmp_path):
    """From stock's 4-bit checkpoint, whose experts are copied, and again as 2 bits."""
    for name, options in (("copy", {}), ("two", {"quantize": True, "q_bits": 2})):
        out = tmp_path / name
        convert(root / "stock", out, **options)
        before = contents(out)
        for file in before.keys() - {MANIFEST, CARD}:
            flip(out / file, len(before[file]) // 2)
        assert repair.repair(out, verify.verify(out), root / "stock") == []
        assert contents(out) == before


def test_the_wrong_source_repairs_nothing(root, out, tmp_path):
    flip(out / LAYER, DATA)
    broken = contents(out)
    wrong = shutil.copytree(root / "hf", tmp_path / "wrong")
    for name in wrong.glob("*.safetensors"):
        data = bytearray(name.read_bytes())
        half = len(data) // 2 * 2 - 2
        data[half::-2] = bytes(byte ^ 1 for byte in data[half::-2])
        header = 8 + int.from_bytes(name.read_bytes()[:8], "little")
        data[:header] = name.read_bytes()[:header]
        name.write_bytes(data)
    with pytest.raises(FlashMoEError) as error:
        repair.repair(out, verify.verify(out), wrong)
    for part in (f"{wrong}: gives {LAYER} layer 2 expert 0 the checksum", "or convert again"):
        assert part in str(error.value)
    assert contents(out) == broken
    flip(out / LAYER, DATA)
    flip(out / "model.safetensors", 5000)
    broken = contents(out)
    with pytest.raises(FlashMoEError, match=r"gives model.safetensors the checksum \w+, expected"):
        repair.repair(out, verify.verify(out), wrong)
    assert contents(out) == broken


def test_repair_does_not_write_through_symlinks(root, out, tmp_path):
    (out / LAYER).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", out / LAYER)
    assert found(out) == []
    flip(out / LAYER, DATA)
    with pytest.raises(FlashMoEError, match=r"a symlink to \S+elsewhere. Repair the copy there"):
        repair.repair(out, verify.verify(out), root / "hf")


def test_repair_succeeds_after_an_interruption(root, out, monkeypatch):
    """Half of an expert is written, or a scratch file: the next repair succeeds."""
    real = repair.write_at

    def write_at(file, data, offset):
        real(file, data[: len(data) // 2], offset)
        raise KeyboardInterrupt

    for place in (0, RECORD - 1):
        flip(out / LAYER, DATA + 2 * RECORD + place)
    monkeypatch.setattr(repair, "write_at", write_at)
    with pytest.raises(KeyboardInterrupt):
        repair.repair(out, verify.verify(out), root / "hf")
    monkeypatch.undo()
    assert_repaired(root, out)
    flip(out / "model.safetensors", 5000)
    left = out / "repair.tmp/model_experts"
    left.mkdir(parents=True)
    (left / "layer_00.safetensors.tmp").write_bytes(b"x")
    assert_repaired(root, out)


def test_no_room_to_repair(root, out, monkeypatch):
    flip(out / "model.safetensors", 5000)

    def pwrite(*arguments):
        raise OSError(28, "No space left on device")

    problems = verify.verify(out)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(FlashMoEError, match=r"cannot be written \(No space left on device\)"):
        repair.repair(out, problems, root / "hf")
    monkeypatch.undo()
    assert_repaired(root, out)


# --- what cannot be told -------------------------------------------------------------------------


def test_directories_without_checksums(root, out, tmp_path):
    with pytest.raises(FlashMoEError, match=r"none: not a directory. Give one that"):
        verify.verify(tmp_path / "none")
    with pytest.raises(
        FlashMoEError, match=r"hf: not written by flashmoe-convert \(no model_experts\)"
    ):
        verify.verify(root / "hf")
    convert(root / "stock", tmp_path / "linked", link=True)
    with pytest.raises(FlashMoEError, match=r"lie in \S+stock, which has no checksums"):
        verify.verify(tmp_path / "linked")
    manifest = read(out / MANIFEST)
    del manifest["manifest_checksum"]
    (out / MANIFEST).write_text(json.dumps(manifest, indent=4))
    with pytest.raises(FlashMoEError, match=r"has no checksum of every file; an older"):
        verify.verify(out)


def rewritten(out: Path, **changes: object) -> None:
    """Write another manifest, with a correct checksum of its own."""
    manifest = read(out / MANIFEST) | changes
    del manifest["manifest_checksum"]
    write_manifest(out, manifest)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", "a/b", 5, None])
def test_manifests_cannot_name_files_elsewhere(out, name):
    rewritten(out, files=[{"file": name, "size": 1, "checksum": "00000000"}])
    with pytest.raises(FlashMoEError, match=r"manifest.json: damaged \(.* Convert again"):
        verify.verify(out)


@pytest.mark.parametrize("key", ["file", "size", "header", "field_bytes", "records", "tensors"])
@pytest.mark.parametrize("value", [None, -1, "x", [], 1e300])
def test_manifests_of_the_wrong_shape(out, key, value):
    layers = read(out / MANIFEST)["layers"]
    layers[1][key] = value
    rewritten(out, layers=layers)
    try:
        assert verify.verify(out)
    except FlashMoEError as error:
        assert "manifest.json: damaged" in str(error)


# --- command -------------------------------------------------------------------------------------


def test_command(root, out, capsys):
    flip(out / LAYER, DATA)
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "layer 2 expert 0 gate_proj.weight differs" in lines[0]
    assert lines[1:] == [
        f"{out}: 1 problem. Repair: flashmoe-convert verify {out} --repair --hf-path SOURCE"
    ]
    assert main(["verify", str(out), "--repair"]) == 2
    assert capsys.readouterr().err == (
        "flashmoe-convert: error: --repair and --hf-path SOURCE go together. Give both, or "
        "neither.\n"
    )
    assert main(["verify", str(out), "--repair", "--hf-path", str(root / "hf")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: every byte is as it was written."
    assert contents(out) == contents(root / "whole")
    assert main(["verify", str(out / "none")]) == 2
    assert "none: not a directory" in capsys.readouterr().err
