"""The types that flow through a run, each frozen and complete when built; a later step makes a new type.

    ShardSpec --source--> SourceVideo --decode--> Clip --encode--> LatentRecord --write--> FileStat --> Commit
                   \\-> ClipFailure <-/--------------/           (failures are rows of a file too)

Not a place for behaviour: only the invariants of the types are checked here. The lower-level types that only one module
uses live in that module. Used by every module of `pipeline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

# The closed list of reason codes. Codes are part of the output format: never renamed, only added.
REASONS: Mapping[str, str] = {
    "empty_file": "the file has no bytes",
    "unreadable": "no allowed container or image format was recognised, or its header is damaged",
    "not_allowed": "the address, container, codec or pixel format is not on the allow-list",
    "no_video": "the file has no video stream",
    "too_large": "pixels, frames, streams, duration or bytes are over a limit",
    "too_small": "the picture is smaller than the bucket and --upscale is off",
    "too_short": "the video fills no bucket at the asked frame rate",
    "no_bucket": "no bucket of the kind (video or image) is configured",
    "decode_error": "the decoder failed on the frames",
    "frames_missing": "fewer frames decode than the header promised",
    "timeout": "decoding passed its deadline twice",
    "out_of_memory": "the decode child passed its memory limit",
    "decoder_crash": "the decode child died",
    "not_found": "the video file does not exist",
    "duplicate_key": "another video of the shard has the same key",
    "bad_member": "a tar member is no regular file, or its name is not allowed",
    "bad_caption": "the caption cannot be stored without loss",
    "bad_metadata": "the JSON beside the video does not parse to an object",
    "damaged_shard": "the rest of the shard cannot be read",
    "digest_mismatch": "the bytes do not have the digest that the input states",
    "nonfinite_latent": "the encoder gave NaN or infinity",
    "encode_error": "the encoder failed on this clip alone",
    "poison": "the worker process died on this video every time",
}

Step = Literal["source", "decode", "encode"]
MediaKind = Literal["video", "image"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bucket:
    """A shape that clips are cut to: WIDTHxHEIGHTxFRAMES in pixels and frames (frames = 1 + 4k; 1 for images)."""

    width_px: int
    height_px: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}x{self.num_frames}"

    @property
    def media_kind(self) -> MediaKind:
        return "image" if self.num_frames == 1 else "video"

    @property
    def num_bytes(self) -> int:
        """Size of one clip as uint8 RGB."""
        return self.width_px * self.height_px * self.num_frames * 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Redo:
    """What of a decided shard is encoded again, and why.

    Attributes:
        shard_id: of the shard.
        generation: the first that may hold it: what this one and later ones speak of already is left out.
        replaces: name of the damaged record to repair; None for a retry of rejections, which stands beside the earlier
            generations.
        keys: the videos that are encoded again; None for all of the shard.
    """

    shard_id: str
    generation: int
    replaces: str | None
    keys: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """One unit of work, small and JSON-safe.

    Attributes:
        shard_id: `<stem>-<8 hex of sha256(source URI)>`, from the source and never from the number of workers; of a
            later generation `<shard_id>.r<n>`.
        source_uri: the tar, or the table, folder or glob with "#slice=N".
        plan_key: slices: key of the create-once object under plans/ that lists the entries.
        source_size_bytes: tars: as listed at planning time.
        source_etag: tars: as listed at planning time.
        num_videos: slices: known; tars: None until read.
        changed: files of a slice that have another version (size, etag or time of change) than when the slice was
            planned: URI -> `inputs.version_of` as listed now.
        redo: what to do of the shard where it is decided and this is to be a later generation.
    """

    shard_id: str
    source_uri: str
    kind: Literal["tar", "slice"]
    plan_key: str | None
    source_size_bytes: int | None
    source_etag: str | None
    num_videos: int | None
    changed: Mapping[str, str] = field(default_factory=dict, hash=False)
    redo: Redo | None = None

    @property
    def base_id(self) -> str:
        """The id of the shard, whatever the generation."""
        return self.shard_id if self.redo is None else self.redo.shard_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFailure:
    """Why a video (clip_index None) or one of its clips is not in the output."""

    key: str
    clip_index: int | None
    step: Step
    reason: str
    message: str
    source_uri: str

    def __post_init__(self) -> None:
        assert self.reason in REASONS, f"reason {self.reason!r} is not in the closed list"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceVideo:
    """One video or image of a shard, with open bytes and what was said about it.

    Attributes:
        key: unique in the shard.
        media_fd: a readable, seekable file descriptor (a local file opened read-only, or an unnamed temporary file).
            Whoever received the SourceVideo owns it and closes it.
        extension: lower case without the dot, "mp4".
        caption: "" where none was given.
        fields: other columns and JSON fields, by their own names, JSON-safe values.
        source_uri: where it came from; a tar member is "<tar uri>#<member name>".
    """

    key: str
    media_fd: int
    num_bytes: int
    extension: str
    media_kind: MediaKind
    caption: str
    fields: Mapping[str, object]
    source_uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What the decoder saw of a source video, after rotation."""

    width_px: int
    height_px: int
    num_frames: int
    fps: float | None  # None for images
    duration_s: float | None
    codec: str
    decoder: str  # name and version class that made the pixels, "decord-0.6"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a reader must know of the VAE that made the latents."""

    model: str  # the name, folder or hub id that was asked for
    revision: str | None
    weights_sha256: str
    is_trained: bool
    scaling_factor: float
    shift_factor: float  # the diffusion model's latent is scaling_factor * (latent - shift_factor)
    latent_channels: int
    temporal_compression: int
    spatial_compression: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """The create-once description of an output, `_dataset.json`; also the source of every file's schema metadata.

    Attributes:
        fingerprint: sha256 hex of the canonical JSON of `fingerprint_fields`.
        fingerprint_fields: everything that changes bytes; compared key by key when a job opens the output again.
        passthrough: output column name -> "bool" | "int64" | "float64" | "string", for columns and JSON fields of the
            input that pass through; fields that are not among them are kept as JSON text in the column `extra`.
    """

    format_version: int
    fingerprint: str
    fingerprint_fields: Mapping[str, object]
    model: ModelFacts
    kind: Literal["mean", "moments"]
    latent_dtype: Literal["float16", "float32"]
    passthrough: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A run of frames cut to a bucket. Never stored, never sent through Ray.

    Attributes:
        frames: uint8 `(T, H, W, 3)`, RGB, values 0..255, T = 1 + 4k; possibly a view of a mapped memory file.
        frame_times_s: `(T,)` float64, presentation times of the chosen frames in the source.
        start_s, end_s: span of the clip in the source in seconds (end is exclusive: the last frame's end); 0, 0 for
            images.
        fps: frames per second of the clip as resampled; None for images.
        crop: (x, y, width, height) in pixels of the *source* picture after rotation that the bucket shows.
    """

    key: str
    clip_index: int
    bucket: Bucket
    frames: npt.NDArray[np.uint8]
    frame_times_s: npt.NDArray[np.float64]
    start_s: float
    end_s: float
    fps: float | None
    crop: tuple[int, int, int, int]
    facts: VideoFacts
    caption: str
    fields: Mapping[str, object]
    source_uri: str

    def __post_init__(self) -> None:
        expected = (self.bucket.num_frames, self.bucket.height_px, self.bucket.width_px, 3)
        assert self.frames.shape == expected, f"clip frames {self.frames.shape} are not the bucket's {expected}"
        assert self.frames.dtype == np.uint8, f"clip frames are {self.frames.dtype}, not uint8"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRecord:
    """The posterior of one clip, deterministic and unscaled, with everything that the output says about it.

    Attributes:
        mean: `(C, t, h, w)` float16 or float32, the posterior mean, never a draw, never scaled.
        logvar: the same shape, or None when only the mean is stored.
    """

    key: str
    clip_index: int
    mean: npt.NDArray[np.floating]
    logvar: npt.NDArray[np.floating] | None
    bucket: Bucket
    caption: str
    fields: Mapping[str, object]
    fps: float | None
    start_s: float
    end_s: float
    crop: tuple[int, int, int, int]
    facts: VideoFacts
    source_uri: str

    @classmethod
    def of_clip(cls, clip: Clip, latent: npt.NDArray[np.floating], kind: Literal["mean", "moments"]) -> LatentRecord:
        """The record of a clip, with all that the clip says.

        Args:
            latent: as it is stored: the mean `(C, t, h, w)`, of kind "moments" with the log-variance behind it
                `(2C, t, h, w)`.
        """
        num_channels = len(latent) if kind == "mean" else len(latent) // 2
        return cls(
            key=clip.key,
            clip_index=clip.clip_index,
            mean=latent[:num_channels],
            logvar=None if kind == "mean" else latent[num_channels:],
            bucket=clip.bucket,
            caption=clip.caption,
            fields=clip.fields,
            fps=clip.fps,
            start_s=clip.start_s,
            end_s=clip.end_s,
            crop=clip.crop,
            facts=clip.facts,
            source_uri=clip.source_uri,
        )

    @property
    def kind(self) -> Literal["mean", "moments"]:
        return "mean" if self.logvar is None else "moments"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStat:
    """A data file as it was written: its key relative to the output root, its bytes, its digest, its rows.

    `bucket_rows` has the rows of each bucket: readers plan an epoch from commit records alone, opening no file.
    `blake3` is a second digest, in hex, that readers take because it is several times as fast and as strong; records of
    earlier versions have none, and where the two disagree SHA-256 decides.
    """

    key: str
    num_bytes: int
    sha256: str
    num_rows: int
    content: Literal["parquet", "webdataset", "rejected"]
    bucket_rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    blake3: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """The accounts of a shard. They balance, or the shard may not be committed."""

    num_videos: int
    num_videos_ok: int  # with at least one record
    num_videos_rejected: int
    num_clips: int
    num_records: int
    num_clips_rejected: int
    num_frames: int  # frames encoded, pixels side
    reasons: Mapping[str, int] = field(default_factory=dict)  # rejections by reason, videos and clips together

    def __post_init__(self) -> None:
        assert self.num_videos == self.num_videos_ok + self.num_videos_rejected, f"videos do not balance: {self}"
        assert self.num_clips == self.num_records + self.num_clips_rejected, f"clips do not balance: {self}"


# The fields of ShardCounts that are numbers: all but the reasons.
COUNTED = tuple(field.name for field in fields(ShardCounts) if field.name != "reasons")


def sum_counts(all_counts: Iterable[ShardCounts], less: Iterable[ShardCounts] = ()) -> ShardCounts:
    """The accounts of several shards together, reasons sorted by name.

    Args:
        less: accounts to take off again.
    """
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for sign, some in ((1, all_counts), (-1, less)):
        for counts in some:
            totals.update({name: sign * getattr(counts, name) for name in COUNTED})
            reasons.update({reason: sign * number for reason, number in counts.reasons.items()})
    reasons = +reasons
    return ShardCounts(**{name: totals[name] for name in COUNTED}, reasons=dict(sorted(reasons.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A create-once record of a shard. The existence of generation 0 is the only meaning of "done".

    Later generations are made only when somebody asks for it: a *retry* speaks anew of some rejected videos, a *repair*
    stands in for an earlier record whose files are damaged (`commit` says which of them count).

    Attributes:
        replaces: name of the earlier record that does not count any more; None in a generation 0 and in a retry.
        keys: the videos that this record speaks of; None: all of the shard.
        shard_counts: accounts of the whole shard from this generation on; None in a generation 0, whose `counts`
            they are.
        source_etag: of a tar; of a slice of a table `inputs.digest_of_versions` of the files that were read.
        source_changes: files of a slice that were not as planned when they were encoded: URI -> `inputs.version_of`
            what was encoded.
    """

    shard_id: str
    generation: int  # 0 for the first; retries and repairs are 1, 2, ... without a gap
    nonce: str  # of the attempt that won
    fingerprint: str
    source_uri: str
    source_size_bytes: int | None
    source_etag: str | None
    files: tuple[FileStat, ...]
    counts: ShardCounts  # of what this record itself holds
    format_version: int
    code_version: str
    created_at: str  # UTC, RFC 3339; for people only, nothing depends on it
    replaces: str | None = None
    keys: tuple[str, ...] | None = None
    shard_counts: ShardCounts | None = None
    source_changes: Mapping[str, str] = field(default_factory=dict, hash=False)
