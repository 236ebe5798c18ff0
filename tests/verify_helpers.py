"""What verification finds in a conversion of `hf`, and where its parts lie."""

from pathlib import Path

from convert_helpers import contents

from flashmoe_mlx.convert.verify import repair, verify

RECORD = 13824
DATA = 16384
MANIFEST = "model_experts/manifest.json"
CARD = "README.md"  # users edit it, so it has no checksum
LAYER = "model_experts/layer_02.safetensors"


def found(out: Path) -> list[str]:
    return [str(problem) for problem in verify.verify(out)]


def assert_repaired(root: Path, out: Path) -> None:
    problems = verify.verify(out)
    assert problems
    assert repair.repair(out, problems, root / "hf") == []
    assert contents(out) == contents(root / "whole")
