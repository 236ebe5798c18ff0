"""What others measured and published, beside what `plan_model` predicts for it.

None of these figures is ours. A row is "fitted" if a constant was taken from it, and "assumed" if
it needs a fact that its authors do not state; only the others count as predicted.
"""

from dataclasses import dataclass
from typing import Any

from ..cli.plan_model import Engine, Machine, decode, hit_rate, named_args, prefill_seconds, weigh

GITHUB = "https://github.com/"
FLASH_MOE_Q4 = GITHUB + "danveloper/flash-moe/blob/main/docs/optimization-experiments-q4.md"
FLASH_MOE_PAPER = GITHUB + "danveloper/flash-moe/blob/main/paper/flash_moe.tex"
M5_CACHE_SPLIT = GITHUB + "gorroai/flash-moe/blob/main/docs/cache-io-split-results.md"
M5_CLEAN = GITHUB + "gorroai/flash-moe/blob/main/docs/q3-vs-4bit-clean-timing-report.md"
GORROAI = GITHUB + "gorroai/flash-moe/blob/main/README.md"
PATP = GITHUB + "danveloper/flash-moe/issues/18"
M4_PRO_24 = GITHUB + "danveloper/flash-moe/pull/21"
AWAS = GITHUB + "awas-k/flash-moe-M1/blob/main/README.md"
TAYOUN = GITHUB + "tayoun/flash-moe/blob/main/README.md"
KYLELINGER = GITHUB + "kylelinger/flash-moe-35b/blob/main/README.md"
SHIPSTUFF = GITHUB + "shipstuff/flash-moe/blob/main/benchmarks/2026-04-10-post-repack-e2e.md"
OPENCLAW = "https://openclawradar.com/article/flash-moe-benchmark-m5-max-qwen-397b"
ANEMLL = GITHUB + "Anemll/anemll-flash-mlx/blob/main/README.md"
SWIFTLM = GITHUB + "SharpAI/SwiftLM/pull/26"
SWIFTLM_35B = GITHUB + "SharpAI/SwiftLM/blob/main/README.md"
STREAMLX = GITHUB + "srcterm/streamlx/blob/main/README.md"
FBUNDLE = GITHUB + "fbundle/flash-moe/blob/main/reports/REPORT.md"
MAC_MLX = GITHUB + "magicnight/Mac-MLX/issues/24"
SPLASH = GITHUB + "incoai/splash/issues/37"

M5_SSD = GITHUB + "ml-explore/mlx-lm/issues/1438"
M5_BANDWIDTH = "https://news.while1.co.il/article/33565624"
M4_BANDWIDTH = GITHUB + "jaeseok614/llm-gpu-checker-ko/releases/tag/v7.21.3"
M4_MAX_BANDWIDTH = "https://sianzzz.com/apple-announces-m4-max-chip-debuting-on-the-macbook-pro"
# Apple states 14.5 GB/s for the M5 generation and "up to 2x" of the one before.
M4_SSD = "https://sfnews.us/apple-macbook-pro-m5-pro-max-2026-what-changes (half of 14.5 GB/s)"
M3_ULTRA_SSD = GITHUB + "penta2himajin/qwisp/issues/84"
M3_ULTRA_BANDWIDTH = "https://techpowerup.com/news-tags/Mac%20Studio"
M1_ULTRA_BANDWIDTH = (
    "https://lifewiress.pages.dev/posts/apple-s-m1-ultra-chip-boasts-even-better-performance"
)
M1_ULTRA_SSD = GITHUB + "SharpAI/SwiftLM/issues/24"


def _machine(gigabytes: int, ssd: float, bandwidth: int, source: str) -> Machine:
    return Machine(gigabytes * 1e9, ssd * 1e9, bandwidth * 1e9, source)


MACHINES = {
    "m1-pro-16": _machine(16, 5.3, 200, AWAS),
    "m1-ultra-64": _machine(64, 6.0, 800, f"SSD {M1_ULTRA_SSD}, memory {M1_ULTRA_BANDWIDTH}"),
    "m3-max-48": _machine(48, 4.9, 400, FLASH_MOE_Q4),
    "m3-max-128": _machine(128, 4.9, 400, f"SSD as m3-max-48, memory {SPLASH}"),
    "m3-ultra-96": _machine(96, 4.4, 819, f"SSD {M3_ULTRA_SSD}, memory {M3_ULTRA_BANDWIDTH}"),
    "m4-16": _machine(16, 2.4, 120, f"SSD as m4-32, memory {AWAS}"),
    "m4-32": _machine(32, 2.4, 120, f"SSD {STREAMLX}, memory {M4_BANDWIDTH}"),
    "m4-pro-24": _machine(24, 7.25, 273, f"SSD {M4_SSD}, memory {M4_PRO_24}"),
    "m4-pro-64": _machine(64, 7.25, 273, f"SSD {M4_SSD}, memory {M4_BANDWIDTH}"),
    "m4-max-128": _machine(128, 7.25, 546, f"SSD {M4_SSD}, memory {M4_MAX_BANDWIDTH}"),
    "m5-max-128": _machine(128, 13.5, 614, f"SSD {M5_SSD}, memory {M5_BANDWIDTH}"),
}

# Seconds of one layer, each from the one row that is marked as fitted.
FLASH_MOE = Engine(1.0e-3)
FLASH_MOE_PREFETCH = Engine(FLASH_MOE.layer_seconds, overlaps=True)
ANEMLL_MLX = Engine(0.439e-3)
SWIFTLM_MLX = Engine(3.03e-3)
MLX_RESIDENT = Engine(0.194e-3)
ENGINES = {"flash-moe": FLASH_MOE, "anemll-flash-mlx": ANEMLL_MLX, "swiftlm": SWIFTLM_MLX}
ALL = 512  # slots: every expert of the largest model


@dataclass(frozen=True)
class Setup:
    """Who measured what, where: keys of GEOMETRIES and MACHINES, and the publication."""

    name: str
    model: str
    machine: str
    engine: Engine
    source: str


@dataclass(frozen=True)
class Row:
    """One published measurement.

    Attributes:
        published: in `unit`: "tok/s" decoded, "ms" of a token spent on getting experts, "% hits"
            of the bank (of the page cache if there is none), or "tok/s prefill".
        slots: experts per layer that the engine keeps itself.
        tokens: of a prompt that is read expert-major; without them prefill is decoding.
    """

    setup: Setup
    name: str
    published: float
    unit: str = "tok/s"
    bits: float = 4
    top_k: int = 4
    slots: float = 0
    kind: str = "predicted"
    tokens: int = 0

    def predicted(self) -> float:
        """Return what the model says, in the row's unit."""
        weights = weigh(named_args(self.setup.model), self.bits, self.top_k)
        machine, engine = MACHINES[self.setup.machine], self.setup.engine
        bank = min(self.slots, weights.experts) * weights.layers * weights.record
        found = decode(weights, machine, engine, bank)
        if self.unit == "% hits":
            return 100 * hit_rate((bank or found.page_cache) / weights.expert_bytes)
        if self.unit == "ms":
            return 1e3 * (found.copied + found.read)
        if self.tokens:
            return self.tokens / prefill_seconds(weights, machine, engine, self.tokens, bank)
        return 1 / found.seconds

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted() / self.published - 1

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {
            "row": f"{self.setup.name}, {self.name}",
            "unit": self.unit,
            "published": self.published,
            "predicted": self.predicted(),
            "error": self.error,
            "kind": self.kind,
            "source": self.setup.source,
        }


def _gib(budget: float) -> float:
    """Return the slots per layer of the 35B at 4 bits that a budget in GiB holds."""
    return budget * 2**30 / (40 * 1_769_472)


_M3 = Setup("Flash-MoE, M3 Max 48 GB", "397b", "m3-max-48", FLASH_MOE, FLASH_MOE_Q4)
_M3_PAPER = Setup("Flash-MoE, M3 Max 48 GB", "397b", "m3-max-48", FLASH_MOE, FLASH_MOE_PAPER)
_M4_PRO_24 = Setup("Flash-MoE, M4 Pro 24 GB", "397b", "m4-pro-24", FLASH_MOE, M4_PRO_24)
_SHIPSTUFF = Setup("shipstuff, M4 Pro (64 GB?)", "397b", "m4-pro-64", FLASH_MOE, SHIPSTUFF)
_M5 = Setup("Anemll fork, M5 Max 128 GB", "397b", "m5-max-128", FLASH_MOE, M5_CLEAN)
_M5_POOL = Setup("Anemll fork, M5 Max 128 GB", "397b", "m5-max-128", FLASH_MOE, M5_CACHE_SPLIT)
_M5_README = Setup("Anemll fork, M5 Max 128 GB", "397b", "m5-max-128", FLASH_MOE, GORROAI)
_M5_OTHER = Setup("Anemll fork, another M5 Max", "397b", "m5-max-128", FLASH_MOE, OPENCLAW)
_GORROAI = Setup("gorroai, M5 Max 128 GB", "397b", "m5-max-128", FLASH_MOE_PREFETCH, GORROAI)
_PATP_M5 = Setup("patp, M5 Max 128 GB", "397b", "m5-max-128", FLASH_MOE, PATP)
_PATP_M3 = Setup("patp, M3 Ultra 96 GB", "397b", "m3-ultra-96", FLASH_MOE, PATP)
_M1_PRO = Setup("awas-k, M1 Pro 16 GB", "35b", "m1-pro-16", FLASH_MOE, AWAS)
_TAYOUN = Setup("tayoun, M4 16 GB", "35b", "m4-16", FLASH_MOE, TAYOUN)
_KYLELINGER = Setup("kylelinger, M4 16 GB", "35b", "m4-16", FLASH_MOE, KYLELINGER)
_FBUNDLE = Setup("fbundle, M4 (32 GB?)", "35b", "m4-32", FLASH_MOE, FBUNDLE)
_SWIFTLM = Setup("SwiftLM, M1 Ultra 64 GB", "122b", "m1-ultra-64", SWIFTLM_MLX, SWIFTLM)
_ANEMLL = Setup("anemll-flash-mlx, M5 Max", "35b", "m5-max-128", ANEMLL_MLX, ANEMLL)
_ANEMLL_ALL = Setup("anemll-flash-mlx, M5 Max", "35b", "m5-max-128", MLX_RESIDENT, ANEMLL)
_STREAMLX = Setup("streamlx, M4 Air 32 GB", "35b", "m4-32", ANEMLL_MLX, STREAMLX)
_STREAMLX_ALL = Setup("streamlx, M4 Air 32 GB", "35b", "m4-32", MLX_RESIDENT, STREAMLX)
_MAC_MLX = Setup("Mac-MLX, M5 Max 128 GB", "35b", "m5-max-128", MLX_RESIDENT, MAC_MLX)
_OMLX = Setup("oMLX (Ornith), M3 Max 128 GB", "35b", "m3-max-128", MLX_RESIDENT, SPLASH)
_SWIFTLM_ALL = Setup("SwiftLM, M1 Ultra 64 GB", "35b", "m1-ultra-64", MLX_RESIDENT, SWIFTLM_35B)

ROWS = (
    Row(_M3, "4-bit", 4.36, kind="fitted"),
    Row(_M3, "4-bit, before its FMA kernel", 3.90),
    Row(_M3, "2-bit", 5.74, bits=2),
    Row(_M4_PRO_24, "4-bit", 3.50),
    Row(_SHIPSTUFF, "4-bit", 6.01, kind="assumed"),
    Row(_M5, "4-bit", 9.46),
    Row(_M5, "3-bit", 11.15, bits=3),
    Row(_M5_README, "2-bit", 14.5, bits=2),
    Row(_M5_POOL, "4-bit, reads split in 4", 10.95),
    Row(_M5_POOL, "3-bit, reads split in 4", 12.52, bits=3),
    Row(_M5_OTHER, "4-bit, reads split in 4", 12.99),
    Row(_M5_OTHER, "2-bit", 12.65, bits=2),
    Row(_GORROAI, "3-bit, prefetch", 21.48, bits=3),
    Row(_PATP_M5, "4-bit", 19.76, kind="assumed"),
    Row(_PATP_M3, "4-bit", 15.19, kind="assumed"),
    Row(_M1_PRO, "4-bit, K=3", 13.36, top_k=3),
    Row(_M1_PRO, "4-bit, K=4", 12.22, top_k=4),
    Row(_M1_PRO, "4-bit, K=5", 11.13, top_k=5),
    Row(_M1_PRO, "4-bit, K=6", 9.71, top_k=6),
    Row(_M1_PRO, "4-bit, K=8", 8.28, top_k=8),
    Row(_TAYOUN, "4-bit, K=6", 11.5, top_k=6),
    Row(_KYLELINGER, "4-bit, K=4", 6.61),
    Row(_SWIFTLM, "4-bit, K=8", 4.95, top_k=8, kind="fitted"),
    Row(_SWIFTLM, "4-bit, K=6", 5.20, top_k=6),
    Row(_SWIFTLM, "4-bit, K=4", 5.91, top_k=4),
    Row(_SWIFTLM, "4-bit, K=2", 6.52, top_k=2),
    Row(_ANEMLL, "4-bit, 128 slots", 47.1, slots=128, kind="fitted"),
    Row(_ANEMLL, "4-bit, 64 slots", 42.8, slots=64),
    Row(_ANEMLL, "4-bit, 16 slots", 17.1, slots=16),
    Row(_ANEMLL, "2-bit, 128 slots", 42.2, bits=2, slots=128),
    Row(_ANEMLL, "2-bit, 64 slots, cold", 20.9, bits=2, slots=64),
    Row(_STREAMLX, "4-bit, 8 GiB", 7.2, top_k=8, slots=_gib(8)),
    Row(_STREAMLX, "4-bit, 12 GiB", 7.6, top_k=8, slots=_gib(12)),
    Row(_STREAMLX, "4-bit, 16 GiB", 15.9, top_k=8, slots=_gib(16)),
    Row(_ANEMLL_ALL, "4-bit, resident", 94.5, slots=ALL, kind="fitted"),
    Row(_ANEMLL_ALL, "2-bit, resident", 86.8, bits=2, slots=ALL),
    Row(_STREAMLX_ALL, "4-bit, resident", 33.3, top_k=8, slots=ALL),
    Row(_OMLX, "4-bit, resident", 96.2, top_k=8, slots=ALL),
    Row(_MAC_MLX, "4-bit, resident", 133.5, top_k=8, slots=ALL),
    Row(_SWIFTLM_ALL, "4-bit, resident", 62.3, top_k=8, slots=ALL),
    Row(_KYLELINGER, "K=4, token by token", 8.6, "tok/s prefill"),
    Row(_SHIPSTUFF, "token by token", 4.40, "tok/s prefill", kind="assumed"),
    Row(_FBUNDLE, "128 tokens", 17.8, "tok/s prefill", top_k=8, tokens=128, kind="assumed"),
    Row(_M3, "4-bit experts", 144.6, "ms", kind="fitted"),
    Row(_M3_PAPER, "2-bit experts", 82.2, "ms", bits=2),
    Row(_M5, "4-bit experts", 50.6, "ms"),
    Row(_M5, "3-bit experts", 37.2, "ms", bits=3),
    Row(_M5_README, "2-bit experts", 21.0, "ms", bits=2),
    Row(_M1_PRO, "4-bit experts, K=4", 25.6, "ms"),
    Row(_SHIPSTUFF, "4-bit experts", 80.2, "ms", kind="assumed"),
    Row(_M3_PAPER, "16 slots", 49, "% hits", slots=16, kind="fitted"),
    Row(_M3_PAPER, "32 slots", 59, "% hits", slots=32, kind="fitted"),
    Row(_M3_PAPER, "64 slots", 68, "% hits", slots=64, kind="fitted"),
    Row(_M3_PAPER, "128 slots", 71, "% hits", slots=128, kind="fitted"),
    Row(_M3, "page cache", 71, "% hits"),
    Row(_ANEMLL, "16 slots", 59.5, "% hits", slots=16),
    Row(_ANEMLL, "64 slots", 80.8, "% hits", slots=64),
    Row(_ANEMLL, "128 slots", 82.7, "% hits", slots=128),
    Row(_STREAMLX, "8 GiB", 91.7, "% hits", top_k=8, slots=_gib(8)),
    Row(_STREAMLX, "12 GiB", 94.8, "% hits", top_k=8, slots=_gib(12)),
    Row(_STREAMLX, "16 GiB", 96.4, "% hits", top_k=8, slots=_gib(16)),
)


def tally(limit: float = 0.2) -> tuple[int, int]:
    """Return how many predicted decode rows lie within the limit, and how many there are."""
    rows = [row for row in ROWS if row.unit == "tok/s" and row.kind == "predicted"]
    return sum(abs(row.error) <= limit for row in rows), len(rows)
