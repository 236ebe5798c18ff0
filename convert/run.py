"""The conversion from end to end: open, plan, check, write what is missing, the manifest last."""

import errno
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..errors import FlashMoEError
from ..format.layout import EXPERT_DIR, MANIFEST
from .plan.parts import METHODS, LayerPlan, Options, Plan
from .plan.plan import build_plan
from .publish.card import model_card
from .publish.upload import (
    Destination,
    card_of,
    check_card,
    check_finished,
    check_repo,
    impatient,
    is_finished,
    upload,
)
from .quant.calibrate import Calibration
from .source.checkpoint import Source, open_source
from .source.hub import CARD
from .source.locate import Found, located
from .source.read import Reader
from .source.shards import Shards
from .verify.loadable import check_plan, check_written
from .write.checksum import as_text
from .write.describe import describe, describe_time, human
from .write.files import write_file
from .write.journal import (
    Begun,
    Entries,
    check_output,
    data_bytes,
    finished,
    leftover_bytes,
    locked,
    remove_journal,
    remove_leftovers,
    write_journal,
)
from .write.link import check_linkable, link_source
from .write.output import MODEL_FILE as MODEL_FILE
from .write.output import SHIM as SHIM
from .write.output import place, small_files, write_manifest, write_small, write_weights
from .write.output import write_index as write_index
from .write.stamps import SourceChangedError, Stamps, source_files
from .write.steps import fetched, plan_steps


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_method: str | None = None,
    calibrate: str | Path | None = None,
    quant_predicate: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    link: bool = False,
    keep_source: bool = False,
    upload_repo: str | None = None,
    no_remote_code: bool = False,
    private: bool | None = None,
) -> None:
    """Convert a Qwen3.5 MoE checkpoint into a directory that streams its experts from disk.

    Args:
        hf_path: a checkpoint's directory, or its name on the Hugging Face Hub.
        mlx_path: the directory to write: it does not exist, is empty, or was begun by the same
            call before, which then goes on from there.
        quantize: quantize the experts (and the trunk, if the source is not quantized).
        q_group_size: weights that share a scale and a bias; 64 unless given.
        q_bits: bits of an expert's weight; 4 unless given.
        q_method: "min-max" or "least-squares", for the scales of experts; the latter below 4 bits
            unless given, else the former, which gives what mlx_lm.convert gives.
        calibrate: a text, for what experts see of which they are quantized.
        quant_predicate: a name in `recipes.RECIPES`: bits of experts matrix by matrix.
        dtype: "bfloat16", "float16" or "float32" for what is not quantized; else the config's.
        revision: branch, tag or commit on the Hub.
        dry_run: print what would be written, and write nothing; from the Hub, headers are enough.
        link: stream from the (quantized MLX) source where it lies instead of copying it.
        keep_source: download a repository whole into the Hub's own cache, where it stays. Else its
            files are fetched one after the other, and deleted when nothing more needs them. (They
            stay with `link` and `calibrate`, which need them all.)
        upload_repo: OWNER/NAME on the Hub, to upload the finished directory to. One that the same
            call made before is uploaded as it is.
        no_remote_code: leave out Python files of the source, and what of its configuration names
            code (`auto_map`), which `trust_remote_code` would run. Else they go along unchanged.
        private: whether `upload_repo` is for you or your organization only; must be said.

    Raises:
        FlashMoEError: the source, the options or the disk does not allow it. If it happens after
            writing began, the directory has no manifest, and is not taken for a whole one. The
            same call goes on with the files that are not finished.
    """
    out = Path(mlx_path).expanduser()
    if upload_repo is None and private is not None:
        raise FlashMoEError("--private and --public are about --upload-repo. Add it, or drop them.")
    if upload_repo is None or not is_finished(out):
        check_output(out)
    if q_method not in (None, *METHODS):
        raise FlashMoEError(f"q_method = {q_method!r} is none of {', '.join(METHODS)}.")
    text = None if calibrate is None else str(Path(calibrate).expanduser())
    options = Options(
        quantize, q_bits, q_group_size, dtype, q_method, text, quant_predicate, no_remote_code
    )
    if link and options != Options(no_remote_code=no_remote_code):
        raise FlashMoEError("--link copies nothing, so -q and --dtype have no effect. Drop them.")
    if link and upload_repo is not None:
        raise FlashMoEError(
            f"--upload-repo {upload_repo}: with --link there is nothing to upload but links to "
            "files of this machine. Drop --link."
        )
    whole = keep_source or link or text is not None
    with nullcontext() if upload_repo is None else impatient():
        to = None if upload_repo is None else check_repo(upload_repo, private)
        with located(str(hf_path), revision, dry_run, whole and not dry_run) as found:
            source = open_source(found.directory, str(hf_path), found.commit)
            shards = Shards(Found(found.directory) if whole else found, out)
            _convert(source, shards, options, out, dry_run, link, to)


def _convert(
    source: Source,
    shards: Shards,
    options: Options,
    out: Path,
    dry_run: bool,
    link: bool,
    to: Destination | None,
) -> None:
    stamps = Stamps(shards.lasting(source_files(source)))
    plan = build_plan(source, options)
    if link:
        check_linkable(source)
    card = b"" if link else model_card(source, plan, options, tools())
    begun = _begun(source, options, link, stamps)
    if to:
        check_card(to.repo, card_of(out, card) if is_finished(out) else card)
    if to and is_finished(out):
        check_finished(out, public(begun))
    else:
        _make(source, shards, plan, options, out, dry_run, begun, card, stamps)
    if to and dry_run:
        print(f"to upload   {to}")
    elif to:
        upload(out, to, card)


def _make(
    source: Source,
    shards: Shards,
    plan: Plan,
    options: Options,
    out: Path,
    dry_run: bool,
    begun: Begun,
    card: bytes,
    stamps: Stamps,
) -> None:
    """Check what there is room for, and write what is missing; or say what would be written."""
    link = begun["options"]["link"]
    check_plan(source, plan, with_tokenizer=not (dry_run and source.revision))
    text = _read_text(options.calibrate) if options.calibrate else None
    if text is not None:
        begun["text"] = as_text(zlib.crc32(text.encode()))
    done = finished(out, plan, begun)
    to_write = 0 if link else plan.trunk_bytes + plan.expert_bytes - data_bytes(plan, done)
    steps = plan_steps(source, plan, done, frozenset(shards.sizes), shards.held())
    fetching = fetched(steps, shards.sizes, shards.held())
    needed = to_write + fetching.most_bytes
    free = shutil.disk_usage(_existing_parent(out)).free + leftover_bytes(out, plan, done)
    free += shards.nbytes()
    if dry_run:
        print(describe(source, plan, out, fetching, to_write, free))
        if not link and not options.calibrate:
            share = to_write / (plan.trunk_bytes + plan.expert_bytes)
            print(describe_time(source, plan, share, fetching))
        return
    if needed > free:
        raise FlashMoEError(
            f"{out}: the conversion needs {human(needed)}"
            + (f" ({human(fetching.most_bytes)} of them for a while)" if fetching.most else "")
            + f", but only {human(free)} are free. "
            "Free some space, choose another --mlx-path, or fewer --q-bits."
        )
    with locked(out), _unfinished(out):
        check_output(out)  # again, as another process may have had it
        done = finished(out, plan, begun)
        (out / EXPERT_DIR / MANIFEST).unlink(missing_ok=True)
        write_journal(out, begun, done)
        remove_leftovers(out, plan, done)
        if link:
            content = link_source(source, plan, out)
        else:
            with _calibration(source, text) as calibration:
                content = _write(source, shards, plan, out, begun, done, calibration, stamps)
            write_file(out / CARD, card)
        check_written(out)
        stamps.check(out)
        write_manifest(out, content)
        remove_journal(out)


def _begun(source: Source, options: Options, link: bool, stamps: Stamps) -> Begun:
    """Return what the bytes of the output depend on, for the journal.

    Of a source on the Hub the commit says everything, and a dry run has outlines of its files only.
    """
    return {
        "source": origin(source),
        "options": options.given() | {"link": link},
        "tools": tools(),
        "files": {} if source.revision else stamps.named(source.directory),
    }


def tools() -> str:
    """Return what quantizes: two versions or devices may round in different ways."""
    return f"mlx {version('mlx')}, {mx.default_device().type.name}"


def _existing_parent(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


@contextmanager
def _unfinished(out: Path) -> Iterator[None]:
    """Say with every error that the directory is not whole."""
    advice = f"Run the same command again to go on from here, or delete {out}."
    try:
        yield
    except SourceChangedError:  # to go on would be no use
        raise
    except FlashMoEError as error:
        raise FlashMoEError(f"{error} {advice}") from error
    except OSError as error:
        where = error.filename or out
        remedy = "Free some space. " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise FlashMoEError(
            f"{where}: cannot be written ({error.strerror}). {remedy}{advice}"
        ) from error


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlashMoEError(
            f"{path}: cannot be read as a text ({error}). Give --calibrate a UTF-8 file."
        ) from error


@contextmanager
def _calibration(source: Source, text: str | None) -> Iterator[Calibration | None]:
    """Have the source's model read a text, if there is one."""
    if text is None:
        yield None
        return
    from ..loader import load  # slow to import, seldom needed

    model, tokenizer = load(source.directory)
    try:
        yield Calibration(model.model, tokenizer.encode(text))
    finally:
        model.close()


def _write(
    source: Source,
    shards: Shards,
    plan: Plan,
    out: Path,
    begun: Begun,
    done: Entries,
    calibration: Calibration | None,
    stamps: Stamps,
) -> dict[str, Any]:
    """Write everything that is not done but the manifest, and return the manifest's content."""
    small = {name: write_small(out / name, c) for name, c in small_files(source, plan).items()}
    steps = plan_steps(source, plan, done, frozenset(shards.sizes), shards.held())
    shards.tidy(frozenset().union(*(step.needs for step in steps)))
    with Reader(shards.find) as reader, _bar(plan, done) as bar:
        for step in steps:
            file, name = step.file, place(step.file)
            bar.set_description(Path(name).name)
            shards.fetch(step.needs)
            seen = None
            if calibration and isinstance(file, LayerPlan):
                seen = calibration.layer(file.layer)
            visit = step.visit(done)
            with _unchanged(stamps, out):
                entry = write_weights(source, file, out, reader, bar.update, seen, visit)
            done[name] = entry
            write_journal(out, begun, done)
            shards.delete(step.spent, reader)
    shards.remove()
    trunk = {file.name: done[place(file)] for file in plan.trunk}
    return {
        **public(begun),
        "tools": begun["tools"],
        "num_experts": source.dims.experts,
        "layers": [done[place(layer)] for layer in plan.layers],
        "files": [entry for _, entry in sorted((small | trunk).items())],
    }


@contextmanager
def _unchanged(stamps: Stamps, out: Path) -> Iterator[None]:
    """Check the source's stamps after a step, also where its files made the step fail."""
    try:
        yield
    except FlashMoEError as error:
        try:
            stamps.check(out)
        except SourceChangedError as change:
            raise SourceChangedError(f"{error} {change}") from error
        raise
    stamps.check(out)


def _bar(plan: Plan, done: Entries) -> Any:
    total, initial = plan.trunk_bytes + plan.expert_bytes, data_bytes(plan, done)
    return tqdm(
        total=total, initial=initial, unit="B", unit_scale=True, file=sys.stderr, disable=None
    )


def origin(source: Source) -> dict[str, str]:
    """Return where a source came from."""
    if source.revision:
        return {"repo": source.name, "revision": source.revision}
    return {"path": str(source.directory.resolve())}


def public(begun: Begun) -> dict[str, dict[str, Any]]:
    """Return source and options for the manifest, which may be published: no path but its end."""
    source, options = dict(begun["source"]), dict(begun["options"])
    if "path" in source:
        source["path"] = Path(source["path"]).name
    if options["calibrate"]:
        options["calibrate"] = Path(options["calibrate"]).name
    return {"source": source, "options": options}
