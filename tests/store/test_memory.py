"""Peak memory at full size; `flashmoe-doctor --full --model DIR` measures any model's."""

from convert_helpers import unpack

from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.cli.full_check import ALLOWANCE, memory, run_apart

CONVERT = """
import sys
from flashmoe_mlx.convert import convert
from flashmoe_mlx.store.memory import peak_bytes
convert(*sys.argv[1:])
print(peak_bytes())
"""


def test_convert_and_generate_stay_within_trunk_and_bank(tmp_path):
    """Two layers of the 35B geometry: 0.9 GB of experts, of which the bank holds 72."""
    made = checkpoint(Recipe("35b", 2, 32768, 4), tmp_path / "made")
    source = unpack(made, tmp_path / "source", shards=2)
    done = run_apart("-c", CONVERT, str(source), str(tmp_path / "packed"))
    report, bank = examine(tmp_path / "packed"), 128 << 20
    assert int(done.stdout.splitlines()[-1]) <= report.trunk_bytes + bank + ALLOWANCE, done.stderr
    right, said = memory(report, bank)
    assert right, said
