"""`latentmill`: looks at an output from a shell.

    latentmill inspect URI                 what it holds: model, shapes, counts, rejections, snapshots
    latentmill urls URI                    the committed data files, one a line, for readers without Latentmill
    latentmill report URI -o FILE.html     one page: what was asked, what came out, how good it is, and clips that play
    latentmill preview URI -o FILE.png     latents drawn as pictures, and decoded where the model is at hand
    latentmill preview URI KEY -o FILE     the clip of one video, .mp4 or .gif
    latentmill export URI --to F -o TARGET the samples in the form of another project, without encoding again
    latentmill verify URI                  whether all that was committed is there, whole and true
    latentmill gc URI                      files that can never count, and why; --delete removes them

Not the job that writes an output (`jobs/encode_laion.py`). Commands read committed data; only `verify --requeue`, which
leaves orders to the job, and `gc --delete` change an output. Results go to standard output, messages to standard error.
Exit codes are those of the job, so far as they apply: 0 well, 2 wrong use, 4 work left undone; 1 means damage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commit import decided_shards, latest_snapshot, load_commits, manifest_of_output
from pipeline.errors import (
    DamagedObjectError,
    LatentmillError,
    StorageError,
    StorageUnavailableError,
    UsageError,
    printable,
)
from pipeline.progress import size_text
from pipeline.records import COUNTED, DatasetManifest, sum_counts
from pipeline.storage import ObjectStore, open_store
from pipeline.store import shown_uri

if TYPE_CHECKING:
    from pipeline.audit import Audit
    from pipeline.codec import LatentDecoder
    from pipeline.columns import ColumnsManifest


EXIT_OK, EXIT_DAMAGED, EXIT_USAGE, EXIT_UNDONE = 0, 1, 2, 4
_MAX_SHOWN = 50
_SHOW_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the command `latentmill`; returns the exit code.

    Of every command: 0 well, 1 something is damaged, 2 wrong use or refused for good, 4 the store did not answer.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        return command(arguments) or EXIT_OK
    except LatentmillError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, DamagedObjectError):
            return EXIT_DAMAGED
        return EXIT_UNDONE if isinstance(error, StorageUnavailableError) else EXIT_USAGE
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        sys.stderr.close()
        return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latentmill", description="Looks after an output of Latentmill.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="what an output holds")
    inspect.add_argument("uri", help="local folder or s3://bucket/prefix")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    inspect.set_defaults(command=_inspect)

    urls = commands.add_parser("urls", help="the committed data files, one a line")
    urls.add_argument("uri", help="local folder or s3://bucket/prefix")
    urls.add_argument(
        "--format", choices=("parquet", "webdataset", "rejected"), help="default: parquet where there is any"
    )
    urls.set_defaults(command=_urls)

    report = commands.add_parser(
        "report",
        help="one page about an output, for people",
        description="Writes one self-contained page of HTML: accounts, rejections, shapes, throughput, latents, and a "
        "sample of clips beside their originals. Accounts are exact; the rest is of a seeded sample, and says so.",
    )
    report.add_argument("uri", help="local folder or s3://bucket/prefix")
    report.add_argument("-o", "--output", type=Path, required=True, help="the .html to write")
    report.add_argument("--json", action="store_true", help="also print the figures as one JSON object")
    report.add_argument("--examples", type=int, default=24, help="clips to show and measure (24)")
    report.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    report.add_argument("--model", help="the VAE to decode with; default: the dataset's own; none: latents only")
    report.add_argument("--subfolder", help="folder inside the model")
    report.add_argument("--no-originals", action="store_true", help="do not read the sources again")
    report.set_defaults(command=_report)

    preview = commands.add_parser("preview", help="latents as pictures, or one clip that plays")
    preview.add_argument("uri", help="local folder or s3://bucket/prefix")
    preview.add_argument("key", nargs="?", help="key of one video; default: a grid of the first clips")
    preview.add_argument("-o", "--output", type=Path, required=True, help="the .png to write; with KEY .mp4 or .gif")
    preview.add_argument("--num-clips", type=int, default=8, help="clips to draw (8)")
    preview.add_argument("--clip", type=int, default=0, help="with KEY: the number of the clip (0)")
    preview.add_argument("--model", help="the VAE to decode with; default: the dataset's own; none: latents only")
    preview.add_argument("--subfolder", help="folder inside the model")
    preview.set_defaults(command=_preview)

    export = commands.add_parser(
        "export",
        help="the samples in the form of another project",
        description="Writes the samples of a snapshot in the form of another project, without encoding again. The same "
        "command goes on with an export that was interrupted. TARGET must be new, empty or a begun export. Exit codes: "
        "0 the export is whole; 1 a file of the output is damaged; 4 the storage failed: run it again.",
    )
    export.add_argument("uri", help="local folder or s3://bucket/prefix")
    export.add_argument("--to", choices=("fastvideo", "webdataset-dfm", "hf"), required=True, help="the form")
    export.add_argument("-o", "--output", required=True, metavar="TARGET", help="local folder or s3://bucket/prefix")
    export.add_argument("--snapshot", type=int, help="number of the snapshot (the one begun with, else the latest)")
    export.add_argument("--text", choices=("text",), help="column set with the captions' embeddings, to go along")
    export.add_argument("--json", action="store_true", help="one JSON object instead of text")
    export.set_defaults(command=_export)

    verify = commands.add_parser(
        "verify",
        help="whether an output is there, whole and true",
        description="Reads every committed file and says what is wrong. Exit codes: 0 all is well and every planned "
        "slice is decided; 1 something is damaged; 4 nothing is damaged and work is left.",
    )
    verify.add_argument("uri", help="local folder or s3://bucket/prefix")
    verify.add_argument("--json", action="store_true", help="one JSON object instead of text")
    verify.add_argument("--quick", action="store_true", help="records, presence and sizes only; reads no data file")
    verify.add_argument("--inputs", action="store_true", help="also say which inputs changed since they were encoded")
    verify.add_argument(
        "--requeue",
        action="store_true",
        help="order repairs: the next run of the job on the same input encodes damaged shards again",
    )
    verify.set_defaults(command=_verify)

    gc = commands.add_parser("gc", help="files that can never count, and why")
    gc.add_argument("uri", help="local folder or s3://bucket/prefix")
    gc.add_argument("--json", action="store_true", help="one JSON object instead of text")
    gc.add_argument("--delete", action="store_true", help="remove them; without it nothing is changed")
    gc.add_argument("--all", action="store_true", help="also list the files that stay, with the reason")
    gc.set_defaults(command=_gc)
    return parser


def _say(line: str) -> None:
    # What is told may stand in an output, and that may come from anyone.
    print(printable(line))


def _open(uri: str) -> tuple[ObjectStore, DatasetManifest]:
    store = open_store(uri)
    return store, manifest_of_output(store)


def _inspect(arguments: argparse.Namespace) -> None:
    from pipeline.columns import base_of, columns_manifest_of, sets_of

    store = open_store(arguments.uri)
    if base_of(store) is None:
        found = _description(store, manifest_of_output(store)) | {"column_sets": list(sets_of(store))}
    else:
        found = _description(store, columns_manifest_of(store))
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    _print_description(found)


def _print_description(found: Mapping[str, Any]) -> None:
    """Tables for people: facts first, then one table for each mapping, numbers to the right."""
    facts = {name: value for name, value in found.items() if not isinstance(value, Mapping)}
    tables = {"": facts} | {name: value for name, value in found.items() if isinstance(value, Mapping)}
    for title, entries in tables.items():
        if not entries:
            continue
        if title:
            _say("")
            _say(title.replace("_", " ").upper())
        width = max(len(printable(str(name))) for name in entries)
        # Numbers stand under each other where there is nothing else.
        is_counts = all(isinstance(value, int) and not isinstance(value, bool) for value in entries.values())
        room = max(len(_text(value)) for value in entries.values()) if is_counts else 0
        for name, value in entries.items():
            size = f"  ({size_text(value)})" if "bytes" in str(name) and isinstance(value, int) else ""
            _say(f"  {printable(str(name)):<{width}}  {_text(value).rjust(room)}{size}")


def _text(value: object) -> str:
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _description(store: ObjectStore, manifest: DatasetManifest | ColumnsManifest) -> dict[str, object]:
    # Of now, whether or not a snapshot names them yet.
    shards = decided_shards(load_commits(store))
    counts = sum_counts(shard.counts for shard in shards)
    files: Counter[str] = Counter()
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for shard in shards:
        for file in (file for commit in shard.commits for file in commit.files):
            files[f"{file.content} files"] += 1
            files[f"{file.content} bytes"] += file.num_bytes
            rows[file.content].update(file.bucket_rows)
    buckets = next((rows[content] for content in ("parquet", "webdataset") if rows[content]), Counter())
    snapshot = latest_snapshot(store)
    found: dict[str, object] = {
        "output": store.root_uri,
        "snapshot": None if snapshot is None else snapshot.number,
        "shards": len(shards),
        "fingerprint": manifest.fingerprint,
        "counts": {name: getattr(counts, name) for name in COUNTED},
        "rejections": dict(Counter(counts.reasons).most_common()),
        "buckets": dict(buckets.most_common()),
        "files": dict(sorted(files.items())),
        "configuration": dict(manifest.fingerprint_fields),
    }
    if isinstance(manifest, DatasetManifest):
        return found | {
            "kind": manifest.kind,
            "latent_dtype": manifest.latent_dtype,
            "model": asdict(manifest.model),
            "passed_through": dict(manifest.passthrough),
        }
    return found | {
        "set": manifest.name,
        "encoder": manifest.encoder,
        "revision": manifest.revision,
        "embedding_dtype": manifest.embedding_dtype,
        "embedding_dim": manifest.embedding_dim,
        "max_length": manifest.max_length,
    }


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.audit import audit
    from pipeline.columns import sets_of
    from pipeline.redo import order_repair

    output = open_store(arguments.uri)
    documents: dict[str, dict[str, object]] = {}
    exit_codes = []
    for name, store in {"": output, **sets_of(output)}.items():
        found = audit(store, is_quick=arguments.quick, with_inputs=arguments.inputs)
        ordered = []
        if arguments.requeue:
            ordered = [record for record, why in sorted(found.repairable.items()) if order_repair(store, record, why)]
        exit_codes.append(EXIT_DAMAGED if found.damage else EXIT_UNDONE if found.is_unfinished or ordered else EXIT_OK)
        documents[name] = asdict(found) | {"ordered_repairs": ordered}
        if arguments.json:
            continue
        _print_audit(found)
        if arguments.requeue:
            _say(f"ordered   {len(ordered)} repairs; run the job on the same input again to carry them out")
        elif found.repairable:
            _say(f"repair    {len(found.repairable)} records by encoding again: latentmill verify --requeue")
    exit_code = next((code for code in (EXIT_DAMAGED, EXIT_UNDONE) if code in exit_codes), EXIT_OK)
    if arguments.json:
        print(json.dumps(documents.pop("") | {"column_sets": documents, "exit_code": exit_code}, indent=1))
    return exit_code


def _print_audit(found: Audit) -> None:
    counts = found.counts
    how = "no data file was read" if found.is_quick else f"{found.num_bytes_read:,} bytes read"
    _say(found.output)
    _say(f"records   {found.num_records:,} of {found.num_shards:,} shards, {found.num_snapshots:,} snapshots")
    _say(f"files     {found.num_files:,}, {found.num_bytes:,} bytes; {how}")
    _say(
        f"samples   {counts.num_records:,} of {counts.num_videos_ok:,} videos; {counts.num_videos_rejected:,} rejected"
    )
    if found.num_slices:
        _say(f"planned   {found.num_slices:,} slices of tables and folders")
    if found.num_inputs:
        _say(f"inputs    {found.num_inputs:,} compared with what was encoded")
    if found.num_unnamed:
        _say(f"unnamed   {found.num_unnamed:,} files, {found.num_unnamed_bytes:,} bytes: latentmill gc explains them")
    for finding in found.findings[:_MAX_SHOWN]:
        _say(f"{finding.kind:<10}{finding.where}: {finding.message}")
    if len(found.findings) > _MAX_SHOWN:
        _say(f"and {len(found.findings) - _MAX_SHOWN:,} more; --json lists them all")
    if found.damage:
        kinds = Counter(finding.kind for finding in found.damage)
        _say("DAMAGED   " + ", ".join(f"{number} x {kind}" for kind, number in kinds.most_common()))
    else:
        _say("unfinished, nothing is damaged" if found.is_unfinished else "all is well")


def _gc(arguments: argparse.Namespace) -> None:
    from pipeline.collect import collect_garbage
    from pipeline.columns import base_of, columns_manifest_of

    store = open_store(arguments.uri)
    if base_of(store) is None:
        manifest_of_output(store)
    else:
        columns_manifest_of(store)
    garbage = collect_garbage(store, delete=arguments.delete)
    shown = garbage.files if arguments.all else garbage.may_go
    num_bytes = sum(file.num_bytes for file in garbage.files)
    if arguments.json:
        found = {
            "output": store.root_uri,
            "is_deleted": garbage.is_deleted,
            "num_files": len(garbage.files),
            "num_bytes": num_bytes,
            "num_files_that_may_go": len(garbage.may_go),
            "num_bytes_that_may_go": garbage.num_bytes,
            "files": [asdict(file) for file in shown],
        }
        print(json.dumps(found, indent=1))
        return
    for file in shown:
        verdict = ("deleted" if garbage.is_deleted else "may go") if file.may_go else "stays"
        _say(f"{verdict:<8} {store.url(file.key)} ({file.num_bytes:,} bytes): {file.reason}")
    done = "deleted" if garbage.is_deleted else "may go; --delete removes them"
    _say(
        f"{len(garbage.may_go):,} of {len(garbage.files):,} files, {garbage.num_bytes:,} of {num_bytes:,} bytes {done}"
    )


def _urls(arguments: argparse.Namespace) -> None:
    from pipeline.columns import base_of, columns_manifest_of
    from pipeline.dataset import data_urls

    store = open_store(arguments.uri)
    if base_of(store) is not None:
        columns_manifest_of(store)
        urls = [store.url(file.key) for commit in load_commits(store) for file in commit.files]
    else:
        urls = data_urls(arguments.uri, arguments.format)
    for url in urls:
        _say(url)


def _export(arguments: argparse.Namespace) -> int:
    from pipeline.export import export

    def show(num_done: int, num_files: int) -> None:
        if num_done == num_files or time.monotonic() - shown_at[0] > _SHOW_EVERY_S:
            shown_at[0] = time.monotonic()
            print(f"{num_done:,} of {num_files:,} files of the source", file=sys.stderr)

    shown_at = [time.monotonic()]
    flags = {"snapshot": arguments.snapshot, "text": arguments.text}
    try:
        done = export(arguments.uri, arguments.to, arguments.output, **flags, on_file=show)
    except StorageError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_DAMAGED if isinstance(error, DamagedObjectError) else EXIT_UNDONE
    if arguments.to == "webdataset-dfm" and arguments.text is None:
        print("note: without --text there is no .pickle, which DFM's Wan recipe asks for", file=sys.stderr)
    if arguments.json:
        print(json.dumps(asdict(done), indent=1))
        return EXIT_OK
    _say(done.target)
    print(f"samples   {done.num_records:,} in {done.num_files:,} files, {done.num_files_kept:,} of them from earlier")
    newer = f"; the latest is {done.latest_snapshot}" if done.latest_snapshot != done.snapshot else ""
    print(f"snapshot  {done.snapshot}{newer}")
    return EXIT_OK


def _report(arguments: argparse.Namespace) -> None:
    from pipeline.report import report
    from pipeline.report_page import page

    if arguments.seed < 0:
        raise UsageError(f"--seed {arguments.seed} is negative")
    _refuse_folder_that_is_not_there(arguments.output)

    def say(line: str) -> None:
        if time.monotonic() - said_at[0] > _SHOW_EVERY_S / 5:
            said_at[0] = time.monotonic()
            print(printable(line), file=sys.stderr)

    said_at = [time.monotonic()]
    found = report(
        arguments.uri,
        num_examples=arguments.examples,
        seed=arguments.seed,
        model=arguments.model,
        subfolder=arguments.subfolder,
        with_originals=not arguments.no_originals,
        say=say,
    )
    text = page(found.document, [(example.picture, example.still) for example in found.examples])
    try:
        arguments.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{arguments.output} cannot be written: {error.strerror or error}") from error
    for note in found.document["notes"]:
        print(f"note: {printable(note)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found.document, indent=1))
    else:
        _say(str(arguments.output))


def _refuse_folder_that_is_not_there(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")


def _preview(arguments: argparse.Namespace) -> None:
    from pipeline.dataset import LatentDataset
    from pipeline.pictures import Row, grid, latent_to_frames, spread

    _store, manifest = _open(arguments.uri)
    facts = manifest.model
    if arguments.key is not None:
        _preview_clip(arguments, manifest)
        return
    decoder = _decoder_at_hand(arguments, manifest)
    rows = []
    for batch in LatentDataset(arguments.uri, batch_size=1, shuffle_seed=None):
        latent = batch["latents"][0].numpy() / facts.scaling_factor + facts.shift_factor
        drawn = [latent_to_frames(latent)] + ([decoder.decode(latent)] if decoder is not None else [])
        pictures = [frames[index] for frames in drawn for index in spread(len(frames), 4)]
        rows.append(
            Row(label=f"{batch['key'][0]} {int(batch['clip_index'][0])}: {batch['caption'][0]}", pictures=pictures)
        )
        if len(rows) == arguments.num_clips:
            break
    what = "latents, channels 0-2" + ("" if decoder is None else " | decoded")
    note = "" if facts.is_trained else " - THE MODEL IS UNTRAINED"
    grid(f"{arguments.uri}: {what}{note}", rows).save(arguments.output, format="PNG")
    _say(str(arguments.output))


def _decoder_at_hand(arguments: argparse.Namespace, manifest: DatasetManifest) -> LatentDecoder | None:
    """The VAE that made the latents; None where none was asked for, or where it is not at hand, which is said.

    Raises:
        UsageError: the model that was asked for is not there, or is another one.
    """
    if arguments.model == "none":
        return None
    try:
        return _decoder_of(arguments, manifest)
    except UsageError as error:
        if arguments.model is not None:
            raise
        print(f"note: the model is not at hand, so latents are shown: {printable(str(error))}", file=sys.stderr)
        return None


def _decoder_of(arguments: argparse.Namespace, manifest: DatasetManifest) -> LatentDecoder:
    import torch

    from pipeline.codec import LatentDecoder
    from pipeline.config import parse_arguments

    facts = manifest.model
    flags = ["--input", "-", "--output", arguments.uri, "--model", arguments.model or facts.model]
    flags += ["--subfolder", arguments.subfolder] if arguments.subfolder else []
    decoder = LatentDecoder(parse_arguments(flags).encoding, torch.device("cpu"))
    if decoder.facts.weights_sha256 != facts.weights_sha256:
        raise UsageError(
            f"--model {decoder.facts.model} has the weights {decoder.facts.weights_sha256[:16]}, the latents come "
            f"from {facts.weights_sha256[:16]}: give the folder of that model, or --model none"
        )
    return decoder


def _preview_clip(arguments: argparse.Namespace, manifest: DatasetManifest) -> None:
    """One clip as it plays: decoded, or its latent where the model is not at hand, which is said."""
    from pipeline.dataset import LatentDataset
    from pipeline.movies import write_mp4
    from pipeline.pictures import held_latent, latent_to_frames, write_animation

    kind = arguments.output.suffix.lower()
    if kind not in (".mp4", ".gif"):
        raise UsageError(f"-o {arguments.output}: a clip is written as .mp4 or .gif")
    _refuse_folder_that_is_not_there(arguments.output)
    wanted = [("key", "=", arguments.key), ("clip_index", "=", arguments.clip)]
    try:
        dataset = LatentDataset(arguments.uri, batch_size=1, shuffle_seed=None, scaled=False, filter=wanted)
    except UsageError as error:
        # An output without any latents says so itself.
        some = next(iter(LatentDataset(arguments.uri, batch_size=3, shuffle_seed=None, scaled=False)))
        there = ", ".join(repr(key) for key in dict.fromkeys(some["key"]))
        raise UsageError(
            f"there is no clip {arguments.clip} of a video {arguments.key!r} in {shown_uri(arguments.uri)}, which has "
            f"such as {there}; a video may also have been rejected: `latentmill urls --format rejected` lists the "
            "files that say why"
        ) from error
    batch = next(iter(dataset))
    latent = batch["latents"][0].numpy()
    decoder = _decoder_at_hand(arguments, manifest)
    num_frames = int(batch["bucket"].rpartition("x")[2])
    frames = held_latent(latent_to_frames(latent), num_frames) if decoder is None else decoder.decode(latent)
    fps = batch["fps"][0] or 1.0
    if kind == ".mp4":
        write_mp4(arguments.output, frames, fps)
    else:
        write_animation(arguments.output, frames, fps)
    what = "its latent, channels 0-2" if decoder is None else "decoded"
    _say(f"{arguments.output}: {what}, {num_frames} frames at {fps:g} a second")


if __name__ == "__main__":
    sys.exit(main())
