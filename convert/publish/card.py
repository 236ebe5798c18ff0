"""The model card of a converted directory, README.md.

It depends on source and options alone, so that a resumed conversion writes the same bytes. The
manifest omits it, because users edit it.
"""

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ..plan.parts import Options, Plan, Quant, flags
from ..plan.ranks import rank_flags
from ..source.checkpoint import Source
from ..source.hub import CARD, reason
from ..write.describe import human, kind
from ..write.output import copied_code

PLACE = "DIR"  # stands for the directory; an upload replaces it with the repository's name
# Kept from the source's card; its measurements are not, as they are of other weights.
KEPT = (
    "base_model", "datasets", "language", "license", "license_link", "license_name", "tags",
)  # fmt: skip
TAGS = "mlx", "flashmoe"
PLAIN = str | int | float | bool | None

TEXT = """
# {title}, experts on disk

{source} in a form whose routed experts stay on the SSD and are read when needed, so that the model
may be larger than memory. Stock [mlx-lm](https://github.com/ml-explore/mlx-lm) runs it once the
package flashmoe-mlx is installed.

| | |
|---|---|
| made from | {origin} |
| experts | {experts} |
| each | {record} bytes; {count} in each of {layers} layers, {top_k} per token; {expert_bytes} |
| trunk | {trunk}; {trunk_bytes}, resident in memory |

In a clone of flashmoe-mlx (on a Mac without `[cpu]`, with an NVIDIA GPU `[cuda13]` or `[cuda12]`):

```sh
pip install ".[cpu]"
flashmoe-generate --model {place} --prompt "Hello"
mlx_lm.generate --model {place} --trust-remote-code --prompt "Hello"
```

`--trust-remote-code` is needed because `config.json` names a two-line `flashmoe_model.py`, which
loads flashmoe-mlx. {code}

`flashmoe-convert verify` compares every byte of a downloaded copy, except this card, with its
checksums. They are CRC-32, which detects damage, not tampering.

Made by flashmoe-mlx {version} ({tools}) with

```sh
{command}
```
"""


def model_card(source: Source, plan: Plan, options: Options, tools: str) -> bytes:
    """Return the card; `tools` names what quantizes.

    Raises:
        FlashMoEError: the source's card has an invalid front matter.
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
    name, trunk, part = _label(source), plan.config.get("quantization"), options.placement
    records = sorted({layer.record_bytes for layer in plan.layers})
    code = "It runs no other code of this directory."
    if copied := copied_code(source, plan):
        code = (
            f"**It would also run code of {name}:** {copied}.\nRead that first. "
            "`flashmoe-generate` without the flag runs none of it."
        )
    return {
        "title": name.rpartition("/")[2],
        "source": f"[{name}](https://huggingface.co/{name})" if source.revision else name,
        "origin": name + (f" at {source.revision}" if source.revision else ""),
        "experts": _experts(plan, options) + (f"; only those of {part}" if part else ""),
        "count": plan.layers[0].experts,
        "layers": len(plan.layers),
        "top_k": source.top_k,
        "expert_bytes": human(plan.expert_bytes),
        "record": " or ".join(f"{size:,}" for size in records),
        "trunk": kind(Quant(trunk["bits"], trunk["group_size"]) if trunk else None),
        "trunk_bytes": human(plan.trunk_bytes),
        "place": PLACE,
        "code": code,
        "version": version("flashmoe-mlx"),
        "command": _command(source, options),
    }


def _experts(plan: Plan, options: Options) -> str:
    """Describe the experts' quantization, and its method, by projection."""
    kinds: dict[str, list[str]] = {}
    for layer in plan.layers:
        for projection in layer.projections:
            method = "calibrated" if options.calibrate else projection.method
            method = "as in the source" if projection.copied else method
            names = kinds.setdefault(f"{kind(projection.after)}, {method}", [])
            names += [projection.name] if projection.name not in names else []
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(names)}: {each}" for each, names in kinds.items())


def _label(source: Source) -> str:
    """Return a source's name on the Hub, or its directory's name without the private path."""
    if source.revision:
        return source.name
    return " ".join(source.directory.resolve().name.split())


def _command(source: Source, options: Options) -> str:
    """Return the command that makes the same conversion."""
    given = options.given()
    if options.calibrate:
        given["calibrate"] = shlex.quote(Path(options.calibrate).name)
    words = ["flashmoe-convert", "--hf-path", shlex.quote(_label(source))]
    words += ["--revision", source.revision] if source.revision else []
    words += ["--mlx-path", PLACE]
    words += [flags(given)] if any(given.values()) else []
    words += rank_flags(options.placement)
    return " ".join(words)


def _front_matter(source: Source) -> dict[str, Any]:
    """Return the KEPT entries of the source's own card."""
    from huggingface_hub import metadata_load

    path = source.directory / CARD
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path) or {}
        kept = {key: found[key] for key in KEPT if found.get(key) is not None}
        for key, value in kept.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, PLAIN) for v in values):
                raise ValueError(f"{key} is neither a text nor a list of texts")
    except Exception as error:  # of files, of text, of YAML's many kinds
        raise FlashMoEError(
            f"{path}: the front matter of the model card cannot be read ({reason(error)}). Correct "
            "it, or move the card away."
        ) from error
    return kept
