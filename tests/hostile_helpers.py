"""A copy of the bundled model to spoil, and the check that it is refused."""

import json
from pathlib import Path

import pytest

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.loader import BUNDLED_MODEL

CONFIG = json.loads((BUNDLED_MODEL / "config.json").read_text())


def copy_bundled(model: Path) -> Path:
    """Copy the bundled model, with links to its weights."""
    model.mkdir()
    for path in BUNDLED_MODEL.iterdir():
        if path.suffix == ".safetensors":
            (model / path.name).symlink_to(path)
        else:
            (model / path.name).write_bytes(path.read_bytes())
    return model


def refused(model: Path, message: str) -> None:
    """Check that `load` raises, and that the doctor lists a problem."""
    with pytest.raises(FlashMoEError, match=message) as caught:
        load(model)
    assert len(str(caught.value)) < 1300
    assert examine(model).problems


def edit(path: Path, **entries) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))
