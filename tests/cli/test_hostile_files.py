"""Malformed small files in a model directory each cause a one-sentence error.

The loader rejects them before mlx-lm or transformers opens them, or names the file in their errors.
"""

import builtins
import errno
import io
import json
import os
import socket
from pathlib import Path

import fuzz_files
import pytest

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli import doctor, doctor_checks, plan
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import cli, convert
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.errors import named
from flashmoe_mlx.format.config_entries import MOST
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.json_file import MOST_BYTES, parse, read_json
from flashmoe_mlx.format.model_files import READ_AS_JSON, check_small_files
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.qwen3_5.args import ModelArgs
from flashmoe_mlx.settings import StreamConfig, parse_size

CONFIG = json.loads((BUNDLED_MODEL / "config.json").read_text())
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
UNUSED = ("hf_quant_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


@pytest.fixture
def model(tmp_path) -> Path:
    """Copy the bundled model, with links to its weights."""
    model = tmp_path / "model"
    model.mkdir()
    for path in BUNDLED_MODEL.iterdir():
        if path.suffix == ".safetensors":
            (model / path.name).symlink_to(path)
        else:
            (model / path.name).write_bytes(path.read_bytes())
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "packed"
    convert(BUNDLED_MODEL, path)
    return path


def refused(model: Path, message: str) -> None:
    """Check that `load` raises, and that the doctor lists a problem."""
    with pytest.raises(FlashMoEError, match=message) as caught:
        load(model)
    assert len(str(caught.value)) < 1300
    assert examine(model).problems


def edit(path: Path, **entries) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


# ---- kinds of file, sizes, text ------------------------------------------------------------------


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # the absolute path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SMALL, *UNUSED, "chat_template.jinja"])
def test_no_file_at_all(model, name, kind, monkeypatch):
    """Opening a pipe would block, and reading /dev/zero would fill the memory."""
    monkeypatch.chdir(model)
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    if kind == "folder" and name not in READ_AS_JSON:
        return check_small_files(model)  # no read blocks on it
    refused(model, rf"{name}: not a regular file\.")
    if name == "config.json":
        with pytest.raises(SystemExit):
            plan.main(["--model", str(model)])


def test_a_folder_of_templates_is_checked(model):
    """transformers reads every template in this folder."""
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "config.json").write_text("[")
    check_small_files(model)
    os.mkfifo(folder / "tool.jinja")
    refused(model, r"tool\.jinja: not a regular file\.")


@pytest.mark.parametrize("name", [*SMALL, "chat_template.jinja"])
def test_too_large_files(model, name):
    with open(model / name, "wb") as file:
        file.truncate(MOST_BYTES + 1)
    refused(model, rf"{name}: 100000001 bytes long, but at most 100000000 are allowed\.")


TEXTS = {
    "empty": (b"", r"not JSON \(Expecting value"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"not JSON \(nested more than 100"),
    "deep enough": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", r"not JSON \(nested more than 100"),
    "objects": (b'{"a":' * 300 + b"1" + b"}" * 300, r"not JSON \(nested more than 100"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', r"not JSON \('a' occurs more than once\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r"not JSON \('utf-8' codec can't decode"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', r"not JSON \(Unexpected UTF-8 BOM"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", r"not JSON \(Exceeds the limit"),
    "half of a pair": (b'{"a": "\\uD800"}', r"not JSON \('utf-8' codec can't encode"),
    "half of a pair as a key": (b'{"\\udfff": 1}', r"not JSON \('utf-8' codec can't encode"),
    "list": (b"[1]", r"not a JSON object"),
    "null": (b"null", r"not a JSON object"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*SMALL[:3], "hf_quant_config.json"])
def test_text_that_is_not_an_object(model, name, text):
    content, message = TEXTS[text]
    (model / name).write_bytes(content)
    refused(model, rf"{name}: {message}")


def test_valid_json_is_read():
    deep = 98 * b"[" + b"{}" + 98 * b"]"
    assert parse(b'{"a": [1, {"b": "\\u00e9"}], "c": null}') == {"a": [1, {"b": "é"}], "c": None}
    assert parse(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]
    assert parse(deep) and parse(b"3") == 3 and parse(b'"[[[["') == "[[[["


def test_a_name_that_is_not_text(model):
    """MLX's header parser rejects it with its own message."""
    raw = (BUNDLED_MODEL / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["\ud800"] = header.pop(next(name for name in header if "norm" in name))
    text = json.dumps(header).encode()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(model, r"damaged safetensors header \('utf-8' codec can't encode character '.ud800'")


@pytest.mark.parametrize("meta", [[1], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, "text", 5, True])
def test_metadata_that_does_not_map_strings_to_strings(model, meta):
    raw = (BUNDLED_MODEL / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]) | {"__metadata__": meta}).encode()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(model, r"damaged safetensors header \(__metadata__ is not an object of strings\)")


# ---- errors of transformers and mlx-lm -----------------------------------------------------------


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


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("factor", [1, 10**30])
def test_every_count_has_a_bound(name, factor):
    """Counts above the bound allocate nothing; the largest known model stays below it."""
    value = MOST[name] * factor + 1
    config = CONFIG | {"text_config": CONFIG["text_config"] | {name: value}}
    message = rf"{name} = {value} is more than {MOST[name]}, above"
    with pytest.raises(FlashMoEError, match=message):
        ModelArgs.from_dict(config)
    assert getattr(plan.named_args("397b"), name) * 16 <= MOST[name]


def test_all_counts_are_known():
    counts = {name for name, kind in ModelArgs.__annotations__.items() if kind is int}
    assert counts == MOST.keys()


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9, "layer_types": None},
        {"num_attention_heads": 10**9},
        {"vocab_size": 10**30},
        {"num_experts": 10**12},
    ],
)
def test_flashmoe_plan_refuses_at_once(model, entries, capsys):
    """Without a bound, this count takes all memory of the machine."""
    config = CONFIG | {"text_config": CONFIG["text_config"] | entries}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        plan.main(["--model", str(model), "--machine", "m3-max-48"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"config.json: {next(iter(entries))} = " in error
    refused(model, rf"{next(iter(entries))} = 10+ is more than")
    assert cli.main(["--hf-path", str(model), "--mlx-path", str(model / "out")]) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"partial_rotary_factor": 1e-9}, r"= 1e-09 of head_dim = 64 rotates 0 dimensions"),
        ({"partial_rotary_factor": 0.02}, r"= 0\.02 of head_dim = 64 rotates 1 dimensions"),
        ({"partial_rotary_factor": 0.05}, r"rotates 3 dimensions, and RoPE needs an even number"),
        ({"partial_rotary_factor": float("nan")}, r"partial_rotary_factor = nan is not a number"),
        ({"rope_theta": float("inf")}, r"rope_theta = inf is more than"),
        ({"rope_theta": 10**400}, r"rope_theta = 10+ is more than"),
        ({"rope_type": "sideways"}, r"model that cannot be built \(ValueError: Unsupported RoPE"),
        ({"rope_type": "yarn"}, r"a model that cannot be built \(KeyError: 'factor'\)"),
        ({"rope_type": [1]}, r"a model that cannot be built \("),
    ],
)
def test_rope(model, entries, message):
    rope = CONFIG["text_config"]["rope_parameters"] | {"type": None} | entries
    text = CONFIG["text_config"] | {"rope_parameters": rope}
    (model / "config.json").write_text(json.dumps(CONFIG | {"text_config": text}))
    refused(model, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads = 4 is not a multiple of num_key_value"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps = 1e\+300 is more than"),
        ({"head_dim": 10**9}, r"head_dim = 1000000000 is more than"),
    ],
)
def test_other_entries(model, entries, message):
    config = CONFIG | {"text_config": CONFIG["text_config"] | entries}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, message)


def test_quantized_activations(model):
    edit(model / "config.json", quantize_activations=True)
    refused(model, r"config\.json: quantize_activations is not supported for streamed models")


@pytest.mark.parametrize("size", ["99999TiB", "9" * 400, "9" * 400 + "GiB", 1 << 51, "1025 TiB"])
def test_more_memory_than_any_machine_has(model, size):
    with pytest.raises(FlashMoEError, match=r"is more memory than any machine has\. Give at most"):
        parse_size(size, "x")
    with pytest.raises(FlashMoEError, match=r"expert_cache = 9?1?2?.* is more memory than any"):
        StreamConfig.resolve({}, expert_cache=size)
    edit(model / "config.json", flashmoe={"expert_cache": size})
    refused(model, r"config.json \"flashmoe\": expert_cache = .* is more memory than any machine")
    assert parse_size("1024TiB", "x") == 1 << 50


@pytest.mark.parametrize(
    "setting", [{"expert_cache": "1KiB"}, {"experts_per_token": 101}, {"io_threads": 0}]
)
def test_settings_that_the_doctor_names(model, setting):
    edit(model / "config.json", flashmoe=setting)
    refused(model, next(iter(setting)))


# ---- I/O errors ----------------------------------------------------------------------------------


class Failing(io.BytesIO):
    """A file whose reads fail."""

    def read(self, *arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def fail(monkeypatch, path: Path, reads: int, number: int = errno.EIO) -> None:
    """Let the nth opening of a file fail: in a read (EIO), or at once."""
    opened = []
    real = builtins.open

    def fake(file, *arguments, **options):
        if Path(file) == path:
            opened.append(file)
            if len(opened) >= reads and number == errno.EIO:
                return Failing()
            if len(opened) >= reads:
                raise OSError(number, os.strerror(number), str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", fake)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("reads", [1, 2])
def test_an_unreadable_config_is_called_unreadable(packed, reads, number, monkeypatch, capsys):
    """The doctor reports it at the first and at a later read, neither as missing nor as damaged."""
    fail(monkeypatch, packed / "config.json", reads, number)
    problems = "\n".join(examine(packed).problems)
    assert f"config.json: unreadable ({os.strerror(number)}). Check" in problems
    assert "no config.json" not in problems and "damaged" not in problems
    if reads == 1:
        with pytest.raises(SystemExit) as ended:
            plan.main(["--model", str(packed), "--machine", "m3-max-48"])
        assert ended.value.code == 2 and "config.json: unreadable (" in capsys.readouterr().err
        assert cli.main(["--hf-path", str(packed), "--mlx-path", str(packed / "out")]) == 2
        assert "config.json: unreadable (" in capsys.readouterr().err


@pytest.mark.parametrize("reads", [1, 2])
def test_an_unreadable_manifest_is_called_unreadable(packed, reads, monkeypatch, capsys):
    manifest = packed / "model_experts/manifest.json"
    with monkeypatch.context() as patch:
        fail(patch, manifest, reads)
        with pytest.raises(FlashMoEError, match=r"manifest\.json: unreadable \(Input/output error"):
            verify(packed)
    fail(monkeypatch, manifest, reads)
    assert cli.main(["verify", str(packed)]) == 2
    assert "manifest.json: unreadable (Input/output error)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "model_experts/layer_01.safetensors"])
def test_an_unreadable_header_is_called_unreadable(packed, name, monkeypatch):
    fail(monkeypatch, packed / name, 1)
    with pytest.raises(FlashMoEError, match=r"safetensors: unreadable \(Input/output error\)"):
        read_header(packed / name)
    assert any("unreadable (Input" in problem for problem in examine(packed).problems)


@pytest.mark.parametrize("call", ["stat", "listdir"])
def test_a_folder_that_may_not_be_entered(model, call, monkeypatch):
    """Root may enter every folder, so the test replaces the system call."""
    real = getattr(os, call)

    def denied(path, *arguments, **options):
        if str(path).startswith(str(model)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, denied)
    with pytest.raises(
        FlashMoEError, match=r"model: unreadable \(Permission denied\)|config.json: "
    ):
        load(model)
    with pytest.raises(FlashMoEError, match=r"unreadable \(Permission denied\)"):
        check_small_files(model)


def test_verify_names_what_it_cannot_read(packed, monkeypatch):
    """The other files are still compared."""
    real = os.stat
    hidden = packed / "tokenizer.json"

    def denied(path, *arguments, **options):
        if str(path) == str(hidden):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert [str(p) for p in verify(packed)] == ["tokenizer.json: unreadable (Permission denied)"]


def test_a_missing_file_is_not_an_unreadable_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "x.json", "Mend it.")
    with pytest.raises(FlashMoEError, match=r"x\.safetensors: missing"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(FlashMoEError, match=r"no config\.json\. Give the directory of a model"):
        load(tmp_path)


# ---- fuzzing -------------------------------------------------------------------------------------


def test_files_changed_at_random(tmp_path):
    """`tests/stress/fuzz_files.py`, a few cases: `load` refuses each, or tokens stay the same."""
    cases = fuzz_files.Cases(tmp_path)
    assert {cases.run(seed) for seed in range(40)} <= {"refused", "equal", "other"}
