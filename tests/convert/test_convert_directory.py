"""The files of a converted directory: literal bytes, manifest, small files, links, dry runs."""

import json
import shutil
import zlib

from convert_helpers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    layer,
    load,
    read,
)  # fmt: skip
from safetensors import safe_open

from flashmoe_mlx.convert import convert
from flashmoe_mlx.format.layout import open_layout
from flashmoe_mlx.format.names import FIELDS


def test_literal_bytes_of_a_layer_file(root, tmp_path):
    convert(str(root / "hf"), tmp_path / "out", quantize=True)
    data = (tmp_path / "out/model_experts/layer_00.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert 8 + length == 16384
    text = data[8 : 8 + length]
    assert text.startswith(
        b'{"__metadata__":{"format":"mlx"},'
        b'"experts.0.gate_proj.weight":{"dtype":"U32","shape":[64,16],"data_offsets":[0,4096]},'
        b'"experts.0.gate_proj.scales":{"dtype":"BF16","shape":[64,2],"data_offsets":[4096,4352]},'
    )
    assert text.endswith(b" ") and text.rstrip(b" ").endswith(b"}}")
    header = json.loads(text)
    header.pop("__metadata__")
    assert list(header) == [f"experts.{e}.{field}" for e in range(EXPERTS) for field in FIELDS]
    ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
    assert [entry["data_offsets"][0] for entry in header.values()] == ends[:-1]
    record = 3 * INTERMEDIATE * HIDDEN * 9 // 16  # 4.5 bits a weight
    assert ends[9] == record
    assert len(data) == 16384 + EXPERTS * record


def test_any_safetensors_reader_opens_the_files(root, tmp_path):
    convert(str(root / "hf"), tmp_path / "out", quantize=True)
    expected = layer(tmp_path / "out", 2)
    with safe_open(tmp_path / "out/model_experts/layer_02.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(expected)
        found = file.get_tensor("experts.7.down_proj.weight")
        assert (found == expected["experts.7.down_proj.weight"].__array__()).all()
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert set(file.keys()) == set(load(tmp_path / "out"))


def test_manifest_and_shim(root, tmp_path):
    out = tmp_path / "out"
    convert(str(root / "hf"), out, quantize=True)
    manifest = read(out / "model_experts/manifest.json")
    assert (manifest["format"], manifest["version"]) == ("flashmoe-experts", 1)
    assert manifest["source"] == {"path": "hf"}
    assert (manifest["num_experts"], manifest["checksum"]) == (EXPERTS, "crc32")
    layout = open_layout(out, LAYERS, EXPERTS)
    assert layout.kind == "packed"
    for entry, packed in zip(manifest["layers"], layout.layers, strict=True):
        data = (out / "model_experts" / entry["file"]).read_bytes()
        assert entry["size"] == len(data)
        for expert, checksum in enumerate(entry["records"]):
            (span,) = packed.spans(expert)
            record = data[span.offset : span.offset + packed.record_bytes]
            assert checksum == f"{zlib.crc32(record):08x}"
    assert (out / "flashmoe_model.py").read_text() == (
        "from flashmoe_mlx.loader import bind\n\nModel, ModelArgs = bind(__file__)\n"
    )
    assert read(out / "config.json")["flashmoe"] == {"format_version": 1}
    assert not list(out.rglob("*.tmp"))


def test_small_files_are_copied_byte_for_byte(root, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(root / "hf", source)
    copied = {
        "generation_config.json": b'{ "top_k":20}\n', "chat_template.jinja": b"{{x}}\r\n",
        "merges.txt": b"a b", "tokenizer.model": b"\0", "LICENSE": b"MIT",
    }  # fmt: skip
    for name, content in (copied | {"README.md": b"#", "modeling.py": b"", "x.bin": b""}).items():
        (source / name).write_bytes(content)
    convert(str(source), tmp_path / "out", quantize=True)
    own = {
        "README.md", "config.json", "flashmoe_model.py", "model.safetensors",
        "model.safetensors.index.json", "model_experts",
    }  # fmt: skip
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | tokenizer | set(copied)
    for name in [*copied, *tokenizer]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_link_copies_no_expert(root, tmp_path):
    convert(str(root / "stock"), tmp_path / "out", link=True)
    out = tmp_path / "out"
    assert (
        sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and not p.is_symlink()) < 9999
    )
    names = {p.name for p in (root / "stock").iterdir()}
    assert {p.name for p in out.iterdir()} == names | {"flashmoe_model.py", "model_experts"}
    assert (out / "model.safetensors").is_symlink() and not (out / "config.json").is_symlink()
    manifest = read(out / "model_experts/manifest.json")
    del manifest["manifest_checksum"]
    assert manifest == {
        "format": "flashmoe-experts", "version": 1, "checksum": "crc32",
        "link": str((root / "stock").resolve()),
    }  # fmt: skip
    layout = open_layout(out, LAYERS, EXPERTS)
    assert layout.kind == "linked"
    assert layout.layers[0].fields[0].file.parent == (root / "stock").resolve()
    ours, stock = (read(path / "config.json") for path in (out, root / "stock"))
    assert ours.pop("model_file") and ours.pop("flashmoe")
    assert ours == stock


def test_dry_run_writes_nothing(root, tmp_path, capsys):
    convert(str(root / "hf"), tmp_path / "out", quantize=True, q_bits=2, dry_run=True)
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    record = 3 * INTERMEDIATE * HIDDEN * 5 // 16
    for part in (f"{LAYERS}, of {EXPERTS} experts", f"{record:,} bytes", "2 bits, groups of 64"):
        assert part in text
    assert f"{LAYERS * EXPERTS * record:,} bytes" in text
    convert(str(root / "hf"), tmp_path / "out", quantize=True, q_bits=2)
    trunk = read(tmp_path / "out/model.safetensors.index.json")["metadata"]["total_size"]
    assert f"{trunk:,} bytes" in text
    assert f"{trunk + LAYERS * EXPERTS * record:,} bytes" in text
