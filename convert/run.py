"""The conversion from end to end: open, plan, check, write what is missing, the manifest last."""

import errno
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..errors import FlashMoEError
from ..format.layout import EXPERT_DIR, MANIFEST
from ..progress import bar
from .check import check_plan, check_written
from .plan.parts import METHODS, File, LayerPlan, Options, Plan
from .plan.plan import build_plan
from .plan.ranks import outputs, placements
from .publish import published, upload
from .publish.card import model_card
from .quant.calibrate import Calibration
from .source.checkpoint import Source
from .source.hub import CARD
from .source.locate import Found, located
from .source.open import open_source
from .source.read import Reader
from .source.shards import Shards
from .write import files, journal, output
from .write.describe import describe, describe_time, human
from .write.execute import Progress
from .write.files import as_text
from .write.stamps import SourceChangedError, Stamps, source_files
from .write.steps import Step, fetched, other_ranks, plan_steps


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
    ranks: int | None = None,
    rank: int | None = None,
    rank_weights: str | None = None,
    split: int | None = None,
) -> None:
    """Convert a mixture-of-experts checkpoint into a directory that streams its experts from disk.

    Args:
        hf_path: a checkpoint's directory, or its name on the Hugging Face Hub.
        mlx_path: the directory to write. It must not exist, be empty, or be the unfinished output
            of the same call, which then resumes.
        quantize: quantize the experts (and the trunk, if the source is not quantized).
        q_group_size: weights per scale and bias; default 64.
        q_bits: bits per expert weight; default 4.
        q_method: "min-max" (as mlx_lm.convert) or "least-squares" (smaller error) for the scales
            of experts; by default the latter below 4 bits.
        calibrate: path of a text; experts are quantized for their inputs in it.
        quant_predicate: a name in `recipes.RECIPES`: bits per expert matrix.
        dtype: "bfloat16", "float16" or "float32" for tensors that are not quantized; default: the
            config's.
        revision: branch, tag or commit on the Hub.
        dry_run: print the plan and write nothing; from the Hub, it downloads headers only.
        link: stream from the (quantized MLX) source in place instead of copying it.
        keep_source: download the whole repository into the Hub's cache and keep it. By default
            each file is deleted after its last use, except with `link` and `calibrate`.
        upload_repo: OWNER/NAME on the Hub to upload the finished directory to. The finished output
            of the same call is uploaded as it is.
        no_remote_code: omit the source's Python files, and the configuration entries (`auto_map`)
            that make `trust_remote_code` run them. By default they are copied unchanged.
        private: whether `upload_repo` is private; required with it.
        ranks: with `rank`: write only the experts of one of so many machines.
        rank: its number, from 0.
        rank_weights: each machine's share of the experts, such as "2,1"; equal by default.
        split: write the directories of so many ranks, `mlx_path` followed by "-rank0", ...; those
            that the same call has finished before are kept.

    Raises:
        FlashMoEError: the source, the options or the disk do not allow it. A partly written
            directory has no manifest, so it is recognized as unfinished; the same call resumes.
    """
    out = Path(mlx_path).expanduser()
    if upload_repo is None and private is not None:
        raise FlashMoEError(
            "--private and --public have no effect without --upload-repo. Add it, or drop them."
        )
    outs = outputs(out, placements(ranks, rank, rank_weights, split))
    for path in outs:
        if (upload_repo is None and split is None) or not upload.is_finished(path):
            journal.check_output(path)
    if (link or upload_repo) and (ranks or split):
        raise FlashMoEError(
            f"{'--link' if link else '--upload-repo'} is for all experts, not for those of one "
            "rank. Drop it, or --ranks, --rank and --split: a whole directory serves every rank."
        )
    if q_method not in (None, *METHODS):
        raise FlashMoEError(f"q_method = {q_method!r}: expected one of {', '.join(METHODS)}.")
    text = None if calibrate is None else str(Path(calibrate).expanduser())
    options = Options(
        quantize, q_bits, q_group_size, dtype, q_method, text, quant_predicate, no_remote_code
    )
    if link and options != Options(no_remote_code=no_remote_code):
        raise FlashMoEError("--link copies nothing, so -q and --dtype have no effect. Drop them.")
    if link and upload_repo is not None:
        raise FlashMoEError(
            f"--upload-repo {upload_repo}: --link makes symlinks to files of this machine, which "
            "cannot be uploaded. Drop --link."
        )
    whole = keep_source or link or text is not None
    with nullcontext() if upload_repo is None else upload.client_timeout():
        if upload_repo is not None:
            upload.check_repo(upload_repo, private)
        with located(str(hf_path), revision, dry_run, whole and not dry_run) as found:
            with bar(None, what="reading the checkpoint"):  # other families import mlx-lm
                source = open_source(found.directory, str(hf_path), found.commit)
            for path, placement in outs.items():
                shards = Shards(Found(found.directory) if whole else found, path)
                job = _Job.of(source, shards, replace(options, placement=placement), path, link)
                if split is not None and upload.is_finished(path):
                    upload.check_finished(path, job.made)
                else:
                    _run(job, upload_repo, bool(private), dry_run)


@dataclass(frozen=True)
class _Job:
    source: Source
    shards: Shards
    stamps: Stamps
    plan: Plan
    calibrate: str | None
    link: bool
    out: Path
    begun: journal.Begun  # what the output's bytes depend on
    card: bytes

    @classmethod
    def of(cls, source: Source, shards: Shards, options: Options, out: Path, link: bool) -> "_Job":
        stamps = Stamps(shards.lasting(source_files(source)))
        plan = build_plan(source, options)
        if options.placement:
            shards.leave_out(other_ranks(source, plan))
        if link:
            output.check_linkable(source)
        card = b"" if link else model_card(source, plan, options, tools())
        begun = {
            "source": origin(source),
            "options": options.given() | {"link": link},
            "tools": tools(),
            "placement": str(options.placement) if options.placement else None,
            # A commit identifies the files; a dry run has outlines of them only.
            "files": {} if source.revision else stamps.named(source.directory),
        }
        return cls(source, shards, stamps, plan, options.calibrate, link, out, begun, card)

    @property
    def made(self) -> dict[str, Any]:
        """Source, options and placement, as the manifest has them."""
        part = self.plan.placement
        return public(self.begun) | {"placement": part.as_json() if part else None}

    def steps(self, done: journal.Entries) -> list[Step]:
        remote = frozenset(self.shards.sizes)
        return plan_steps(self.source, self.plan, done, remote, self.shards.held())


def _run(job: _Job, repo: str | None, private: bool, dry_run: bool) -> None:
    done = repo is not None and upload.is_finished(job.out)
    if repo:
        upload.check_card(repo, (published.own_card(job.out) if done else None) or job.card)
    if done:
        upload.check_finished(job.out, job.made)
    else:
        _make(job, dry_run)
    if repo and dry_run:
        print(f"to upload   {repo} ({'private' if private else 'public'})")
    elif repo:
        upload.upload(job.out, repo, private, job.card)


def _make(job: _Job, dry_run: bool) -> None:
    """Check the free disk space and write what is missing, or print the plan."""
    source, plan, out = job.source, job.plan, job.out
    check_plan(source, plan, with_tokenizer=not (dry_run and source.revision))
    text = _read_text(job.calibrate) if job.calibrate else None
    if text is not None:
        job.begun["text"] = as_text(zlib.crc32(text.encode()))
    done = journal.finished(out, plan, job.begun)
    total = plan.trunk_bytes + plan.expert_bytes
    to_write = 0 if job.link else total - journal.data_bytes(plan, done)
    fetching = fetched(job.steps(done), job.shards.sizes, job.shards.held())
    needed = to_write + fetching.most_bytes
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + job.shards.nbytes()
    free += journal.leftover_bytes(out, plan, done)
    if dry_run:
        print(describe(source, plan, out, fetching, to_write, free))
        if not job.link:
            print(describe_time(source, plan, to_write / total, fetching, text))
        return
    if needed > free:
        raise FlashMoEError(
            f"{out}: the conversion needs {human(needed)}"
            + (f" ({human(fetching.most_bytes)} of them temporarily)" if fetching.most else "")
            + f", but only {human(free)} are free. "
            "Free some space, choose another --mlx-path, or fewer --q-bits."
        )
    with journal.locked(out), _unfinished(out):
        journal.check_output(out)  # again: another process may have written before the lock
        done = journal.finished(out, plan, job.begun)
        (out / EXPERT_DIR / MANIFEST).unlink(missing_ok=True)
        journal.write_journal(out, job.begun, done)
        journal.remove_leftovers(out, plan, done)
        if job.link:
            content = output.link_source(source, plan, out)
        else:
            with _calibration(source, text) as calibration:
                content = _write(job, done, calibration)
            files.write_file(out / CARD, job.card)
        check_written(out)
        job.stamps.check(out)
        output.write_manifest(out, content)
        journal.remove_journal(out)


def tools() -> str:
    """Return what quantizes: versions and devices round differently."""
    return f"mlx {version('mlx')}, {mx.default_device().type.name}"


@contextmanager
def _unfinished(out: Path) -> Iterator[None]:
    """Add to every error how to resume."""
    advice = f"Run the same command again to resume, or delete {out}."
    try:
        yield
    except SourceChangedError:  # resuming would not help
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
    if text is None:
        yield None
        return
    from ..loader import load  # slow to import, seldom needed

    model, tokenizer = load(source.directory)
    try:
        # Not verbose: it would warn that the text is longer than the model's context.
        yield Calibration(model.model, tokenizer.encode(text, verbose=False))
    finally:
        model.close()


def _write(job: _Job, done: journal.Entries, calibration: Calibration | None) -> dict[str, Any]:
    """Write everything that is not done except the manifest, and return its content."""
    source, plan, out, shards = job.source, job.plan, job.out, job.shards
    small = {
        name: files.write_file(out / name, c)
        for name, c in output.small_files(source, plan).items()
    }
    steps = job.steps(done)
    shards.tidy(frozenset().union(*(step.needs for step in steps)))
    with Reader(shards.find) as reader, _bar(plan, done, calibration is not None) as bar:
        for step in steps:
            file, name = step.file, output.place(step.file)
            bar.set_description(Path(name).name)
            shards.fetch(step.needs)
            inputs, progress = None, bar.update
            if calibration:
                progress = _experts_only(bar, file)
            if calibration and isinstance(file, LayerPlan):
                inputs = calibration.layer(file.layer)
            visit = step.visit(done)
            with _unchanged(job.stamps, out):
                entry = output.write_weights(source, file, out, reader, progress, inputs, visit)
            done[name] = entry
            journal.write_journal(out, job.begun, done)
            shards.delete(step.spent, reader)
    shards.remove()
    trunk = {file.name: done[output.place(file)] for file in plan.trunk}
    return {
        **{key: value for key, value in job.made.items() if value is not None},
        "tools": job.begun["tools"],
        "num_experts": source.most_experts,
        "layers": [done[output.place(layer)] for layer in plan.layers],
        "files": [entry for _, entry in sorted((small | trunk).items())],
    }


@contextmanager
def _unchanged(stamps: Stamps, out: Path) -> Iterator[None]:
    """Check the source's stamps after a step, even a failed one: the change may be the cause."""
    try:
        yield
    except FlashMoEError as error:
        try:
            stamps.check(out)
        except SourceChangedError as change:
            raise SourceChangedError(f"{error} {change}") from error
        raise
    stamps.check(out)


def _bar(plan: Plan, done: journal.Entries, calibrated: bool) -> Any:
    """Return a bar in bytes, or in experts, which take nearly all the time of a calibration."""
    total, initial = plan.trunk_bytes + plan.expert_bytes, journal.data_bytes(plan, done)
    form: dict[str, Any] = {"unit": "B", "unit_scale": True}
    if calibrated:
        total = sum(layer.experts for layer in plan.layers)
        initial = sum(x.experts for x in plan.layers if output.place(x) in done)
        form = {"unit": "expert"}
    return tqdm(total=total, initial=initial, file=sys.stderr, disable=None, **form)


def _experts_only(bar: Any, file: File) -> Progress:
    """Return what counts a file's experts, and nothing of the trunk."""
    return lambda _: bar.update(int(isinstance(file, LayerPlan)))


def origin(source: Source) -> dict[str, str]:
    """Return the repository and commit, or the path, of a source."""
    if source.revision:
        return {"repo": source.name, "revision": source.revision}
    return {"path": str(source.directory.resolve())}


def public(begun: journal.Begun) -> dict[str, dict[str, Any]]:
    """Return source and options for the manifest, which may be published: no private paths."""
    source, options = dict(begun["source"]), dict(begun["options"])
    if "path" in source:
        source["path"] = Path(source["path"]).name
    if options["calibrate"]:
        options["calibrate"] = Path(options["calibrate"]).name
    return {"source": source, "options": options}
