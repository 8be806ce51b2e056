"""The demo: encodes a folder of real clips on an embedded local Ray, reads the latents back, draws what came out and
reports on it.

    python jobs/demo.py --output demo-output

It runs `jobs/encode_laion.py` as a user would, then reads the output through a DataLoader, decodes it, puts the
pictures beside the originals and writes the page of `latentmill report`. It is not a benchmark: model, clips and
machine are small.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline import LatentDataset
from pipeline.cli import main as latentmill
from pipeline.codec import LatentDecoder
from pipeline.config import JobConfig, parse_arguments
from pipeline.decode import DecodePool
from pipeline.pictures import Frames, Row, grid, latent_to_frames, spread, write_gif
from pipeline.plan import plan_shards
from pipeline.quality import psnr_db
from pipeline.records import Clip
from pipeline.source import iterate_videos
from pipeline.storage import open_store

CLIPS = _ROOT / "tests" / "data" / "clips"


def main(argv: Sequence[str]) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--input", default=str(CLIPS), help="folder of videos, or anything else that the job takes")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="local folder, emptied first")
    parser.add_argument("--model", default="small", help="name, folder or hub id of a CV-VAE")
    parser.add_argument("--buckets", default="320x192x17;192x320x17")
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not (arguments.output / ".latentmill-demo").exists():
        parser.error(f"{arguments.output} is there and is not the output of an earlier demo: give another folder")
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    (arguments.output / ".latentmill-demo").touch()
    latents = str(arguments.output / "latents")
    flags = ["--input", arguments.input, "--output", latents, "--model", arguments.model, "--format", "both"]
    flags += ["--buckets", arguments.buckets, "--samples-per-shard", "4"]

    print(f"1. encode {arguments.input} with {arguments.model}:\n   python jobs/encode_laion.py {shlex.join(flags)}")
    result, exit_code = _encode(flags)
    if exit_code:
        return exit_code
    print("2. read the latents back, as a training loop does")
    read = _read_back(latents)
    print("3. decode them and draw them beside the originals")
    summary = _draw(parse_arguments(flags), arguments.output, read, result)
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    page = arguments.output / "report.html"
    print("4. write the page of `latentmill report`")
    exit_code = latentmill(["report", latents, "-o", str(page)])
    if exit_code:
        return exit_code
    _tell(summary, arguments.output, page)
    return 0


def _encode(flags: Sequence[str]) -> tuple[dict[str, Any], int]:
    job = subprocess.run(
        [sys.executable, str(_ROOT / "jobs" / "encode_laion.py"), *flags],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(job.stdout.splitlines()[-1])
    if job.returncode:
        print(f"the job ended with exit code {job.returncode}: {result.get('message', result)}", file=sys.stderr)
    return result, job.returncode


def _read_back(latents: str) -> dict[str, Any]:
    dataset = LatentDataset(latents, batch_size=2, shuffle_seed=0)
    num_read, num_batches, shapes = 0, 0, set()
    started = time.perf_counter()
    for batch in DataLoader(dataset, batch_size=None, num_workers=1):
        num_read += len(batch["key"])
        num_batches += 1
        shapes.add(tuple(batch["latents"].shape[1:]))
        assert torch.isfinite(batch["latents"]).all(), f"batch {num_batches} holds values that are not finite"
    return {
        "num_records": num_read,
        "num_batches": num_batches,
        "latent_shapes": sorted(shapes),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _originals(config: JobConfig) -> dict[tuple[str, int], Clip]:
    """The clips that went into the encoder, decoded once more from the source."""
    store = open_store(config.run.output)
    pool = DecodePool(config.encoding, config.decode, 1)
    try:
        found = {}
        for spec in plan_shards(config.source, store):
            for clip in pool.decode(iterate_videos(spec, store, config.encoding, config.decode)):
                if isinstance(clip, Clip):
                    found[clip.key, clip.clip_index] = clip
        return found
    finally:
        pool.close()


def _draw(config: JobConfig, output: Path, read: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    originals = _originals(config)
    decoder = LatentDecoder(config.encoding, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    is_trained = decoder.facts.is_trained
    rows, moving, found_db = [], [], []
    for batch in LatentDataset(config.run.output, batch_size=1, shuffle_seed=None):
        key, clip_index = batch["key"][0], int(batch["clip_index"][0])
        original = originals[key, clip_index].frames
        # The reader gives what a diffusion model is trained on; the decoder wants the posterior mean itself.
        facts = decoder.facts
        latent = batch["latents"][0].numpy() / facts.scaling_factor + facts.shift_factor
        decoded = decoder.decode(latent)
        found_db.append(psnr_db(original, decoded))
        rows.append(_row(f"{key}: {batch['caption'][0]}", original, latent_to_frames(latent), decoded))
        if len(original) > 1:
            moving.append([original, latent_to_frames(latent).repeat(4, axis=0)[3:], decoded])
    quality = "" if is_trained else " - THE MODEL IS UNTRAINED: its reconstruction means nothing"
    title = "original | latent, channels 0-2 | reconstruction" + quality
    grid(title, rows).save(output / "grid.png")
    write_gif(output / "clips.gif", title, moving[:4], fps=config.encoding.fps or 8)
    return {
        "model": config.encoding.model,
        "is_trained": is_trained,
        "psnr_db": round(float(np.mean(found_db)), 2) if is_trained else None,
        "encode": result,
        "read": read,
        "pictures": ["grid.png", "clips.gif"],
    }


def _row(label: str, original: Frames, latent: Frames, decoded: Frames) -> Row:
    shown = [frames[index] for frames in (original, latent, decoded) for index in spread(len(frames), 3)]
    return Row(label=label, pictures=shown)


def _tell(summary: dict[str, Any], output: Path, page: Path) -> None:
    encode, read = summary["encode"], summary["read"]
    print(
        f"\nencoded   {encode['num_records']} clips and images ({encode['num_frames']} frames) of "
        f"{encode['num_videos']} files in {encode['num_shards']} shards, {encode['num_videos_rejected']} rejected, in "
        f"{encode['elapsed_s']:.1f} s: {encode['clips_per_s']:.2f} clips/s with the start of Ray\n"
        f"read back {read['num_records']} records in {read['num_batches']} batches, shapes "
        f"{', '.join('x'.join(map(str, shape)) for shape in read['latent_shapes'])} (C, t, h, w)\n"
        f"look at   {output / 'grid.png'} and {output / 'clips.gif'}; the latents are in {output / 'latents'}\n"
        f"open      {page} in a browser: what was asked, what came out, and clips beside their originals"
    )
    if summary["is_trained"]:
        print(f"quality   PSNR {summary['psnr_db']} dB against the frames that went in")
    else:
        print(
            f"quality   none: the model {summary['model']!r} that ships is UNTRAINED, so that its latents and its "
            "reconstructions carry no meaning; give --model FOLDER with published weights for real ones"
        )


if __name__ == "__main__":
    # An embedded Ray keeps its session files where the user asks for, or in the default place.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main(sys.argv[1:]))
