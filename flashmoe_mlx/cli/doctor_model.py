"""Check that a model directory is complete: every header and size, but not the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_model

from ..binding import trunk_bytes, without_experts
from ..errors import FlashMoEError, named
from ..format.headers import checkpoint_headers
from ..format.json_file import exists, read_object
from ..format.layout import ExpertLayout, open_layout
from ..format.model_files import read_config
from ..format.modules import open_modules, quantizations
from ..loader import check_tokenizer, find_model
from ..models.patch import stock_classes, stock_modules, top_k, vocabulary
from ..models.qwen3_5.args import ModelArgs, check_top_k, is_own
from ..models.trunk_checks import REMEDY, check_readable, check_trunk
from ..settings import StreamConfig
from ..store.devices import choose
from ..store.memory import available_bytes
from ..store.sizing import plan_cache

INDEX = "model.safetensors.index.json"


@dataclass
class ModelReport:
    """The content of a model directory; a field is None if its file cannot be read.

    `bits` lists the distinct bits per weight of the experts' matrices, in ascending order. `args`
    is None for a model of mlx-lm, which has arguments of its own.
    """

    directory: Path
    problems: list[str] = field(default_factory=list)
    args: ModelArgs | None = None
    layout: ExpertLayout | None = None
    trunk_bytes: int | None = None
    bits: tuple[int, ...] = ()
    top_k: int = 1
    vocab_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values: dict[str, Any] = {
            "directory": str(self.directory),
            "complete": not self.problems,
            "problems": self.problems,
            "trunk_bytes": self.trunk_bytes,
        }
        if self.layout:
            values |= {
                "kind": self.layout.kind,
                "bits": list(self.bits),
                "layers": len(self.layout.layers),
                "experts": self.layout.num_experts,
                "record_bytes": self.layout.record_bytes,
                "expert_bytes": self.layout.total_bytes,
            }
            values["token_bytes"] = self.layout.token_bytes * self.top_k
        return values


def examine(directory: Path) -> ModelReport:
    """Check a directory's config, index, trunk, experts, settings and tokenizer.

    Raises:
        FlashMoEError: `directory` is not a directory.
    """
    if not (exists(directory) and directory.is_dir()):
        raise FlashMoEError(f"{directory}: not a directory. Give the directory of a model.")
    report = ModelReport(directory)
    for check in (_config, _index, _trunk, _experts, _settings, _tokenizer):
        _collect(report, check)
    return report


def _collect(report: ModelReport, check: Callable[[ModelReport], None]) -> None:
    try:
        check(report)
    except FlashMoEError as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))


def _config(report: ModelReport) -> None:
    config = read_config(find_model(report.directory))
    if not is_own(config):
        return _patched(report, config)
    report.args = ModelArgs.from_dict(config)
    report.top_k, report.vocab_size = report.args.num_experts_per_tok, report.args.vocab_size


def _patched(report: ModelReport, config: Mapping[str, Any]) -> None:
    """Check a model of mlx-lm: experts by their headers, the trunk by stock's loader, unread."""
    args, modules = stock_modules(config)
    report.top_k, report.vocab_size = top_k(args), vocabulary(args)
    layout = open_modules(report.directory, modules)
    headers = checkpoint_headers(report.directory)
    everything = trunk_bytes({name: info for name, (_, info) in headers.items()})
    report.trunk_bytes = everything - layout.total_bytes
    report.bits = tuple(sorted({found.bits for found, _ in quantizations(layout, modules)}))
    report.layout = layout
    check_readable(headers)
    with named(report.directory, "its weights do not fit its config.json", REMEDY):
        load_model(
            report.directory,
            lazy=True,
            model_config={"model_file": None},
            get_model_classes=lambda config: stock_classes(config),
        )


def _index(report: ModelReport) -> None:
    path = report.directory / INDEX
    try:
        content = read_object(path, "Download it again.").get("weight_map")
    except FileNotFoundError:
        return
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        raise FlashMoEError(
            f"{path}: damaged (weight_map does not map names to files). Download it again."
        )
    listed = set(content.values())
    missing = sorted(name for name in listed if not exists(report.directory / name))
    if missing:
        raise FlashMoEError(
            f"{path}: lists {missing[0]}, which is missing ({len(missing)} of {len(listed)} files "
            "are missing). Download or convert it again."
        )


def _trunk(report: ModelReport) -> None:
    if report.layout:
        return  # a model of mlx-lm
    headers = checkpoint_headers(report.directory)
    report.trunk_bytes = trunk_bytes(without_experts(headers))
    if report.args:
        check_trunk(report.directory, headers, report.args)


def _experts(report: ModelReport) -> None:
    if (args := report.args) is None:
        return
    layout = open_layout(report.directory, args.num_hidden_layers, args.num_experts)
    found = quantizations(layout, args.expert_modules())
    report.bits = tuple(sorted({quantization.bits for quantization, _ in found}))
    report.layout = layout


def _settings(report: ModelReport) -> None:
    """Check that the model loads with the settings of config.json and the environment."""
    if (layout := report.layout) is None:
        return
    settings = read_config(report.directory).get("flashmoe") or {}
    stream = StreamConfig.resolve(settings)
    count = stream.experts_per_token or report.top_k
    fewest = min(layer.num_experts for layer in layout.layers)
    if layout.placement:  # a token's experts may all be other machines'
        count = min(count, fewest)
    check_top_k(count, fewest, "experts_per_token")
    plan_cache(stream.expert_cache, layout, count, report.trunk_bytes or 0, free_bytes())


def free_bytes() -> int:
    """Return the bytes that experts can take: the GPU's own memory if it has some, else RAM."""
    own = choose().free_bytes
    return available_bytes() if own is None else own


def _tokenizer(report: ModelReport) -> None:
    if report.vocab_size is not None:
        check_tokenizer(report.directory, report.vocab_size)
