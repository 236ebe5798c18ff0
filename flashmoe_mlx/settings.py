"""User settings: how experts are streamed."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from .errors import FlashMoEError

SHARDING = ("auto", "exact", "tensor")
LOOKAHEAD = ("auto", "on", "off")
MOST_CACHE = 1 << 50  # bytes, above any machine's memory
MOST_THREADS = 1024  # of the reader
MOST_RANKS, MOST_WEIGHT = 1024, 999
PREFIX = "FLASHMOE_"
OTHER_VARIABLES = ("KERNELS", "MODEL", "DEBUG_BOUNDS")  # read where they apply, not by StreamConfig
IO_MODES = ("auto", "buffered", "direct")
UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS |= {_letter: 1024**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_size(value: int | str, name: str) -> int | str:
    """Read a number of bytes: 536870912, "512MiB", "4GB", "1.5g", or "auto".

    Raises:
        FlashMoEError: any other value; `name` is the setting in the message.
    """
    if value == "auto":
        return value
    size: float = 0
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", value.strip().lower())
        if match and match[2] in UNITS:
            size = float(match[1]) * UNITS[match[2]]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size > MOST_CACHE:
        raise FlashMoEError(
            f"{name} = {str(value)[:80]} is more memory than any machine has. Give at most "
            f"{MOST_CACHE >> 40}TiB, or auto."
        )
    if size <= 0:
        raise FlashMoEError(
            f"{name} = {value!r} is not a size. Write bytes or a unit, such as 512MiB, 4GiB, or "
            "auto."
        )
    return int(size)


def parse_weights(text: str, name: str) -> tuple[int, ...]:
    """Read each rank's share, such as "2,1".

    Raises:
        FlashMoEError: it is not a list of positive whole numbers; `name` is the setting.
    """
    parts = str(text).split(",")
    if len(parts) <= MOST_RANKS and all(
        p.strip().isdecimal() and 0 < int(p) <= MOST_WEIGHT for p in parts
    ):
        return tuple(map(int, parts))
    raise FlashMoEError(
        f"{name} = {text!r} is not one whole number from 1 to {MOST_WEIGHT} per rank. Write 2,1 if "
        "the first of two machines shall have two thirds of the experts."
    )


@dataclass(frozen=True)
class StreamConfig:
    """How experts are streamed.

    Attributes:
        expert_cache: bytes for the experts of all layers together, or "auto".
        io_threads: reader threads.
        io_mode: "buffered" reads through the page cache, "direct" reads past it, or "auto".
        experts_per_token: top-k instead of the checkpoint's, or None.
        stats: print the counters at exit.
        verify: compare every expert with its checksum after its read.
        lookahead: "on" prefetches experts, "off" does not; "auto" times both.
        sharding: how several machines share a model: "exact" as one machine computes, to the bit;
            "tensor" splits the trunk as well, as mlx-lm does; "auto" is exact except that each
            machine adds up its experts of a prompt's token before they are sent.
        rank_weights: each machine's share of the experts, such as "2,1"; None for equal ones.
        collective_timeout: seconds after which a machine that waits for another one gives up.
    """

    expert_cache: int | str = "auto"
    io_threads: int = 8
    experts_per_token: int | None = None
    stats: bool = False
    io_mode: str = "auto"
    verify: bool = False
    lookahead: str = "auto"
    sharding: str = "auto"
    rank_weights: tuple[int, ...] | None = None
    collective_timeout: int = 60

    @classmethod
    def resolve(cls, from_config: Mapping[str, Any], **explicit: Any) -> Self:
        """Merge settings: explicit arguments, then FLASHMOE_* variables, then config.json.

        Args:
            from_config: the "flashmoe" entry of config.json.
            explicit: values from the caller; None means not given.

        Raises:
            FlashMoEError: a value is invalid; the message names its source.
        """
        check_variables()
        settings: dict[str, Any] = {}
        names = [f.name for f in fields(cls)]
        if unknown := from_config.keys() - {*names, "format_version"}:
            raise FlashMoEError(
                f'config.json "flashmoe": unknown setting {", ".join(sorted(unknown))}. '
                f"Choose among {', '.join(names)}."
            )
        for f in fields(cls):
            variable = f"{PREFIX}{f.name.upper()}"
            if explicit.get(f.name) is not None:
                source, value = f.name, explicit[f.name]
            elif os.environ.get(variable):
                source, value = variable, os.environ[variable]
            elif from_config.get(f.name) is not None:
                source, value = f'config.json "flashmoe": {f.name}', from_config[f.name]
            else:
                continue
            settings[f.name] = _read_setting(f.name, value, source)
        return cls(**settings)


def check_variables() -> None:
    """Refuse a FLASHMOE_* variable that nothing reads, which is probably misspelt.

    Raises:
        FlashMoEError: naming it and the most similar one.
    """
    known = [f"{PREFIX}{f.name.upper()}" for f in fields(StreamConfig)]
    known += [f"{PREFIX}{name}" for name in OTHER_VARIABLES]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise FlashMoEError(
                f"{name}: no environment variable of flashmoe-mlx has this name. Did you mean "
                f"{nearest}? Otherwise unset it."
            )


def _read_setting(setting: str, value: Any, source: str) -> Any:
    if setting == "expert_cache":
        return parse_size(value, source)
    if setting == "rank_weights":
        return parse_weights(value, source)
    choices = {"io_mode": IO_MODES, "lookahead": LOOKAHEAD, "sharding": SHARDING}.get(setting)
    if choices:
        if value in choices:
            return value
        raise FlashMoEError(f"{source} = {value!r} is not one of {', '.join(choices)}.")
    if setting in ("stats", "verify"):
        if str(value).lower() in ("0", "false", "1", "true"):
            return str(value).lower() in ("1", "true")
        raise FlashMoEError(f"{source} = {value!r} must be 1 or 0.")
    if re.fullmatch(r"[0-9]{1,9}", str(value)) and int(value) >= 1:
        if setting == "io_threads" and int(value) > MOST_THREADS:
            raise FlashMoEError(f"{source} = {value} is too many. Give at most {MOST_THREADS}.")
        return int(value)
    raise FlashMoEError(f"{source} = {value!r} is not a whole number of at least 1.")
