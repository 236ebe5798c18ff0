"""The model card of a conversion: README.md."""

import shutil
from pathlib import Path

import pytest
from convert_helpers import contents
from huggingface_hub import metadata_load

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import read_manifest

SOURCE_CARD = """---
license: apache-2.0
license_link: https://example.org/LICENSE
base_model: [owner/Base]
language:
- en
- "no"
tags:
- moe
- mlx
pipeline_tag: image-text-to-text
library_name: transformers
to_yaml: hostile
model-index:
- name: scores that the source's own weights gave
---
# The source's text
"""


def with_card(root: Path, directory: Path, text: str) -> Path:
    shutil.copytree(root / "stock", directory)
    (directory / "README.md").write_text(text)
    return directory


def command_of(card: str) -> str:
    return card.rstrip().removesuffix("\n```").rpartition("```sh\n")[2]


def test_front_matter(root, tmp_path):
    convert(with_card(root, tmp_path / "source", SOURCE_CARD), tmp_path / "out")
    assert metadata_load(tmp_path / "out/README.md") == {
        "license": "apache-2.0",
        "license_link": "https://example.org/LICENSE",
        "base_model": ["owner/Base"],
        "language": ["en", "no"],
        "tags": ["mlx", "flashmoe", "moe"],
        "pipeline_tag": "text-generation",
        "library_name": "mlx",
    }
    assert "The source's text" not in (tmp_path / "out/README.md").read_text()


def test_without_a_card_in_the_source(root, tmp_path):
    stock = shutil.copytree(root / "stock", tmp_path / "stock")
    (stock / "README.md").unlink()  # mlx-lm's
    convert(stock, tmp_path / "out")
    assert metadata_load(tmp_path / "out/README.md") == {
        "tags": ["mlx", "flashmoe"],
        "pipeline_tag": "text-generation",
        "library_name": "mlx",
    }


def test_its_command_makes_the_same_conversion(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    convert(root / "hf", tmp_path / "out", True, 32, quant_predicate="mixed_2_4", dtype="float16")
    card = (tmp_path / "out/README.md").read_text()
    command = command_of(card)
    assert command == (
        "flashmoe-convert --hf-path hf --mlx-path DIR -q --q-group-size 32 --dtype float16 "
        "--quant-predicate mixed_2_4"
    )
    words = command.replace("DIR", str(tmp_path / "again")).split()
    assert main(words[1:]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert str(root) not in card and str(tmp_path) not in card
    capsys.readouterr()


def test_figures(root, tmp_path):
    convert(root / "hf", tmp_path / "out", quantize=True, q_bits=2)
    card = (tmp_path / "out/README.md").read_text()
    layer = read_manifest(tmp_path / "out/model_experts/manifest.json")["layers"][0]
    assert "| experts | 2 bits, groups of 64, least-squares |" in card
    assert f"| {sum(layer['field_bytes']):,} bytes; {len(layer['records'])} in each of " in card
    assert "| trunk | 4 bits, groups of 64;" in card
    convert(root / "stock", tmp_path / "copy")
    assert "4 bits, groups of 64, as in the source |" in (tmp_path / "copy/README.md").read_text()
    mixed = tmp_path / "mixed"
    convert(root / "hf", mixed, quantize=True, quant_predicate="mixed_2_2_4")
    assert "| gate_proj, up_proj: 2 bits, groups of 64, " in (mixed / "README.md").read_text()


def test_nothing_private_is_published(root, tmp_path):
    convert(root / "hf", tmp_path / "out", quantize=True)
    for name, content in contents(tmp_path / "out").items():
        assert str(root).encode() not in content, name


def test_it_is_for_editing(root, tmp_path):
    """The manifest does not list it."""
    convert(root / "stock", tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    assert verify(tmp_path / "out") == []
    (tmp_path / "out/README.md").unlink()
    assert verify(tmp_path / "out") == []


def test_a_linked_directory_has_the_source_s(root, tmp_path):
    source = with_card(root, tmp_path / "source", SOURCE_CARD)
    convert(source, tmp_path / "out", link=True)
    assert (tmp_path / "out/README.md").resolve() == (source / "README.md").resolve()


BOMB = "\n".join(["a: &a [x, x]", "b: &b [*a, *a]", "tags: [*b, *b]"])


@pytest.mark.parametrize(
    "matter", ["license: [", "- a", "tags: {a: b}", BOMB, "tags: " + "[" * 9999]
)
def test_an_invalid_front_matter(root, tmp_path, matter):
    source = with_card(root, tmp_path / "source", f"---\n{matter}\n---\n")
    with pytest.raises(
        FlashMoEError, match=r"source/README.md: the front matter .* Correct it, or"
    ):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_yaml_of_a_card_that_is_not_text(root, tmp_path):
    source = with_card(root, tmp_path / "source", "")
    (source / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(FlashMoEError, match="front matter"):
        convert(source, tmp_path / "out")
