"""Code in a checkpoint is named, omitted on request, and never mistaken for ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import contents, read

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.verify.repair import repair
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.errors import FlashMoEError

MANIFEST = "model_experts/manifest.json"
SHIM = b"from flashmoe_mlx.loader import bind\n\nModel, ModelArgs = bind(__file__)\n"
NAMED = (
    "tokenizer_evil.py, configuration_evil.py of owner/name, processing_evil.py of owner/name, "
    "pipe.py (named, but missing)"
)
REMEDY = "--trust-remote-code would run it; --no-remote-code leaves it out"
PICKLES = (
    "pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "tokenizer.pt", "tokenizer.bin",
    "tokenizer_config.pickle",
)  # fmt: skip


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps((read(path) if path.exists() else {}) | entries))


@pytest.fixture
def source(root: Path, tmp_path: Path) -> Path:
    """A checkpoint with code in every place that transformers or mlx-lm searches."""
    source = shutil.copytree(root / "stock", tmp_path / "source")
    text = read(source / "config.json")["text_config"]
    change(
        source / "config.json",
        auto_map={"AutoConfig": "owner/name--configuration_evil.Config"},
        custom_pipelines={"evil": {"impl": "pipe.Evil", "pt": ["AutoModel"], "type": "text"}},
        model_file="evil.py",
        text_config=text | {"auto_map": {"AutoConfig": "owner/name--configuration_evil.Text"}}
        | {"model_file": "evil.py"},
    )  # fmt: skip
    change(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizer_evil.Tok"]}
    )
    change(
        source / "processor_config.json",
        auto_map={"AutoProcessor": "owner/name--processing_evil.P"},
    )
    change(source / "generation_config.json", custom_generate="owner/generate", top_k=20)
    (source / "sub").mkdir()
    for name in ("tokenizer_evil.py", "evil.py", "sub/tokenizer_evil.py", *PICKLES):
        (source / name).write_bytes(b"raise SystemExit")
    return source


def all_keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(all_keys, value.values()))
    return set().union(*map(all_keys, value)) if isinstance(value, list) else set()


def test_named_by_the_plan_the_end_and_the_card(source, tmp_path, capsys):
    command = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    assert f"\ncode        of {source}: {NAMED}. {REMEDY}\n" in capsys.readouterr().out
    assert main(command) == 0
    done = f"Done.\nCopied code of {source}: {NAMED}. {REMEDY}.\n"
    attempt = f"Try, without that flag: flashmoe-generate --model {tmp_path / 'out'} -p Hello\n"
    assert capsys.readouterr().out == done + attempt
    card = (tmp_path / "out/README.md").read_text()
    assert f"**It would also run code of source:** {NAMED}.\nRead that first." in card


def test_copied_byte_for_byte_by_default(source, tmp_path):
    convert(source, tmp_path / "out")
    copied = (
        "tokenizer_evil.py", "tokenizer_config.json", "processor_config.json",
        "generation_config.json", "tokenizer.json",
    )  # fmt: skip
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = read(tmp_path / "out/config.json")
    assert config["auto_map"] and config["text_config"]["auto_map"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("no_remote_code", [False, True])
def test_pickles_and_model_files_are_not_copied(source, tmp_path, link, no_remote_code):
    out = tmp_path / "out"
    convert(source, out, link=link, no_remote_code=no_remote_code)
    assert not {*PICKLES, "evil.py", "sub"} & {path.name for path in out.rglob("*")}
    config = read(out / "config.json")
    assert config["model_file"] == "flashmoe_model.py"
    assert "model_file" not in config["text_config"]
    assert (out / "flashmoe_model.py").read_bytes() == SHIM


def test_a_model_file_that_is_called_like_a_tokenizer(source, tmp_path):
    change(source / "config.json", model_file="tokenizer_evil.py")
    convert(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.py")] == ["flashmoe_model.py"]


def test_an_altered_shim_is_not_copied(root, tmp_path):
    convert(root / "stock", tmp_path / "packed")
    (tmp_path / "packed/flashmoe_model.py").write_text("raise SystemExit")
    convert(tmp_path / "packed", tmp_path / "out")
    assert (tmp_path / "out/flashmoe_model.py").read_bytes() == SHIM


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_left_out(source, tmp_path, capsys, link):
    out = tmp_path / "out"
    command = ["--hf-path", str(source), "--mlx-path", str(out), "--no-remote-code", *link]
    assert main([*command, "--dry-run"]) == 0
    assert "evil" not in capsys.readouterr().out
    assert main(command) == 0
    attempt = f"mlx_lm.generate --model {out} --trust-remote-code -p Hello"
    assert capsys.readouterr().out == f"Done. Try: {attempt}\n"
    assert [path.name for path in out.rglob("*.py")] == ["flashmoe_model.py"]
    for path in out.glob("*config*.json"):
        assert not {"auto_map", "custom_pipelines", "custom_generate"} & all_keys(read(path))
    assert read(out / "generation_config.json") == {"top_k": 20}
    tokenizer = read(source / "tokenizer_config.json")
    del tokenizer["auto_map"]
    assert read(out / "tokenizer_config.json") == tokenizer
    if not link:
        card = (out / "README.md").read_text()
        assert "It runs no other code of this directory." in card and "evil" not in card
        assert read(out / MANIFEST)["options"]["no_remote_code"] is True
        assert verify(out) == []


def test_repaired_without_it(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, no_remote_code=True)
    before = contents(out)
    for name in ("tokenizer_config.json", "config.json"):
        (out / name).write_bytes(b"{}")
    assert repair(out, verify(out), source) == []
    assert contents(out) == before


def test_another_option_is_another_conversion(source, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flashmoe_mlx.convert.write.output.write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", no_remote_code=True)
    with pytest.raises(FlashMoEError, match="begun with options --no-remote-code, not none"):
        convert(source, tmp_path / "out")


def test_without_any_the_bytes_and_the_manifest_are_those_of_before(root, tmp_path, capsys):
    """A word of a vocabulary may equal a key that names code."""
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    (source / "vocab.json").write_text('{"auto_map":1, "custom_pipelines": 2}')
    convert(source, tmp_path / "out", no_remote_code=True)
    for name in ("vocab.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    convert(source, tmp_path / "default")
    assert "no_remote_code" not in read(tmp_path / "default" / MANIFEST)["options"]
    convert(source, tmp_path / "dry", dry_run=True)
    assert "\ncode " not in capsys.readouterr().out


def test_hidden_files_are_not_copied(root, tmp_path):
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    for name in (".env.json", ".token.txt", ".LICENSE", ".tokenizer.py"):
        (source / name).write_text("{}")
    for link in (False, True):
        convert(source, tmp_path / f"out{link}", link=link)
        assert not list((tmp_path / f"out{link}").glob(".*"))


def test_names_that_are_made_to_be_printed(root, tmp_path, capsys):
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    change(
        source / "tokenizer_config.json",
        auto_map={"A": "o/n--\x1b[2J`**.C", "B": "a\nb.C", "C": [1, {"D": "x" * 9999 + ".E"}]},
    )
    convert(source, tmp_path / "out", dry_run=True)
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("code "))
    assert "??2J???.py of o/n" in row and "a?b.py (named, but missing)" in row
    assert row.isprintable() and len(row) < 1000


@pytest.mark.parametrize("text", ["[", '{"a":' * 5000 + "1" + "}" * 5000, "\xff"])
@pytest.mark.parametrize("no_remote_code", [False, True])
def test_configurations_that_cannot_be_searched(root, tmp_path, text, no_remote_code):
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    (source / "processor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FlashMoEError, match=r"processor_config.json: not JSON \(.*\)\. R"):
        convert(source, tmp_path / "out", no_remote_code=no_remote_code)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_config_nested_too_deeply(root, tmp_path):
    source = shutil.copytree(root / "stock", tmp_path / "stock")
    deep = json.loads('{"a":' * 700 + "1" + "}" * 700)
    change(source / "config.json", deep=deep)
    with pytest.raises(FlashMoEError, match=r"config.json: "):
        convert(source, tmp_path / "out")
