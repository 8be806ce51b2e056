"""The audit of an output: whether everything that its records state is there, whole, and true.

Not a repair (`redo` orders one from what is found here), and nothing is written. `cli` prints what comes out. What is
checked here is checked from the stored bytes alone, by code of its own where the writer has a rule of its own too.

    records     each can be read, is of this dataset, stands under its own name, and balances; generations have no gap
    files       there, of the stated size (always) and SHA-256 (unless quick)
    rows        Parquet, tar and rejections are read whole: the samples are unique, the formats hold the same latents,
                every value is finite, shapes and dtypes are those of the bucket and the dataset, and what is counted is
                what the record states
    snapshots   numbered from 1 without a gap; each holds all that the one before it holds; the records stand
    plans       every slice that was planned is there; which of them are not decided yet
    inputs      on request: whether the sources still are what was encoded

A column set (`columns`) is audited by its own URI: its rows are unique, of the stated dtype and shape, and finite;
every record of the output with samples has one of the set, with the texts or clips of its base file and no others.

A quick audit reads records and lists, and no data file.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import (
    ColumnsManifest,
    base_file,
    base_of,
    columns_manifest_of,
    columns_schema,
    stored_captions_of,
)
from pipeline.commit import (
    DecidedShard,
    Snapshot,
    committed_ids,
    decided_shards,
    known_commits,
    load_commits,
    manifest_of_output,
    name_of,
    parse_record_name,
    read_data_file,
    read_shard,
    read_snapshot,
)
from pipeline.committed import FileCache, shard_outcome
from pipeline.errors import DamagedObjectError, RejectionError, StorageError, StorageNotFoundError, UsageError
from pipeline.format import rejection_schema, schema
from pipeline.inputs import digest_of_versions, is_other_version, read_slice, version_of
from pipeline.plan import planned_slices
from pipeline.records import COUNTED, Commit, DatasetManifest, FileStat, ShardCounts, ShardSpec, sum_counts
from pipeline.redo import ordered_repairs
from pipeline.scratch import Scratch
from pipeline.storage import InputFile, ObjectStore, stat_input
from pipeline.stored import RecordFile, StoredRecord, open_records, read_rejections

# The closed list of what can be found. The first group is damage; encoding the shard again mends what is in REPAIRABLE.
FINDINGS: Mapping[str, str] = {
    "record": "a commit record cannot be read, or contradicts itself or the dataset",
    "missing": "a file that a record names is not there",
    "size": "a file has another size than its record states",
    "digest": "a file has another SHA-256 than its record states",
    "unreadable": "a file has the bytes that its record states, and they are not what they should be",
    "counts": "what a file or a shard holds is not what its record counts",
    "duplicate": "a sample is there twice",
    "shape": "a latent has another shape, dtype or kind than its bucket and the dataset say",
    "values": "a latent has values that are not finite",
    "formats": "the Parquet file and the tar of a shard hold different samples",
    "snapshot": "a snapshot cannot be read, is missing from the row, or lacks what stood in an earlier one",
    "plan": "a plan cannot be read, or a slice of it is not there",
    # From here on: no damage.
    "undecided": "a planned slice, or a record of the output in a column set, has no record yet",
    "ordered": "a repair is ordered and not done yet",
    "changed": "an input is another one than when it was encoded",
}
REPAIRABLE = frozenset(("missing", "size", "digest", "unreadable", "counts", "duplicate", "shape", "values", "formats"))
_UNFINISHED = frozenset(("undecided", "ordered"))
_NO_DAMAGE = _UNFINISHED | {"changed"}
_ROW_COLUMNS = ("bucket", "num_frames", "latent_num_frames", "width", "height")
_NUM_READERS = 16
# Whole data files are in memory while they are checked.
_NUM_CHECKERS = 4
_CACHE_BYTES = 4 << 30
_MAX_PER_FILE = 20
_Manifest = DatasetManifest | ColumnsManifest
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        kind: one of `FINDINGS`.
        where: the object, or the name of the record or input.
        message: one sentence.
        record: the commit record that it concerns, where there is one.
    """

    kind: str
    where: str
    message: str
    record: str | None = None

    @property
    def is_damage(self) -> bool:
        return self.kind not in _NO_DAMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit looked at and what it found.

    Attributes:
        is_quick: no data file was read.
        counts: accounts of the output, as its records state them together.
        num_bytes_read: of data files.
        num_slices: planned slices of tables and folders; tars are planned by their listing alone.
        num_unnamed: files below data/ that no record names; garbage collection explains them.
    """

    output: str
    is_quick: bool
    num_records: int
    num_shards: int
    num_files: int
    num_bytes: int
    num_bytes_read: int
    num_unnamed: int
    num_unnamed_bytes: int
    num_snapshots: int
    num_slices: int
    num_inputs: int
    counts: ShardCounts
    findings: tuple[Finding, ...]

    @property
    def damage(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.is_damage)

    @property
    def is_unfinished(self) -> bool:
        return any(finding.kind in _UNFINISHED for finding in self.findings)

    @property
    def repairable(self) -> Mapping[str, Sequence[str]]:
        """Record -> what is wrong with it, of the records that encoding their shards again can mend."""
        found: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.kind in REPAIRABLE and finding.record is not None:
                found.setdefault(finding.record, []).append(f"{finding.kind}: {finding.message}")
        return found


@dataclass(slots=True)
class _Checked:
    """What came of one record."""

    findings: list[Finding] = field(default_factory=list)
    num_bytes_read: int = 0


def audit(store: ObjectStore, *, is_quick: bool = False, with_inputs: bool = False) -> Audit:
    """Audits an output. It may be written to meanwhile: what is committed later is not looked at.

    Args:
        is_quick: read no data file; presence and sizes come from a listing.
        with_inputs: also compare the sources with what was encoded; one request for each file of a table or folder.

    Raises:
        UsageError: there is no output here.
        StorageError: the store does not answer.
    """
    output = base_of(store)
    manifest = manifest_of_output(store) if output is None else columns_manifest_of(store)
    findings: list[Finding] = []
    # Listed before the set: an actor commits the set's record first.
    expected = () if output is None else known_commits(output)
    names = sorted(committed_ids(store))
    commits = _records(store, names, manifest, findings)
    # Listed after the records were read: whatever they name was there before them.
    sizes = {info.key: info.num_bytes for info in store.list("data/")}
    shards = {shard.shard_id: shard for shard in decided_shards(commits.values()) if shard.shard_id in commits}
    counting = [commit for shard in shards.values() for commit in shard.commits]

    def check(commit: Commit) -> _Checked:
        return _check_record(store, manifest, commit, sizes, is_quick)

    num_bytes_read = 0
    for checked in _in_parallel(check, counting, _NUM_CHECKERS):
        findings += checked.findings
        num_bytes_read += checked.num_bytes_read
    if output is not None:
        findings += _check_coverage(expected, counting)
    elif not is_quick:
        findings += _check_generations(store, shards.values(), {finding.record for finding in findings})
    num_snapshots = _check_snapshots(store, commits, names, findings, is_quick)
    slices = _check_plans(store, shards, commits, findings, is_quick)
    for record in ordered_repairs(store, shards):
        message = "a repair is ordered; the next run of the job on this input carries it out"
        findings.append(Finding(kind="ordered", where=record, message=message))
    num_inputs = _check_inputs(store, shards, slices, findings) if with_inputs and output is None else 0
    named = {file.key: file.num_bytes for commit in commits.values() for file in commit.files}
    unnamed = {key: num_bytes for key, num_bytes in sizes.items() if key not in named}
    return Audit(
        output=store.root_uri,
        is_quick=is_quick,
        num_records=len(names),
        num_shards=len(shards),
        num_files=len(named),
        num_bytes=sum(named.values()),
        num_bytes_read=num_bytes_read,
        num_unnamed=len(unnamed),
        num_unnamed_bytes=sum(unnamed.values()),
        num_snapshots=num_snapshots,
        num_slices=len(slices),
        num_inputs=num_inputs,
        counts=sum_counts(shard.counts for shard in shards.values()),
        findings=tuple(findings),
    )


def _check_coverage(expected: Sequence[Commit], records: Sequence[Commit]) -> Iterator[Finding]:
    """Records of the output with samples that a set does not speak of yet."""
    covered = {(record.shard_id, record.source_etag) for record in records}
    for shard in decided_shards(expected):
        for commit in shard.commits:
            base = base_file(commit.files)
            if base is not None and (shard.shard_id, base.sha256) not in covered:
                message = (
                    "this record of the output has no embeddings yet: run jobs/encode_text.py, for first frames the job"
                )
                yield Finding(kind="undecided", where=name_of(commit), message=message)


def _check_generations(
    store: ObjectStore, shards: Iterable[DecidedShard], damaged: Collection[str | None]
) -> list[Finding]:
    """Of shards with several records that can all be read: what these together hold."""
    findings = []
    with Scratch("audit") as folder:
        cache = FileCache(folder, _CACHE_BYTES)
        for shard in shards:
            names = [name_of(commit) for commit in shard.commits]
            if len(names) == 1 or any(name in damaged for name in names):
                continue
            outcome = shard_outcome(shard, store, cache)
            differing = _differences(shard.counts, outcome.counts)
            if differing:
                message = f"the generations together hold {differing}"
                findings.append(Finding(kind="counts", where=names[-1], message=message, record=names[-1]))
            num_rows = sum(commit.counts.num_records for commit in shard.commits)
            if num_rows > outcome.counts.num_records:
                message = f"{num_rows - outcome.counts.num_records} samples are in an earlier generation as well"
                findings.append(Finding(kind="duplicate", where=names[-1], message=message, record=names[-1]))
    return findings


def _in_parallel(work: Callable[[_T], _R], entries: Iterable[_T], num_threads: int) -> Iterator[_R]:
    """The results in order, with no more than a few entries taken ahead."""
    remaining = iter(entries)
    with ThreadPoolExecutor(num_threads) as pool:
        while batch := list(islice(remaining, 8 * num_threads)):
            yield from pool.map(work, batch)


def _records(
    store: ObjectStore, names: Sequence[str], manifest: _Manifest, findings: list[Finding]
) -> dict[str, Commit]:
    """The records that can be read, by name."""

    def read(name: str) -> Commit | Finding:
        try:
            return next(load_commits(store, [name]))
        except StorageNotFoundError:
            # `committed_ids` names every generation below the highest one.
            message = "there is a later generation and not this one; restore it, for example from a snapshot"
        except DamagedObjectError as error:
            message = f"{error}; restore it, for example from a snapshot, which holds a copy"
        return Finding(kind="record", where=name, message=message, record=name)

    commits: dict[str, Commit] = {}
    for name, found in zip(names, _in_parallel(read, names, _NUM_READERS), strict=True):
        if isinstance(found, Finding):
            findings.append(found)
            continue
        wrong = _wrong_with(found, name, manifest)
        findings += [Finding(kind="record", where=name, message=message, record=name) for message in wrong]
        if name_of(found) == name:
            commits[name] = found
    return commits


def _wrong_with(commit: Commit, name: str, manifest: _Manifest) -> Iterator[str]:
    shard_id, generation = parse_record_name(name)
    if (commit.shard_id, commit.generation) != (shard_id, generation):
        yield f"it is the record of generation {commit.generation} of {commit.shard_id}"
        return
    if commit.fingerprint != manifest.fingerprint:
        yield f"its fingerprint is {commit.fingerprint}, that of the dataset {manifest.fingerprint}"
    if commit.format_version != manifest.format_version:
        yield f"its format version is {commit.format_version}, that of the dataset {manifest.format_version}"
    contents = Counter(file.content for file in commit.files)
    repeated = sorted(content for content, number in contents.items() if number > 1)
    if repeated:
        yield f"it names several files of {', '.join(repeated)}"
    wanted = {"both": {"parquet", "webdataset"}}.get(
        format_ := str(manifest.fingerprint_fields.get("format")), {format_}
    )
    found = contents.keys() - {"rejected"}
    if commit.counts.num_records == 0:
        wanted = set()
    if "format" in manifest.fingerprint_fields and found != wanted:
        yield f"it names data files of {sorted(found)}, and not of {sorted(wanted)}"
    if bool(contents["rejected"]) != bool(commit.counts.reasons):
        yield f"it counts the rejections {dict(commit.counts.reasons)} and names {contents['rejected']} files of them"
    if commit.replaces is not None and parse_record_name(commit.replaces)[0] != shard_id:
        yield f"it replaces {commit.replaces}, which is of another shard"


def _check_record(
    store: ObjectStore, manifest: _Manifest, commit: Commit, sizes: Mapping[str, int], is_quick: bool
) -> _Checked:
    checked = _Checked()
    name = name_of(commit)

    def found(kind: str, file: FileStat | None, message: str) -> None:
        where = name if file is None else store.url(file.key)
        checked.findings.append(Finding(kind=kind, where=where, message=message, record=name))

    samples: dict[str, dict[tuple[str, int], bytes]] = {}
    account = _Account()
    is_whole = True
    for file in commit.files:
        if f"-{file.sha256[:16]}." not in file.key:
            found("unreadable", file, f"its name does not hold its SHA-256 {file.sha256}")
        size = sizes.get(file.key)
        if size is None:
            info = store.head(file.key)
            size = None if info is None else info.num_bytes
        if size is None or size != file.num_bytes:
            is_whole = False
            if size is None:
                found("missing", file, "the file is not there")
            else:
                found("size", file, f"it has {size} bytes, and its record states {file.num_bytes}")
            continue
        if is_quick:
            continue
        try:
            data = read_data_file(store, file)
        except (DamagedObjectError, StorageNotFoundError) as error:
            is_whole = False
            found("digest" if isinstance(error, DamagedObjectError) else "missing", file, str(error))
            continue
        checked.num_bytes_read += len(data)
        try:
            if isinstance(manifest, ColumnsManifest):
                problems = _check_embeddings(store, data, file, commit, manifest, account)
            elif file.content == "rejected":
                problems = account.add_rejections(data, file, manifest)
            else:
                samples[file.content], problems = _check_rows(data, file, manifest, account, is_first=not samples)
        except _UNREADABLE as error:
            is_whole = False
            found("unreadable", file, f"it cannot be read: {error!r:.300}")
            continue
        for kind, message in islice(problems, _MAX_PER_FILE):
            found(kind, file, message)
    if is_quick or not is_whole:
        return checked
    differing = _differences(commit.counts, account.counts())
    if differing:
        found("counts", None, f"its files hold {differing}")
    if len(samples) == 2 and samples["parquet"] != samples["webdataset"]:
        parquet, tar = samples["parquet"], samples["webdataset"]
        differing_samples = sorted(key for key in parquet.keys() | tar.keys() if parquet.get(key) != tar.get(key))
        found(
            "formats",
            None,
            f"{len(differing_samples)} samples differ between the Parquet file and the tar, such as "
            f"clip {differing_samples[0][1]} of {differing_samples[0][0]!r}",
        )
    return checked


# Whatever a reader says to bytes that nobody wrote on purpose.
_UNREADABLE = (
    StorageError,
    RejectionError,
    pa.ArrowException,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
)
_Problem = tuple[str, str]


def _check_rows(
    data: bytes, file: FileStat, manifest: DatasetManifest, account: _Account, *, is_first: bool
) -> tuple[dict[tuple[str, int], bytes], list[_Problem]]:
    """The samples of a file with latents, each with a digest of its latent, and what is wrong with them."""
    records = open_records(data, file.content)
    problems: list[_Problem] = _facts_problems(data, records, file, manifest)
    samples: dict[tuple[str, int], bytes] = {}
    bucket_rows: Counter[str] = Counter()
    for group in range(len(records.group_rows)):
        for row in records.read_group(group, _ROW_COLUMNS):
            sample = row.key, row.clip_index
            if sample in samples:
                problems.append(("duplicate", f"clip {row.clip_index} of {row.key!r} is there twice"))
                continue
            samples[sample] = hashlib.sha256(row.latent.tobytes()).digest()
            problems += _row_problems(row, manifest)
            bucket_rows[row.columns["bucket"]] += 1
            if is_first:
                account.add(row.key, row.columns["num_frames"])
    if records.num_rows != file.num_rows or dict(bucket_rows) != dict(file.bucket_rows):
        problems.append(
            (
                "counts",
                f"it has {records.num_rows} rows, {dict(bucket_rows)} by bucket; its record states {file.num_rows}, "
                f"{dict(file.bucket_rows)}",
            )
        )
    return samples, problems


def _check_embeddings(
    store: ObjectStore, data: bytes, file: FileStat, commit: Commit, manifest: ColumnsManifest, account: _Account
) -> list[_Problem]:
    """What is wrong with the rows of a set, by themselves and beside the base file that they are about."""
    parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    if not parquet.schema_arrow.equals(columns_schema(manifest), check_metadata=True):
        return [("unreadable", "its columns or its schema metadata are not those of the set")]
    problems: list[_Problem] = []
    found: dict[Any, Any] = {}
    num_rows = 0
    for group in range(parquet.num_row_groups):
        for row in parquet.read_row_group(group).to_pylist():
            num_rows += 1
            name = row["caption"] if manifest.name == "text" else (row["key"], row["clip_index"])
            what = f"the row of {name!r:.100}"
            if name in found:
                problems.append(("duplicate", f"{what} is there twice"))
            found[name] = row.get("keys")
            account.add(f"{name}", 0)
            shape, dtype = row["embedding_shape"], row["embedding_dtype"]
            is_text = manifest.name == "text" and len(shape) == 2 and 1 <= shape[0] <= manifest.max_length
            is_frame = manifest.name == "image" and len(shape) == 1
            if not (is_text or is_frame) or (shape[-1], dtype) != (manifest.embedding_dim, manifest.embedding_dtype):
                problems.append(("shape", f"{what} is {dtype} {tuple(shape)}, which the set does not say"))
                continue
            values = np.frombuffer(row["embedding"], np.dtype(dtype).newbyteorder("<"))
            if values.size != math.prod(shape):
                problems.append(("shape", f"{what} has {values.size} values, and its shape is {tuple(shape)}"))
            elif not np.isfinite(values).all():
                problems.append(("values", f"{what} has values that are not finite"))
    if num_rows != file.num_rows:
        problems.append(("counts", f"it has {num_rows} rows, and its record states {file.num_rows}"))
    return problems + _base_problems(store, commit, manifest, found)


def _base_problems(
    store: ObjectStore, commit: Commit, manifest: ColumnsManifest, found: Mapping[Any, Any]
) -> list[_Problem]:
    output = base_of(store)
    assert output is not None, f"{store.root_uri} is no column set"
    shard = read_shard(output, commit.shard_id)
    bases = [base_file(other.files) for other in (shard.commits if shard is not None else ())]
    base = next((base for base in bases if base is not None and base.sha256 == commit.source_etag), None)
    if base is None:
        return []  # of an attempt that came to nothing, or of a record that was replaced: nobody reads it
    try:
        if manifest.name == "text":
            columns = manifest.fingerprint_fields["columns"]
            assert isinstance(columns, list), f"the set states the columns {columns!r}"
            wanted: Mapping[Any, Any] = stored_captions_of(output, base, columns)
        else:
            rows = open_records(read_data_file(output, base), base.content).read_columns(("key", "clip_index"))
            wanted = dict.fromkeys(rows)
    except (DamagedObjectError, StorageNotFoundError):
        return []  # the audit of the output says so
    differing = [name for name in wanted.keys() | found.keys() if wanted.get(name, "") != found.get(name, "")]
    if differing:
        return [
            ("counts", f"{len(differing)} rows are not those of {base.key}, such as {min(differing, key=str)!r:.100}")
        ]
    return []


def _facts_problems(data: bytes, records: RecordFile, file: FileStat, manifest: DatasetManifest) -> list[_Problem]:
    if file.content == "parquet":
        found, wanted = pq.ParquetFile(pa.BufferReader(data)).schema_arrow, schema(manifest)
        if not found.equals(wanted, check_metadata=True):
            return [("unreadable", "its columns or its schema metadata are not those of the dataset")]
        return []
    fingerprints = {facts["fingerprint"] for (facts,) in records.read_columns(("latentmill",))}
    if fingerprints - {manifest.fingerprint}:
        return [("unreadable", "its samples carry the fingerprint of another dataset")]
    return []


def _row_problems(row: StoredRecord, manifest: DatasetManifest) -> Iterator[_Problem]:
    what = f"clip {row.clip_index} of {row.key!r}"
    width, height, frames = (int(side) for side in row.columns["bucket"].split("x"))
    model = manifest.model
    shape = (
        model.latent_channels * (1 if manifest.kind == "mean" else 2),
        1 + (frames - 1) // model.temporal_compression,
        height // model.spatial_compression,
        width // model.spatial_compression,
    )
    found = (row.kind, row.latent.dtype.name, tuple(row.latent.shape))
    if found != (manifest.kind, manifest.latent_dtype, shape):
        wanted = (manifest.kind, manifest.latent_dtype, shape)
        yield "shape", f"{what} is {found}, and its bucket and the dataset say {wanted}"
    stated = tuple(row.columns[name] for name in ("width", "height", "num_frames", "latent_num_frames"))
    if stated != (width, height, frames, shape[1]):
        yield (
            "shape",
            f"{what} states width, height, frames and latent frames {stated}, its bucket is {width, height, frames}",
        )
    num_wrong = math.prod(row.latent.shape) - int(np.isfinite(row.latent).sum())
    if num_wrong:
        yield "values", f"{what} has {num_wrong} values that are not finite"


class _Account:
    """Counts rows by the rule of the accounts: a video is ok with one record, and rejected with none."""

    def __init__(self) -> None:
        self._records: Counter[str] = Counter()
        self._clips_rejected: Counter[str] = Counter()
        self._num_videos_rejected = 0
        self._num_frames = 0
        self._reasons: Counter[str] = Counter()

    def add(self, key: str, num_frames: int) -> None:
        self._records[key] += 1
        self._num_frames += num_frames

    def add_rejections(self, data: bytes, file: FileStat, manifest: DatasetManifest) -> list[_Problem]:
        found = pq.ParquetFile(pa.BufferReader(data)).schema_arrow
        problems: list[_Problem] = []
        if not found.equals(rejection_schema(manifest), check_metadata=True):
            problems.append(("unreadable", "its columns or its schema metadata are not those of the dataset"))
        num_rows = 0
        for failure in read_rejections(data):
            num_rows += 1
            self._reasons[failure.reason] += 1
            if failure.clip_index is None:
                self._num_videos_rejected += 1
            else:
                self._clips_rejected[failure.key] += 1
        if num_rows != file.num_rows:
            problems.append(("counts", f"it has {num_rows} rows, and its record states {file.num_rows}"))
        return problems

    def counts(self) -> ShardCounts:
        num_without = len(self._clips_rejected.keys() - self._records.keys())
        num_records, num_rejected = self._records.total(), self._clips_rejected.total()
        return ShardCounts(
            num_videos=len(self._records) + num_without + self._num_videos_rejected,
            num_videos_ok=len(self._records),
            num_videos_rejected=num_without + self._num_videos_rejected,
            num_clips=num_records + num_rejected,
            num_records=num_records,
            num_clips_rejected=num_rejected,
            num_frames=self._num_frames,
            reasons=dict(sorted(self._reasons.items())),
        )


def _differences(stated: ShardCounts, found: ShardCounts) -> str:
    """ "2 num_records (3 stated)" for every count that differs; "" if none does."""
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(found, name), getattr(stated, name)) for name in COUNTED}
    pairs["reasons"] = dict(found.reasons), {reason: n for reason, n in stated.reasons.items() if n}
    return ", ".join(f"{name} {there} ({said} stated)" for name, (there, said) in pairs.items() if there != said)


def _check_snapshots(
    store: ObjectStore,
    commits: Mapping[str, Commit],
    names: Sequence[str],
    findings: list[Finding],
    is_quick: bool,
) -> int:
    """Of a quick audit only the latest snapshot is read."""
    keys = sorted(info.key for info in store.list("snapshots/"))
    numbers = []
    for key in keys:
        digits = key.removeprefix("snapshots/").removesuffix(".json")
        if digits.isdecimal() and len(digits) == 12:
            numbers.append(int(digits))
        else:
            findings.append(
                Finding(kind="snapshot", where=store.url(key), message="its name is no number of twelve digits")
            )
    missing = sorted(set(range(1, max(numbers, default=0))) - set(numbers))
    if missing:
        message = f"snapshots {', '.join(map(str, missing[:5]))} are not there, though later ones are"
        findings.append(Finding(kind="snapshot", where=store.url("snapshots"), message=message))
    before: Snapshot | None = None
    for number in sorted(numbers)[-1:] if is_quick else sorted(numbers):
        where = store.url(f"snapshots/{number:012d}.json")
        try:
            snapshot = read_snapshot(store, number)
        except (DamagedObjectError, StorageNotFoundError) as error:
            findings.append(Finding(kind="snapshot", where=where, message=str(error)))
            continue
        held = _nonces(snapshot)
        lost = sorted(name for name, nonce in _nonces(before).items() if held.get(name) != nonce)
        if before is not None and lost:
            message = f"it lacks {len(lost)} records that snapshot {before.number} holds, such as {lost[0]}"
            findings.append(Finding(kind="snapshot", where=where, message=message))
        before = snapshot
    present = set(names)
    for name, nonce in _nonces(before).items():
        if name not in present or (name in commits and commits[name].nonce != nonce):
            state = "is another one" if name in present else "is not there"
            message = f"snapshot {before.number if before else 0} holds this record, and the record itself {state}"
            findings.append(Finding(kind="record", where=name, message=message, record=name))
    return len(numbers)


def _nonces(snapshot: Snapshot | None) -> dict[str, str]:
    return {} if snapshot is None else {name_of(commit): commit.nonce for commit in snapshot.commits}


def _check_plans(
    store: ObjectStore,
    shards: Mapping[str, DecidedShard],
    commits: Mapping[str, Commit],
    findings: list[Finding],
    is_quick: bool,
) -> list[ShardSpec]:
    try:
        slices = planned_slices(store)
    except DamagedObjectError as error:
        findings.append(Finding(kind="plan", where=store.url("plans"), message=str(error)))
        return []
    present = {info.key for info in store.list("plans/")}
    undecided = []
    for spec in slices:
        assert spec.plan_key is not None, "slices have a plan"
        if spec.plan_key not in present:
            message = f"shard {spec.shard_id} was planned with it, and it is not there"
            findings.append(Finding(kind="plan", where=store.url(spec.plan_key), message=message))
        if spec.shard_id not in shards:
            undecided.append(spec)
            continue
        first = commits.get(spec.shard_id)
        if first is not None and first.counts.num_videos != spec.num_videos:
            message = f"its slice has {spec.num_videos} videos, and the record accounts for {first.counts.num_videos}"
            findings.append(Finding(kind="counts", where=spec.shard_id, message=message, record=spec.shard_id))
    if not is_quick:

        def check(spec: ShardSpec) -> Finding | None:
            try:
                read_slice(store, spec)
            except DamagedObjectError as error:
                return Finding(kind="plan", where=str(spec.plan_key), message=str(error))
            return None

        readable = [spec for spec in slices if spec.plan_key in present]
        findings += [found for found in _in_parallel(check, readable, _NUM_READERS) if found is not None]
    for spec in undecided:
        findings.append(Finding(kind="undecided", where=spec.shard_id, message=f"{spec.source_uri} has no record yet"))
    return slices


def _check_inputs(
    store: ObjectStore, shards: Mapping[str, DecidedShard], slices: Sequence[ShardSpec], findings: list[Finding]
) -> int:
    """Compares the sources of now with what was encoded; inputs that are gone have not changed. Returns how many."""
    planned = {spec.shard_id: spec for spec in slices}

    def check(shard: DecidedShard) -> tuple[int, list[Finding]]:
        spec = planned.get(shard.shard_id)
        if spec is not None:
            return _changed_files(store, spec, shard.commits)
        first: Commit = shard.commits[0]
        now = _stat(first.source_uri)
        then = first.source_size_bytes, first.source_etag
        if now is None or not is_other_version(then, (now.num_bytes, now.etag)):
            return int(now is not None), []
        message = f"size and etag or time of change were {then} and are {(now.num_bytes, now.etag)}"
        return 1, [Finding(kind="changed", where=first.source_uri, message=message)]

    num_inputs = 0
    for number, found in _in_parallel(check, shards.values(), _NUM_READERS):
        num_inputs += number
        findings += found
    return num_inputs


def _changed_files(store: ObjectStore, spec: ShardSpec, commits: Sequence[Commit]) -> tuple[int, list[Finding]]:
    try:
        entries = read_slice(store, spec).entries
    except (DamagedObjectError, StorageNotFoundError):
        return 0, []  # the check of the plans says so
    num_inputs = num_gone = 0
    found: list[Finding] = []
    unplanned: dict[str, str] = {}
    for entry in entries:
        media = _stat(entry.uri) if entry.problem is None else None
        if media is None:
            num_gone += 1
            continue
        num_inputs += 1
        beside = (None if uri is None else _stat(uri) for uri in (entry.txt_uri, entry.json_uri))
        now = version_of(media, *beside)
        if entry.version is None:
            unplanned[entry.uri] = now
            continue
        encoded = [commit.source_changes.get(entry.uri, entry.version) for commit in commits]
        if now not in encoded:
            message = f"its files were {encoded[-1]} (size and etag or time of change) and are {now}"
            found.append(Finding(kind="changed", where=entry.uri, message=message))
    stated = [commit.source_etag for commit in commits if commit.keys is None]
    differs = bool(unplanned and stated) and stated[-1] not in (None, digest_of_versions(unplanned))
    if differs and not num_gone:  # of several files there is one digest, which says nothing once some are gone
        message = f"of the files that {spec.source_uri} names some are others than when they were encoded"
        found.append(Finding(kind="changed", where=spec.shard_id, message=message))
    return num_inputs, found


def _stat(uri: str) -> InputFile | None:
    try:
        return stat_input(uri)
    except (StorageError, UsageError):
        return None
