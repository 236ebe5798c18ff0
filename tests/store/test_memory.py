"""Peak memory at true shape. `tools/measure_memory.py` does the same with more layers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from measure_memory import measure


def test_convert_and_generate_stay_within_trunk_and_bank(tmp_path):
    """Two layers of the 35B geometry: 0.9 GB of experts, of which the bank holds 72."""
    result = measure(tmp_path, "35b", layers=2, expert_cache="128MiB")
    assert result["convert"] <= result["limit"]
    assert result["generate"] <= result["limit"]
