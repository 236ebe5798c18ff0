"""The checkpoint on the Hub, its server, and a conversion that was interrupted."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_helpers import (
    extras,
    fused,
    make_config,
    make_weights,
    spell,
)
from hub_helpers import NAME, save_chain, serving
from hub_server import HubServer

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.write import output


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    weights = spell(fused(make_weights(make_config())), "model.language_model.") | extras()
    save_chain(root / "chain", weights, 400_000)
    convert(root / "chain", root / "whole", quantize=True)
    return root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[HubServer]:
    with serving(root, tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="session")
def half_done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that was interrupted at its fifth step."""
    folder, real, steps = tmp_path_factory.mktemp("half"), output.write_weights, []

    def write_weights(*arguments):
        steps.append(arguments)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with serving(root, folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_weights", write_weights)
        with pytest.raises(KeyboardInterrupt):
            convert(NAME, folder / "out", quantize=True)
    return folder / "out"


@pytest.fixture
def half(half_done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half_done, tmp_path / "half")


@pytest.fixture(scope="session")
def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "chain").glob("*.safetensors"))


@pytest.fixture(scope="session")
def sizes(root: Path, files: list[str]) -> dict[str, int]:
    return {name: (root / "chain" / name).stat().st_size for name in files}
