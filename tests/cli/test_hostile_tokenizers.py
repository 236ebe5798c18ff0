"""What transformers and mlx-lm refuse in a tokenizer or configuration becomes one sentence."""

import json
from pathlib import Path

import pytest
from hostile_helpers import CONFIG, copy_bundled, edit, refused

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli import doctor, doctor_checks
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.errors import named


@pytest.fixture
def model(tmp_path) -> Path:
    return copy_bundled(tmp_path / "model")


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"vision_config": "x"}, {}),
        ({"vision_config": [1]}, {}),
        ({}, {"attention_dropout": "x"}),
        ({}, {"initializer_range": "x"}),
        ({}, {"hidden_act": 3}),
        ({}, {"use_cache": "often"}),
        ({"image_token_id": "x"}, {}),
        ({}, {"pad_token_id": 1.5}),
    ],
)
def test_what_transformers_strict_configuration_refuses(model, entries, text):
    config = CONFIG | entries
    config["text_config"] = config["text_config"] | text
    (model / "config.json").write_text(json.dumps(config))
    refused(model, r"model: its tokenizer cannot be loaded \(StrictDataclass\w*Error: ")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["linear_attention"] * 3 + ["sideways"], r"layer_types\[3\] = 'sideways' is not one of"),
        (["linear_attention"] * 3 + [7], r"layer_types\[3\] = 7 is not one of linear_attention, f"),
        (["linear_attention"] * 3, r"layer_types lists 3 layers, but num_hidden_layers = 4"),
        (["linear_attention"] * 4, r"layer_types\[3\] = 'linear_attention' contradicts"),
    ],
)
def test_layer_types(model, types, message):
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"layer_types": types}}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, message)


@pytest.mark.parametrize("entry", ["tool_parser_type", "chat_template_type"])
@pytest.mark.parametrize("name", ["nonsense", "__init__", "../../x", "os.path", ".os", 5, ["a"]])
def test_a_module_that_mlx_lm_does_not_have(model, entry, name):
    edit(model / "tokenizer_config.json", **{entry: name})
    refused(model, rf"tokenizer_config\.json: {entry} = .* is not one of mlx-lm's \(")


def test_a_module_that_mlx_lm_has(model):
    edit(model / "tokenizer_config.json", tool_parser_type="json_tools", chat_template_type=None)
    assert examine(model).problems == []


@pytest.mark.parametrize("number", [1 << 32, (1 << 32) - 1, 1 << 63, 10**30, -1, 1.5, "x", 4096])
def test_ids_that_no_token_can_have(model, number):
    content = json.loads((model / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words[max(words, key=len)] = number
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(model, r"model: its tokenizer (cannot be loaded \(|maps .* to id \d+, but the model)")


@pytest.mark.parametrize("number", [1 << 32, -1, 1.5])
def test_ids_that_no_added_token_can_have(model, number):
    """Transformers numbers Qwen's added tokens itself: all ids are of the vocabulary."""
    change_added_token(model, number)
    changed, tokenizer = load(model)
    with changed:
        ids = tokenizer.encode("<|im_start|>user\nHello<|im_end|>")
        assert max(ids) < changed.args.vocab_size and min(ids) >= 0


def test_an_id_that_is_no_number(model):
    change_added_token(model, "x")
    refused(model, r"model: its tokenizer cannot be loaded \(")


def change_added_token(model: Path, number: object) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = number
    (model / "tokenizer.json").write_text(json.dumps(content))


def test_a_token_outside_the_embedding(model):
    """Such a token would read memory outside the embedding."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"content": "<more>", "id": 4096})
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(model, r"its tokenizer maps '<more>' to id 4096, but the model has vocab_size = 4096")


@pytest.mark.parametrize("number", [0, 300, 4000])
def test_an_id_that_has_no_token(model, number):
    """mlx-lm could not print it."""
    content = json.loads((model / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    del words[next(word for word, found in words.items() if found == number)]
    content["model"]["merges"] = []
    content["added_tokens"] = [x for x in content["added_tokens"] if x["id"] != number]
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(model, rf"model: its tokenizer (has no token for id {number}|cannot be loaded \()")


TOKENIZERS = {
    "deep": (b"[" * 100_000 + b"]" * 100_000, r"cannot be loaded \(RecursionError"),
    "less deep": (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", r"cannot be loaded \("),
    "bytes": (bytes(range(256)), r"cannot be loaded \(UnicodeDecodeError"),
    "null": (b"null", r"cannot be loaded \(TypeError"),
    "empty object": (b"{}", r"cannot be loaded \("),
    "other": (b'{"model": {"type": "Evil"}, "added_tokens": []}', r"cannot be loaded \("),
}


@pytest.mark.parametrize("text", TOKENIZERS)
def test_a_garbage_tokenizer(model, text):
    content, message = TOKENIZERS[text]
    (model / "tokenizer.json").write_bytes(content)
    refused(model, rf"model: its tokenizer {message}")


def test_the_doctor_reports_a_garbage_tokenizer(model, monkeypatch, capsys):
    monkeypatch.setattr(doctor_checks, "cases", lambda *_: [])
    (model / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(model), "--geometry", "tiny", "--sample-mib", "4"])
    assert ended.value.code == 1 and "its tokenizer cannot be loaded" in capsys.readouterr().out


def test_no_tokenizer(model):
    """transformers silently creates an empty tokenizer."""
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(model, r"model: no tokenizer \(none of tokenizer\.json, vocab\.json, ")


def test_a_length_limit_that_is_not_a_number(model):
    """transformers detects this only when it encodes a text."""
    edit(model / "tokenizer_config.json", model_max_length="x")
    refused(model, r"its tokenizer cannot be loaded \(TypeError")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", ["x", 1.5, [1, "x"], {"a": 1}, -1, True])
def test_tokens_that_should_end_a_text(model, name, ends):
    edit(model / name, eos_token_id=ends)
    refused(model, rf"{name}: eos_token_id = .* is neither a token's id nor a list of them\.")


class PanicException(BaseException):
    """The exception that Rust's bindings raise."""


@pytest.mark.parametrize(
    "error", [PanicException("index"), Exception("bare"), RecursionError("deep"), ImportError("x")]
)
def test_any_error_of_a_tokenizer_names_the_directory(error):
    message = rf"here: wrong \({type(error).__name__}: .*\)\. Mend"
    with (
        pytest.raises(FlashMoEError, match=message),
        named("here", "wrong", "Mend it", (Exception,)),
    ):
        raise error


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_other_errors_name_no_file(error):
    with pytest.raises(type(error)), named("here", "wrong", "Mend it", (Exception,)):
        raise error
    with pytest.raises(RuntimeError, match="ours"), named("here", "wrong", "Mend it"):
        raise RuntimeError("ours")
