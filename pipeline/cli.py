"""`latentmill`: looks at an output from a shell.

    latentmill inspect URI                 what it holds: model, shapes, counts, rejections, snapshots
    latentmill urls URI                    the committed data files, one a line, for readers without Latentmill
    latentmill preview URI -o FILE.png     latents drawn as pictures, and decoded where the model is at hand

Not the job that writes an output (`jobs/encode_laion.py`). Every command reads committed data only and changes nothing.
Results go to standard output, messages to standard error; exit codes are those of the job.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.commit import decided_shards, latest_snapshot, load_commits, manifest_of_output
from pipeline.errors import LatentmillError, UsageError
from pipeline.records import DatasetManifest
from pipeline.storage import ObjectStore, open_store


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the command `latentmill`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except LatentmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        sys.stderr.close()
        return 0
    return 0


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

    preview = commands.add_parser("preview", help="latents as pictures")
    preview.add_argument("uri", help="local folder or s3://bucket/prefix")
    preview.add_argument("-o", "--output", type=Path, required=True, help="the .png to write")
    preview.add_argument("--num-clips", type=int, default=8, help="clips to draw (8)")
    preview.add_argument("--model", help="the VAE to decode with; default: the dataset's own; none: latents only")
    preview.add_argument("--subfolder", help="folder inside the model")
    preview.set_defaults(command=_preview)
    return parser


def _open(uri: str) -> tuple[ObjectStore, DatasetManifest]:
    store = open_store(uri)
    return store, manifest_of_output(store)


def _inspect(arguments: argparse.Namespace) -> None:
    store, manifest = _open(arguments.uri)
    found = _description(store, manifest)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if isinstance(value, Mapping):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"    {key:<24} {_text(entry)}")
        else:
            print(f"{name:<28} {_text(value)}")


def _text(value: object) -> str:
    if isinstance(value, list):
        return ";".join(str(entry) for entry in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _description(store: ObjectStore, manifest: DatasetManifest) -> dict[str, object]:
    # Of now, whether or not a snapshot names them yet.
    shards = decided_shards(load_commits(store))
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for shard in shards:
        reasons.update(shard.counts.reasons)
        counts.update({name: value for name, value in asdict(shard.counts).items() if name != "reasons"})
        for file in (file for commit in shard.commits for file in commit.files):
            files[f"{file.content} files"] += 1
            files[f"{file.content} bytes"] += file.num_bytes
    snapshot = latest_snapshot(store)
    return {
        "output": store.root_uri,
        "snapshot": None if snapshot is None else snapshot.number,
        "shards": len(shards),
        "kind": manifest.kind,
        "latent_dtype": manifest.latent_dtype,
        "fingerprint": manifest.fingerprint,
        "counts": dict(counts),
        "rejections": dict(reasons.most_common()),
        "files": dict(sorted(files.items())),
        "model": asdict(manifest.model),
        "configuration": dict(manifest.fingerprint_fields),
        "passed_through": dict(manifest.passthrough),
    }


def _urls(arguments: argparse.Namespace) -> None:
    from pipeline.dataset import data_urls

    for url in data_urls(arguments.uri, arguments.format):
        print(url)


def _preview(arguments: argparse.Namespace) -> None:
    import torch

    from pipeline.codec import LatentDecoder
    from pipeline.config import parse_arguments
    from pipeline.dataset import LatentDataset
    from pipeline.pictures import Row, grid, latent_to_frames, spread

    _store, manifest = _open(arguments.uri)
    facts = manifest.model
    decoder = None
    if arguments.model != "none":
        flags = ["--input", "-", "--output", arguments.uri, "--model", arguments.model or facts.model]
        flags += ["--subfolder", arguments.subfolder] if arguments.subfolder else []
        decoder = LatentDecoder(parse_arguments(flags).encoding, torch.device("cpu"))
        if decoder.facts.weights_sha256 != facts.weights_sha256:
            raise UsageError(
                f"--model {decoder.facts.model} has the weights {decoder.facts.weights_sha256[:16]}, the latents come "
                f"from {facts.weights_sha256[:16]}: give the folder of that model, or --model none"
            )
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
    print(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
