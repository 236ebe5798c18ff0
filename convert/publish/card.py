"""The model card of a converted directory, README.md: what it is, how it was made, how to run it.

It depends on source and options alone, so that a conversion which goes on ends in the same bytes.
The manifest leaves it out: a card is there to be edited.
"""

import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ..plan.parts import Options, Plan, flags
from ..source.checkpoint import Source
from ..source.foreign_code import ForeignCode
from ..source.hub import CARD, reason
from ..write.describe import human
from ..write.output import brought_code

PLACE = "DIR"  # how a card calls its directory; an uploaded one has the repository's name
# Of the source's card. What was measured with the source's weights is left behind.
KEPT = (
    "base_model", "datasets", "language", "license", "license_link", "license_name", "tags",
)  # fmt: skip
TAGS = "mlx", "flashmoe"
PLAIN = str | int | float | bool | None

TEXT = """
# {title}, experts on disk

{source} in a form whose routed experts stay on the SSD and are read as they are needed, so that
the model may be larger than memory. Stock [mlx-lm](https://github.com/ml-explore/mlx-lm) runs it
with the package flashmoe-mlx installed.

| | |
|---|---|
| made from | {origin} |
| experts | {experts} |
| each | {record} bytes; {count} in each of {layers} layers, {top_k} a token; {expert_bytes} |
| trunk | {trunk}; {trunk_bytes}, resident in memory |

```sh
pip install flashmoe-mlx
flashmoe-generate --model {place} --prompt "Hello"
mlx_lm.generate --model {place} --trust-remote-code --prompt "Hello"
```

`--trust-remote-code` is needed because `config.json` names a two-line `flashmoe_model.py`, which
loads flashmoe-mlx. {code}

`flashmoe-convert verify` compares every byte of a downloaded copy, but for this card, with its
checksums. They are CRC-32, which finds damage, not intent.

Made by flashmoe-mlx {version} ({tools}) with

```sh
{command}
```
"""


def model_card(source: Source, plan: Plan, options: Options, tools: str) -> bytes:
    """Return the card.

    Args:
        source: the checkpoint; some of its own card's front matter is kept.
        plan: the conversion.
        options: what the user asked for.
        tools: what quantizes.

    Raises:
        FlashMoEError: the source's card has a front matter that is none.
    """
    from huggingface_hub import ModelCard, ModelCardData  # slow to import

    kept = _front_matter(source)
    tags = kept.pop("tags", None) or []
    tags = [*TAGS, *(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in TAGS)]
    if source.revision:
        kept["base_model"] = source.name
    data = ModelCardData(**kept, library_name="mlx", pipeline_tag="text-generation", tags=tags)
    text = TEXT.format(**_facts(source, plan, options), tools=tools)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")).encode()


def _facts(source: Source, plan: Plan, options: Options) -> dict[str, Any]:
    name, first, trunk = label(source), plan.layers[0], plan.config["quantization"]
    records = sorted({layer.record_bytes for layer in plan.layers})
    return {
        "title": name.rpartition("/")[2],
        "source": f"[{name}](https://huggingface.co/{name})" if source.revision else name,
        "origin": name + (f" at {source.revision}" if source.revision else ""),
        "experts": _experts(plan, options),
        "count": first.experts,
        "layers": len(plan.layers),
        "top_k": source.dims.top_k,
        "expert_bytes": human(plan.expert_bytes),
        "record": " or ".join(f"{size:,}" for size in records),
        "trunk": f"{trunk['bits']} bits, groups of {trunk['group_size']}",
        "trunk_bytes": human(plan.trunk_bytes),
        "place": PLACE,
        "code": _code(brought_code(source, plan), name),
        "version": version("flashmoe-mlx"),
        "command": command(source, options),
    }


def _code(code: ForeignCode, name: str) -> str:
    """Say whose code the flag would run besides."""
    if not code:
        return "It runs no other code of this directory."
    return (
        f"**It would also run code of {name}:** {code}.\nRead that first. `flashmoe-generate` "
        "without the flag runs none of it."
    )


def _experts(plan: Plan, options: Options) -> str:
    """Say how many bits the experts have, in groups of how many, and how they came about."""
    kinds: dict[str, list[str]] = {}
    for layer in plan.layers:
        for projection in layer.projections:
            quant = projection.after
            way = "as in the source" if projection.copied else projection.method
            if options.calibrate and not projection.copied:
                way = "calibrated"
            kind = f"{quant.bits} bits, groups of {quant.group_size}, {way}"
            names = kinds.setdefault(kind, [])
            names += [projection.name] if projection.name not in names else []
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(names)}: {kind}" for kind, names in kinds.items())


def label(source: Source) -> str:
    """Return a source's name on the Hub, or the last part of its directory's: no private path."""
    if source.revision:
        return source.name
    return " ".join(source.directory.resolve().name.split())


def command(source: Source, options: Options) -> str:
    """Return the command that makes the same again."""
    given = asdict(options)
    if options.calibrate:
        given["calibrate"] = shlex.quote(Path(options.calibrate).name)
    words = ["flashmoe-convert", "--hf-path", shlex.quote(label(source))]
    words += ["--revision", source.revision] if source.revision else []
    words += ["--mlx-path", PLACE]
    words += [flags(given)] if any(given.values()) else []
    return " ".join(words)


def _front_matter(source: Source) -> dict[str, Any]:
    """Return what is kept of the source's own card."""
    from huggingface_hub import metadata_load

    path = source.directory / CARD
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path) or {}
        kept = {key: found[key] for key in KEPT if found.get(key) is not None}
        for key, value in kept.items():
            if not all(
                isinstance(v, PLAIN) for v in (value if isinstance(value, list) else [value])
            ):
                raise ValueError(f"{key} is neither a text nor a list of texts")
    except Exception as error:  # of files, of text, of YAML's many kinds
        raise FlashMoEError(
            f"{path}: the front matter of the model card cannot be read ({reason(error)}). Correct "
            "it, or move the card away."
        ) from error
    return kept
