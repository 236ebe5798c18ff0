"""Whether a model directory is complete: every header and size, without reading the weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelArgs
from .errors import FlashMoEError
from .layout import ExpertLayout, open_layout, quantisation
from .loader import find_model, trunk_tensors
from .names import PROJECTIONS

INDEX = "model.safetensors.index.json"


@dataclass
class ModelReport:
    """What a directory holds; None where it cannot be read.

    `bits` are those of its experts' matrices, ascending, each once.
    """

    directory: Path
    problems: list[str] = field(default_factory=list)
    args: ModelArgs | None = None
    layout: ExpertLayout | None = None
    trunk_bytes: int | None = None
    bits: tuple[int, ...] = ()

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
                "experts": self.layout.layers[0].num_experts,
                "record_bytes": self.layout.record_bytes,
                "expert_bytes": self.layout.total_bytes,
            }
        if self.layout and self.args:
            values["token_bytes"] = self.layout.token_bytes * self.args.num_experts_per_tok
        return values


def examine(directory: Path) -> ModelReport:
    """Check a directory's config, trunk and experts, and list what is wrong with each.

    Raises:
        FlashMoEError: it is not a directory.
    """
    if not directory.is_dir():
        raise FlashMoEError(f"{directory}: not a directory. Give the directory of a model.")
    report = ModelReport(directory)
    for check in (_config, _trunk, _experts):
        _collect(report, check)
    return report


def _collect(report: ModelReport, check: Callable[[ModelReport], None]) -> None:
    try:
        check(report)
    except FlashMoEError as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))


def _config(report: ModelReport) -> None:
    path = find_model(report.directory)
    report.args = ModelArgs.from_dict(json.loads((path / "config.json").read_text()))


def _trunk(report: ModelReport) -> None:
    report.trunk_bytes = sum(t.nbytes for t in trunk_tensors(report.directory).values())
    path = report.directory / INDEX
    if not path.exists():
        return
    try:
        listed = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(f"{path}: damaged ({error!r}). Download it again.") from error
    missing = sorted(name for name in listed if not (report.directory / str(name)).is_file())
    if missing:
        raise FlashMoEError(
            f"{path}: lists {missing[0]}, which is missing ({len(missing)} of {len(listed)} files "
            "are). Download or convert it again."
        )


def _experts(report: ModelReport) -> None:
    if (args := report.args) is None:
        return
    layout = open_layout(report.directory, args.num_hidden_layers, args.num_experts)
    found = {
        quantisation(layer, projection, args.expert_shape(projection))[0]
        for layer in layout.layers
        for projection in PROJECTIONS
    }
    report.bits = tuple(sorted(found))
    report.layout = layout
