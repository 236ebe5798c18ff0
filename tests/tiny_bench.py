"""The tiny geometry that the tests of flashmoe-bench run."""

from flashmoe_mlx.bench.synthetic import Recipe

RECIPE = Recipe("tiny", 4, 512, 4)
RECORD = 13824
SLOTS = 6
SMALL_BANK = str(SLOTS * 4 * RECORD)
