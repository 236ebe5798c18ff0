"""The conversion from end to end: open, plan, check, write, and the manifest last."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashmoe_mlx.convert.act import CHECKSUM, write_layer, write_trunk
from flashmoe_mlx.convert.hub import located
from flashmoe_mlx.convert.parts import Options, Plan, Quant
from flashmoe_mlx.convert.plan import build_plan
from flashmoe_mlx.convert.read import Reader
from flashmoe_mlx.convert.source import INDEX, Source, open_source
from flashmoe_mlx.convert.write import copy_file, sync_directory, write_file, write_json
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.layout import EXPERT_DIR, MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION

MODEL_FILE = "flashmoe_model.py"
SHIM = "from flashmoe_mlx.loader import bind\nModel, ModelArgs = bind(__file__)\n"
COPIED = (
    "tokenizer*", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.jsonl", "LICENSE*",
)  # fmt: skip
_WRITTEN_ANEW = ("config.json", MODEL_FILE)


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    link: bool = False,
) -> None:
    """Convert a Qwen3.5 MoE checkpoint into a directory that streams its experts from disk.

    Args:
        hf_path: a checkpoint's directory, or its name on the Hugging Face Hub.
        mlx_path: the directory to write; it must not exist.
        quantize: quantise the experts (and the trunk, if the source is not quantised).
        q_group_size: weights that share a scale and a bias; 64 unless given.
        q_bits: bits of an expert's weight; 4 unless given.
        dtype: "bfloat16", "float16" or "float32" for what is not quantised; else the config's.
        revision: branch, tag or commit on the Hub.
        dry_run: print what would be written, and write nothing; from the Hub, headers are enough.
        link: stream from the (quantised MLX) source where it lies instead of copying it.

    Raises:
        FlashMoEError: the source, the options or the disk does not allow it. If it happens after
            writing began, the directory has no manifest, and is not taken for a whole one.
    """
    out = Path(mlx_path).expanduser()
    _check_absent(out)
    options = Options(quantize, q_bits, q_group_size, dtype)
    if link and options != Options():
        raise FlashMoEError("--link copies nothing, so -q and --dtype have no effect. Drop them.")
    with located(str(hf_path), revision, headers_only=dry_run) as (directory, commit):
        source = open_source(directory, str(hf_path), commit)
        _convert(source, options, out, dry_run, link)


def _convert(source: Source, options: Options, out: Path, dry_run: bool, link: bool) -> None:
    plan = build_plan(source, options)
    if link:
        _check_linkable(source)
    needed = 0 if link else plan.trunk_bytes + plan.expert_bytes
    free = shutil.disk_usage(_existing_parent(out)).free
    if dry_run:
        print(describe(source, plan, out, needed, free))
        return
    if needed > free:
        raise FlashMoEError(
            f"{out}: the conversion needs {_human(needed)}, but only {_human(free)} are free. "
            "Free some space, choose another --mlx-path, or fewer --q-bits."
        )
    with _unfinished(out):
        (out / EXPERT_DIR).mkdir(parents=True)
        write_json(out / "config.json", dict(sorted(plan.config.items())))
        write_file(out / MODEL_FILE, SHIM.encode())
        details = _link(source, out) if link else _write(source, plan, out)
        head = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION}
        sync_directory(out / EXPERT_DIR)
        sync_directory(out)
        write_json(out / EXPERT_DIR / MANIFEST, head | details)
        sync_directory(out / EXPERT_DIR)


def describe(source: Source, plan: Plan, out: Path, needed: int, free: int) -> str:
    """Return the plan in words."""
    records = sorted({layer.record_bytes for layer in plan.layers})
    before = sorted({_kind(p.before) for layer in plan.layers for p in layer.projections})
    after = sorted({_kind(p.after) for layer in plan.layers for p in layer.projections})
    rows = (
        ("source", f"{source.name} (experts: {', '.join(before)})"),
        ("target", f"{out} (experts: {', '.join(after)})"),
        ("layers", f"{len(plan.layers)}, of {source.dims.experts} experts each"),
        ("one expert", f"{' or '.join(f'{size:,}' for size in records)} bytes"),
        ("trunk", f"{plan.trunk_bytes:,} bytes ({_human(plan.trunk_bytes)})"),
        ("experts", f"{plan.expert_bytes:,} bytes ({_human(plan.expert_bytes)})"),
        ("to write", f"{needed:,} bytes ({_human(needed)})"),
        (
            "free disk",
            f"{free:,} bytes ({_human(free)})" + (", too little" if needed > free else ""),
        ),
    )
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _kind(quant: Quant | None) -> str:
    return f"{quant.bits} bits, groups of {quant.group_size}" if quant else "floats"


def _human(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"


def _check_absent(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    unfinished = (out / EXPERT_DIR).is_dir() and not (out / EXPERT_DIR / MANIFEST).exists()
    state = "is an unfinished conversion" if unfinished else "exists already"
    raise FlashMoEError(f"{out}: {state}. Delete it, or give another --mlx-path.")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextmanager
def _unfinished(out: Path) -> Iterator[None]:
    """Say with every error that the directory is not whole."""
    advice = f"{out} is unfinished: delete it and convert again."
    try:
        yield
    except FlashMoEError as error:
        raise FlashMoEError(f"{error} {advice}") from error
    except OSError as error:
        place = error.filename or out
        raise FlashMoEError(f"{place}: cannot be written ({error.strerror}). {advice}") from error


def _write(source: Source, plan: Plan, out: Path) -> dict[str, Any]:
    """Write everything but the manifest, and return the manifest's content."""
    for path in copied_files(source.directory):
        copy_file(path, out / path.name)
    layers = []
    total = plan.trunk_bytes + plan.expert_bytes
    with (
        Reader() as reader,
        tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar,
    ):
        for file in plan.trunk:
            bar.set_description(file.name)
            write_trunk(file, out, reader, bar.update)
        write_index(plan, out)
        for layer in plan.layers:
            bar.set_description(layer.file)
            records = write_layer(source, layer, out / EXPERT_DIR, reader, bar.update)
            size = (out / EXPERT_DIR / layer.file).stat().st_size
            layers.append({"file": layer.file, "size": size, "records": records})
    return {
        "source": origin(source),
        "num_experts": source.dims.experts,
        "checksum": CHECKSUM,
        "layers": layers,
    }


def write_index(plan: Plan, out: Path) -> None:
    """Write the index of the trunk's files, as mlx-lm does."""
    names = {spec.name: file.name for file in plan.trunk for spec in file.outputs}
    index = {
        "metadata": {"total_size": plan.trunk_bytes},
        "weight_map": dict(sorted(names.items())),
    }
    write_json(out / INDEX, index)


def origin(source: Source) -> dict[str, str]:
    """Return where a source came from, for the manifest."""
    if source.revision:
        return {"repo": source.name, "revision": source.revision}
    return {"path": str(source.directory.resolve())}


def copied_files(directory: Path) -> list[Path]:
    """Return the tokenizer, template and generation files that go along byte for byte."""
    names = {path.name for pattern in COPIED for path in directory.glob(pattern) if path.is_file()}
    names -= {*_WRITTEN_ANEW, INDEX}
    return [directory / name for name in sorted(names)]


def _check_linkable(source: Source) -> None:
    if source.layout is None or source.layout.kind != "stock":
        raise FlashMoEError(
            f"{source.directory}: --link needs an MLX checkpoint with stacked experts, and this is "
            "a directory that flashmoe-convert wrote. Use it as it is."
        )


def _link(source: Source, out: Path) -> dict[str, Any]:
    """Symlink the source's files, and return the manifest's content."""
    directory = source.directory.resolve()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in _WRITTEN_ANEW:
            os.symlink(path, out / path.name)
    return {"link": str(directory)}
