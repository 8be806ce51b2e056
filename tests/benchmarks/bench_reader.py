"""How fast training reads latents: LatentDataset beside stock WebDataset and LitData, and what it costs to begin.

Run as a script (`make bench` does). LitData needs another botocore than Latentmill, so it lives in a virtual
environment of its own (with litdata, torch, pyarrow, psutil and s3fs): --litdata-python names its interpreter; without
one its column is left out.

Every reader does the same work: batches of 8 of one shape, shuffled, float32 and scaled, with caption and key (ours
also with its other columns and the cursor), from the same latents: those of the real clips of the tests, encoded by the
model "small" (float16; 4 of its 32 channels, as Stable Diffusion has them: 40 KB, so that what a sample costs beside
its bytes shows), multiplied as in bench_layout. Latentmill reads its Parquet with windows of 32 MiB and checks every
SHA-256 in the first epoch; WebDataset reads Latentmill's tars through a shuffle buffer of 1,000; LitData reads its own
chunks of 64 MB, written by its own writer, and checks nothing. From the object store each begins with an empty cache;
WebDataset has none. "Large files" are the same latents in two shards, each several windows long. The part "long", which
has to be asked for, is without WebDataset: --long-shards shards, so that what an epoch costs once shows less (192: two
folders of 2 GB).

For all of them the clock of the first epoch starts before the dataset is opened, and that of the later two when the
first is over; waiting for a first batch and starting workers count. Every measurement is a process of its own; the
readers take turns, and medians of the rounds count. Processor time is that of the process and those below it. Memory
comes from a run of its own: the proportional set size (PSS) of the process and its workers at its highest, less what it
was after the imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]

from results import add_results_option, report  # noqa: E402

BATCH_SIZE = 8
NUM_EPOCHS = 3
READERS = ("latentmill", "webdataset", "litdata")
SCALE, SHIFT = 0.5, 0.25
BUCKET = "latents"
# More of them than this are the same again, so that they fit in memory while they are written.
_NUM_MADE = 6144


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--litdata-python", help="interpreter of an environment with litdata")
    parser.add_argument("--shards", type=int, default=24, help="shards of 256 rows, 10 MB each")
    parser.add_argument("--long-shards", type=int, default=192, help="of the part `long`")
    parser.add_argument("--plan-shards", type=int, default=100_000, help="of the part `plan`")
    parser.add_argument("--keep", help="a folder for the latents, used again where they are there already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="rates,fly,first,plan", help="which tables, comma-separated (and long)")
    add_results_option(parser)
    parser.add_argument("--child", help="internal: one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[json.loads(arguments.child)["what"]](json.loads(arguments.child))))
        return
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-reader-") as folder:
        for part in arguments.parts.split(","):
            for found in PARTS[part](arguments, Path(folder)):
                (notes if isinstance(found, str) else rows).append(found)
                print(found, file=sys.stderr, flush=True)
    title = f"{arguments.shards * 256} latents (4, 5, 32, 32) float16, samples/s, {arguments.rounds} rounds"
    report("reader", rows, configuration=vars(arguments), title=title, notes=notes)


def measured(python: str, **task: Any) -> dict[str, Any]:
    """One measurement in a process of its own; the environment says where the object store is."""
    done = subprocess.run(
        [python, __file__, "--child", json.dumps(task)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Rates


def rates(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    from servers import s3_client, seaweed

    folder = Path(arguments.keep or folder)
    num_rows = arguments.shards * 256
    for name, num_shards in (("latents", arguments.shards), ("large", 2)):
        if not (folder / name).exists():
            write_latents(str(folder / name), num_shards, num_rows // num_shards, "both")
    pythons = {"latentmill": sys.executable, "webdataset": sys.executable}
    if arguments.litdata_python:
        pythons["litdata"] = arguments.litdata_python
        if not (folder / "lit").exists():
            paths = {"source": str(folder / "latents"), "to": str(folder / "lit")}
            measured(arguments.litdata_python, what="write_litdata", **paths)
    with seaweed([BUCKET]) as (_, env):
        os.environ.update(env)
        client = s3_client(env)
        for name in ("latents", "lit"):
            for path in sorted((folder / name).rglob("*")) if (folder / name).exists() else []:
                if path.is_file():
                    client.put_object(Bucket=BUCKET, Key=str(path.relative_to(folder)), Body=path.read_bytes())
        for where, workers, data in (
            ("disk", 0, "latents"),
            ("disk", 2, "latents"),
            ("SeaweedFS", 0, "latents"),
            ("SeaweedFS", 2, "latents"),
            ("disk, large files", 0, "large"),
        ):
            root = f"s3://{BUCKET}" if where == "SeaweedFS" else str(folder)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
            # The last round is for memory: looking at it takes time.
            for turn in range(arguments.rounds + 1):
                for name, python in pythons.items():
                    task = {"root": root, "data": data, "workers": workers, "cache": str(folder / "cache")}
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                    run = measured(python, what=name, watch=turn == arguments.rounds, **task)
                    assert run["num_samples"] == NUM_EPOCHS * num_rows, f"{name} gave {run['num_samples']}"
                    runs[name].append(run)
            yield from _rows_of_table(f"{where}, {workers or 'no'} workers", runs)


def long_epochs(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    if not arguments.litdata_python:
        raise SystemExit("the part `long` compares with LitData; give --litdata-python")
    folder = Path(arguments.keep or folder) / "long"
    num_rows = arguments.long_shards * 256
    if not (folder / "latents").exists():
        write_latents(str(folder / "latents"), arguments.long_shards, 256, "parquet")
    if not (folder / "lit").exists():
        paths = {"source": str(folder / "latents"), "to": str(folder / "lit")}
        measured(arguments.litdata_python, what="write_litdata", **paths)
    for workers in (0, 2):
        runs: dict[str, list[dict[str, Any]]] = {"latentmill": [], "litdata": []}
        for turn in range(arguments.rounds + 1):
            for name, some in runs.items():
                python = arguments.litdata_python if name == "litdata" else sys.executable
                task = {"root": str(folder), "data": "latents", "workers": workers, "cache": str(folder / "cache")}
                run = measured(python, what=name, watch=turn == arguments.rounds, **task)
                assert run["num_samples"] == NUM_EPOCHS * num_rows, f"{name} gave {run['num_samples']}"
                some.append(run)
        yield from _rows_of_table(f"disk, {workers or 'no'} workers, {num_rows:,} latents", runs)


def _rows_of_table(what: str, runs: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The first epoch and the later ones; `runs` are those of each reader, the last of them for its memory."""
    for epochs in ("first", "later"):
        middle = {
            value: {name: statistics.median(run[epochs][value] for run in some[:-1]) for name, some in runs.items()}
            for value in ("rate", "cpu_us")
        }
        rate = middle["rate"]
        yield {
            "from, workers": what,
            "epoch": f"{epochs}, from opening" if epochs == "first" else epochs,
            **rate,
            "to the faster other": rate["latentmill"] / max(rate[name] for name in rate if name != "latentmill"),
            "processor, us a sample": ", ".join(f"{value:,.0f}" for value in middle["cpu_us"].values()),
            "first batch after, s": ", ".join(
                f"{statistics.median(run['first_batch_s'] for run in some[:-1]):.2f}" for some in runs.values()
            )
            if epochs == "first"
            else None,
            "memory, MB": ", ".join(f"{some[-1]['memory_mb']:,.0f}" for some in runs.values()),
        }


def write_latents(root: str, num_shards: int, rows: int, output_format: str) -> int:
    """An output of Latentmill with a snapshot; the number of its rows."""
    from bench_layout import multiply, real_latents
    from latents import commit_records, manifest

    from pipeline.commit import open_dataset, publish_snapshot
    from pipeline.storage import open_store

    store = open_store(root)
    about = open_dataset(store, manifest())
    latents = multiply([latent[:4] for latent in real_latents()], min(num_shards * rows, _NUM_MADE))
    for number in range(num_shards):
        records = [_record(f"{number:05d}{row:05d}", latents[(number * rows + row) % _NUM_MADE]) for row in range(rows)]
        commit_records(store, about, f"s{number:05d}", records, output_format=output_format)
    publish_snapshot(store)
    return num_shards * rows


def _record(key: str, latent: Any) -> Any:
    from dataclasses import replace

    from latents import record

    from pipeline.records import Bucket

    bucket = Bucket(width_px=256, height_px=256, num_frames=17)
    caption = f"a clip of some length with the number {key}, described in one sentence of about twenty words"
    return replace(record(key, caption=caption), mean=latent, bucket=bucket)


@contextmanager
def peak_memory(is_watched: bool) -> Iterator[list[float]]:
    """PSS of this process and those below it in MB, less that at the start: its highest value so far."""
    import psutil

    me, peak, is_over = psutil.Process(), [0.0], threading.Event()
    if not is_watched:
        yield peak
        return

    def pss() -> float:
        total = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total / 2**20

    before = pss()

    def watch() -> None:
        while not is_over.wait(0.1):
            peak[0] = max(peak[0], pss() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def rate_of(make_loader: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Samples a second, and the processor's time for each of them, of the first epoch and of those after it."""
    import psutil

    def cpu_s() -> float:
        me = psutil.Process()
        return sum(sum(process.cpu_times()[:4]) for process in [me, *me.children(recursive=True)])

    with peak_memory(task["watch"]) as peak:
        marks = [(time.perf_counter(), cpu_s(), 0)]
        num_samples = 0
        first_batch_s = None
        loader, set_epoch = make_loader()
        for epoch in range(NUM_EPOCHS):
            set_epoch(epoch)
            for batch in loader:
                if first_batch_s is None:
                    first_batch_s = time.perf_counter() - marks[0][0]
                num_samples += len(batch["key"])
                assert str(batch["latents"].dtype) == "torch.float32"
            marks.append((time.perf_counter(), cpu_s(), num_samples))

    def between(start: tuple[float, float, int], stop: tuple[float, float, int]) -> dict[str, float]:
        seconds, computed_s, num = (after - before for before, after in zip(start, stop, strict=True))
        return {"rate": num / seconds, "cpu_us": computed_s / num * 1e6}

    return {
        "num_samples": num_samples,
        "first": between(marks[0], marks[1]),
        "later": between(marks[1], marks[-1]),
        "first_batch_s": first_batch_s,
        "memory_mb": peak[0],
    }


def _as_it_is(batch: Any) -> Any:
    # DataLoader's own way looks at every text of a batch.
    return batch


def _workers(task: dict[str, Any]) -> dict[str, Any]:
    return {"num_workers": task["workers"], "persistent_workers": task["workers"] > 0}


def read_latentmill(task: dict[str, Any]) -> dict[str, Any]:
    from torch.utils.data import DataLoader

    from pipeline import LatentDataset

    def loader() -> Any:
        dataset = LatentDataset(
            f"{task['root']}/{task['data']}", batch_size=BATCH_SIZE, cache_dir=task["cache"], window_bytes=32 << 20
        )
        return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, **_workers(task)), dataset.set_epoch

    return rate_of(loader, task)


def read_webdataset(task: dict[str, Any]) -> dict[str, Any]:
    import webdataset as wds

    from pipeline.dataset import data_urls

    def loader() -> Any:
        urls = data_urls(f"{task['root']}/{task['data']}", "webdataset")
        if task["root"].startswith("s3://"):
            urls = [f"pipe:curl -s -f '{_presigned(url)}'" for url in urls]
        dataset = (
            wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
            .shuffle(1000)
            .decode()
            .to_tuple("__key__", "latent.npy", "txt")
            .batched(BATCH_SIZE, collation_fn=_collated)
        )
        return wds.WebLoader(dataset, batch_size=None, collate_fn=_as_it_is, **_workers(task)), lambda epoch: None

    return rate_of(loader, task)


def _presigned(url: str) -> str:
    from servers import s3_client

    bucket, _, key = url.removeprefix("s3://").partition("/")
    found: str = s3_client(os.environ).generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    return found


def read_litdata(task: dict[str, Any]) -> dict[str, Any]:
    import litdata
    from litdata.streaming import downloader

    def loader() -> Any:
        options = {}
        # Its newer way to S3 knows no other option for plain HTTP.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        if task["root"].startswith("s3://"):
            options = {"storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}}
        dataset = litdata.StreamingDataset(
            f"{task['root']}/lit", shuffle=True, seed=0, cache_dir=task["cache"], drop_last=False, **options
        )
        loader = litdata.StreamingDataLoader(
            dataset, batch_size=BATCH_SIZE, collate_fn=_collated, drop_last=False, **_workers(task)
        )
        return loader, lambda epoch: None

    return rate_of(loader, task)


def write_litdata(task: dict[str, Any]) -> dict[str, Any]:
    """LitData's chunks of the latents of an output, by its own writer."""
    import litdata
    import pyarrow.parquet as pq

    paths = sorted((Path(task["source"]) / "data").rglob("*.parquet"))
    litdata.optimize(
        fn=_rows_of, inputs=[str(path) for path in paths], output_dir=task["to"], chunk_bytes="64MB", num_workers=1
    )
    assert pq
    return {}


def _rows_of(path: str) -> Iterator[tuple[str, Any, str]]:
    import numpy as np
    import pyarrow.parquet as pq

    for row in pq.read_table(path, columns=["key", "latent", "latent_shape", "caption"]).to_pylist():
        yield row["key"], np.frombuffer(row["latent"], "<f2").reshape(row["latent_shape"]), row["caption"]


def _collated(samples: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    import numpy as np
    import torch

    keys, latents, captions = zip(*samples, strict=True)
    stacked = torch.from_numpy(np.stack(latents)).float().sub_(SHIFT).mul_(SCALE)
    return {"latents": stacked, "key": list(keys), "caption": list(captions)}


# Against decoding and encoding in the training loop


def on_the_fly(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    if not (folder / "latents").exists():
        write_latents(str(folder / "latents"), arguments.shards, 256, "parquet")
    read, encoded = [], []
    for _ in range(arguments.rounds):
        task = {"root": str(folder), "data": "latents", "workers": 0, "cache": str(folder / "cache"), "watch": False}
        read.append(measured(sys.executable, what="latentmill", **task)["later"]["rate"])
        encoded.append(measured(sys.executable, what="encode")["rate"])
    factor = statistics.median(read) / statistics.median(encoded)
    yield (
        f"Against decoding (decord) and encoding (`small`, 17x256x256) in the training loop, one process each: "
        f"{statistics.median(read):,.0f} against {statistics.median(encoded):.2f} samples/s, {factor:,.0f} times"
    )


def encode_clips(task: dict[str, Any]) -> dict[str, Any]:
    import torch
    from bench_layout import real_latents

    torch.set_num_threads(1)
    started = time.perf_counter()
    return {"rate": len(real_latents()) / (time.perf_counter() - started)}


# The beginning


def first_batches(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    from servers import seaweed

    num_shards, rows = 1000, 16
    with seaweed([BUCKET]) as (_, env):
        os.environ.update(env)
        write_latents(f"s3://{BUCKET}/many", num_shards, rows, "parquet")
        for workers in (0, 2):
            runs = []
            for _ in range(arguments.rounds):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                task = {"root": f"s3://{BUCKET}/many", "workers": workers, "cache": str(folder / "cache")}
                runs.append(measured(sys.executable, what="first_batch", **task))
            yield (
                f"First batch from {num_shards} shards of {rows} rows (0.6 MB) on SeaweedFS, empty cache, {workers} "
                f"workers: {statistics.median(run['seconds'] for run in runs):.2f} s, of which this process computed "
                f"{statistics.median(run['cpu_s'] for run in runs):.2f} s"
            )


def first_batch(task: dict[str, Any]) -> dict[str, Any]:
    from torch.utils.data import DataLoader

    from pipeline import LatentDataset

    started, computed = time.perf_counter(), time.process_time()
    dataset = LatentDataset(task["root"], batch_size=BATCH_SIZE, cache_dir=task["cache"])
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=task["workers"]))
    next(batches)
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - computed}


def plans(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    num_shards = arguments.plan_shards
    write_commits(folder / "synthetic", num_shards)
    found = [measured(sys.executable, what="plan", root=str(folder / "synthetic")) for _ in range(arguments.rounds)]
    middle = {name: statistics.median(entry[name] for entry in found) for name in found[0]}
    yield (
        f"{num_shards:,} shards of 1,000 rows in 3 buckets, one snapshot on disk: opened in {middle['open_s']:.1f} s "
        f"(computing: {middle['open_cpu_s']:.1f} s), "
        f"epoch planned to the first batch in {middle['plan_s']:.2f} s and to a batch in the middle in "
        f"{middle['middle_s']:.2f} s; memory of the process at most {middle['peak_mb']:.0f} MB, of which the imports "
        f"are {middle['imports_mb']:.0f} MB"
    )


def write_commits(root: Path, num_shards: int) -> None:
    """A snapshot of commit records whose files do not exist."""
    import hashlib

    from commits import make_commit
    from latents import manifest

    from pipeline.commit import name_of, open_dataset, publish_snapshot
    from pipeline.records import FileStat
    from pipeline.storage import open_store

    store = open_store(str(root))
    open_dataset(store, manifest())
    commits = []
    for number in range(num_shards):
        sha256 = hashlib.sha256(str(number).encode()).hexdigest()
        shard_id = f"{number:05d}-{sha256[:8]}"
        latents = FileStat(
            key=f"data/{sha256[:2]}/{shard_id}-{sha256[:16]}.parquet",
            num_bytes=60_000_000 + number,
            sha256=sha256,
            num_rows=1000,
            content="parquet",
            bucket_rows={"256x256x17": 600, "320x192x33": 300, "512x512x1": 100},
        )
        rejected = FileStat(
            key=f"data/{sha256[:2]}/{shard_id}-{sha256[16:32]}.rejected.parquet",
            num_bytes=3000,
            sha256=sha256[::-1],
            num_rows=10,
            content="rejected",
        )
        commits.append(make_commit(shard_id, 1000, files=(latents, rejected)))
    # Published as a run does it, but without 100,000 records to write, list and read.
    by_name = {name_of(commit): commit for commit in sorted(commits, key=name_of)}
    with (
        patch("pipeline.commit.record_names", lambda _store: by_name),
        patch("pipeline.commit.load_commits", lambda _store, names: map(by_name.__getitem__, names)),
    ):
        publish_snapshot(store)


def open_and_plan(task: dict[str, Any]) -> dict[str, Any]:
    from pipeline import LatentDataset

    def peak_mb() -> float:
        # Not `ru_maxrss`, which begins with what the parent had when it forked.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024

    imports_mb, times, computed = peak_mb(), [time.perf_counter()], time.process_time()
    dataset = LatentDataset(task["root"], batch_size=16, world_size=8)
    open_cpu_s = time.process_time() - computed
    times.append(time.perf_counter())
    for passed in (0, dataset.num_records // (16 * 8) // 2):
        # No file is there to be read, so the order is asked for itself.
        next(dataset._planned_batches(dataset._contents, 0, passed, 0, 0, 1))
        times.append(time.perf_counter())
    open_s, plan_s, middle_s = (after - before for before, after in itertools.pairwise(times))
    return {
        "open_s": open_s,
        "open_cpu_s": open_cpu_s,
        "plan_s": plan_s,
        "middle_s": middle_s,
        "peak_mb": peak_mb(),
        "imports_mb": imports_mb,
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Any]]] = {
    "rates": rates,
    "long": long_epochs,
    "fly": on_the_fly,
    "first": first_batches,
    "plan": plans,
}
CHILDREN = {
    "latentmill": read_latentmill,
    "webdataset": read_webdataset,
    "litdata": read_litdata,
    "write_litdata": write_litdata,
    "encode": encode_clips,
    "first_batch": first_batch,
    "plan": open_and_plan,
}

if __name__ == "__main__":
    main()
