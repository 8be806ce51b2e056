"""Captions and first frames to embeddings: the one door to `transformers`.

Not where embeddings are stored (`columns`) and not where captions come from. `actors` and `jobs/encode_text.py` encode
with it. Models are folders, or hub ids that are fetched first, as transformers saves them; a pipeline folder of
diffusers serves too (`text_encoder/` with `tokenizer/`, `image_encoder/` with `feature_extractor/`). Only safetensors
are read, no code of a repository is ever run, and a weight that the file lacks is an error.

**Text**: CLIP text models, T5 encoders (T5, mT5, UMT5) and sentence encoders (BERT, MPNet, RoBERTa and their kin). An
embedding is the last hidden state of a caption's own tokens, special tokens included: no padding is stored. Diffusion
models on CLIP (Stable Diffusion, ModelScope) were trained with 77 tokens whose padding is looked at, and the states of
padding depend on the caption: for these `text_padding` "max" embeds and stores it, CLIP without a mask, as diffusers
calls it, others with one.

**First frames**: `image_embeds` of a CLIP vision tower with its projection, with the preprocessing of Stable Video
Diffusion: the frame in [-1, 1] is blurred (Gaussian, sigma = (factor - 1) / 2, at least 0.001) and squeezed to the
tower's square by bicubic interpolation with aligned corners, whatever its aspect ratio, then normalised by the mean
and deviation of the folder's `preprocessor_config.json`, or CLIP's own.

What comes out depends on the caption or frame, the model and the configuration, never on a neighbour: on a CPU every
caption is a batch of its own, without padding; on a GPU batches have a fixed number of rows and a length that follows
from the caption's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline.columns import ColumnsManifest, TextEmbedding, new_manifest
from pipeline.config import ImageEncoderConfig, TextEncoderConfig
from pipeline.errors import UsageError
from pipeline.storage import sha256_of_file

# Raised when the meaning of an embedding changes with the code and not with the configuration.
RESULT_VERSION = 1
# model_type of a config.json -> the class of transformers whose last hidden state is taken.
_TEXT_CLASSES: Mapping[str, str] = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "mpnet": "MPNetModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
_IMAGE_CLASSES: Mapping[str, str] = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}
# Diffusion models that pad a CLIP text let it look at the padding.
_FAMILIES_WITHOUT_MASK = ("clip", "clip_text_model")
# Positions of these begin behind the padding index.
_OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta")
_RELATIVE_POSITIONS = ("t5", "mt5", "umt5")
_LONGEST_WITHOUT_LIMIT = 512
_WEIGHTS_NAME = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PREPROCESSOR = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of one call on a GPU.
_BATCH_TEXTS = 16
_BATCH_FRAMES = 16
_SHORTEST_BATCH_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Where an encoder lies: `folder` has config.json and weights, `beside` the tokenizer or preprocessor."""

    flag: str
    source: str
    revision: str | None
    folder: Path
    beside: Path


def _find(flag: str, model: str, revision: str | None, part: str, beside: str, wanted: Sequence[str]) -> _Files:
    """The files of a folder or hub id.

    Args:
        part, beside: the folders that a pipeline of diffusers keeps model and tokenizer or preprocessor in.
        wanted: names of the small files beside the model.
    """
    root, commit = Path(model), None
    if not root.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) is None or model.startswith("."):
            raise UsageError(
                f"--{flag}: there is no folder {model!r}; give a folder that exists or a hub id OWNER/NAME"
            )
        root, commit = _fetch(flag, model, revision, part, beside, wanted)
    if (root / "config.json").is_file():
        return _Files(flag=flag, source=model, revision=commit, folder=root, beside=root)
    if (root / part / "config.json").is_file():
        return _Files(flag=flag, source=model, revision=commit, folder=root / part, beside=root / beside)
    held = sorted(path.name for path in root.iterdir())[:20]
    raise UsageError(
        f"--{flag}: {model} has neither config.json nor {part}/config.json; it holds {held or 'nothing'}: give the "
        "folder of a model, or of a diffusers pipeline that has one"
    )


def _fetch(
    flag: str, hub_id: str, revision: str | None, part: str, beside: str, wanted: Sequence[str]
) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model_files = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    patterns = [*model_files, *wanted, *(f"{part}/{name}" for name in model_files), *(f"{beside}/{n}" for n in wanted)]
    try:
        snapshot = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"--{flag}: {hub_id!r} is no folder here and could not be fetched from the hub ({type(error).__name__}: "
            f"{error}); check the name and the network, or download it elsewhere and give its folder"
        ) from error
    return snapshot, snapshot.name


def _read_json(path: Path, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--{flag}: {path} cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"--{flag}: {path} holds a {type(found).__name__}, not an object; fetch it again")
    return found


def _weights_sha256(files: _Files, wanted: str | None) -> str:
    """SHA-256 of the weights: of one file its own, of several that of their lines "<sha256>  <name>", as of sha256sum.

    Raises:
        UsageError: there are no safetensors, or `wanted` is another digest.
    """
    single, index = files.folder / _WEIGHTS_NAME, files.folder / f"{_WEIGHTS_NAME}.index.json"
    if single.is_file():
        digest = sha256_of_file(single)
    elif index.is_file():
        names = sorted(set(map(str, _read_json(index, files.flag).get("weight_map", {}).values())))
        odd = [name for name in names if "/" in name or not (files.folder / name).is_file()]
        if odd or not names:
            raise UsageError(f"--{files.flag}: {index} names {odd or 'no file'}, which is not there; fetch it again")
        lines = "".join(f"{sha256_of_file(files.folder / name)}  {name}\n" for name in names)
        digest = hashlib.sha256(lines.encode()).hexdigest()
    else:
        held = sorted(path.name for path in files.folder.iterdir())[:20]
        raise UsageError(
            f"--{files.flag}: {files.folder} has no {_WEIGHTS_NAME}, only {held}; other forms of weights are not "
            "read, as pickles can run code: save the model with safetensors"
        )
    if wanted is not None and wanted != digest:
        raise UsageError(
            f"--{files.flag}: the weights of {files.source} have the SHA-256 {digest}, wanted is {wanted}: they are "
            "damaged or another version; fetch them again, or give the digest of the version that you mean"
        )
    return digest


def _settings_sha256(files: _Files, beside: Sequence[str]) -> str:
    """SHA-256 over config.json and the small files that decide what goes into the model."""
    paths = [files.folder / "config.json", *(files.beside / name for name in beside)]
    lines = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in paths if path.is_file())
    return hashlib.sha256(lines.encode()).hexdigest()


def _transformers(flag: str) -> Any:
    transformers: Any
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"--{flag} needs transformers, which is not installed: pip install 'latentmill[text]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _load(files: _Files, classes: Mapping[str, str], device: torch.device, dtype: str) -> tuple[Any, str]:
    """The model, in evaluation mode on the device, and its model_type.

    Raises:
        UsageError: the model is of another kind, or the weights do not fit it.
    """
    family = str(_read_json(files.folder / "config.json", files.flag).get("model_type"))
    if family not in classes:
        raise UsageError(
            f"--{files.flag}: {files.source} is a model of type {family!r}; known are {', '.join(sorted(classes))}"
        )
    if (files.folder / "adapter_config.json").is_file():
        raise UsageError(
            f"--{files.flag}: {files.folder} holds an adapter, whose weights no digest would cover: merge it into the "
            "model and save that"
        )
    transformers = _transformers(files.flag)
    try:
        model, info = getattr(transformers, classes[family]).from_pretrained(
            files.folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        # What a library of many authors raises for files that do not fit together has no common type.
        raise UsageError(f"--{files.flag}: {files.folder} cannot be loaded: {_first_line(error)}") from error
    # A weight that is missing would be drawn at random. Poolers stand behind the last hidden state.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise UsageError(
            f"--{files.flag}: the weights in {files.folder} lack {len(missing)} of those that a {classes[family]} has, "
            f"such as {missing[0]}: check that config.json and {_WEIGHTS_NAME} belong together"
        )
    return model.to(device, _DTYPES[dtype]).eval().requires_grad_(False), family


def _first_line(error: BaseException) -> str:
    """What a library says, and below it what it wraps: transformers hides the reason of a failed import there."""
    text = str(error).strip()
    said = f"{type(error).__name__}: {text.splitlines()[0] if text else repr(error)}"
    return said if error.__cause__ is None else f"{said} ({_first_line(error.__cause__)})"


def _stored(values: torch.Tensor, dtype: str, compute_dtype: str, flag: str, what: str) -> npt.NDArray[np.floating]:
    stored = np.asarray(values.to(_DTYPES[dtype]).cpu().numpy())
    num_bad = int(stored.size - np.isfinite(stored).sum())
    if num_bad:
        raise UsageError(
            f"--{flag}: {num_bad} of {stored.size} values of the embedding of {what} are NaN or infinite (computed in "
            f"{compute_dtype}, stored as {dtype}): compute and store in float32"
        )
    return stored


def _text_files(config: TextEncoderConfig) -> _Files:
    assert config.text_encoder is not None, "no text encoder is configured"
    revision = config.text_encoder_revision
    return _find("text-encoder", config.text_encoder, revision, "text_encoder", "tokenizer", _TOKENIZER_FILES)


def _image_files(config: ImageEncoderConfig) -> _Files:
    assert config.image_encoder is not None, "no image encoder is configured"
    model, revision = config.image_encoder, config.image_encoder_revision
    return _find("image-encoder", model, revision, "image_encoder", "feature_extractor", (_PREPROCESSOR,))


def weights_sha256(config: TextEncoderConfig | ImageEncoderConfig) -> str:
    """SHA-256 of the weights of an encoder that is configured, in hex, without loading it.

    Raises:
        UsageError: there is no such encoder, or its weights are not those that are pinned.
    """
    if isinstance(config, TextEncoderConfig):
        return _weights_sha256(_text_files(config), config.text_encoder_sha256)
    return _weights_sha256(_image_files(config), config.image_encoder_sha256)


class TextEncoder:
    """A text encoder on a device, one caller at a time.

    Args:
        config: `text_encoder` must be given.
        compute_dtype: "float32", "bfloat16" or "float16".
        num_threads: of a CPU, which are part of the fingerprint: they change the order of float sums.

    Attributes:
        manifest: the description of the set that it makes.

    Raises:
        UsageError: no such model, another kind than known, other weights than pinned, or no transformers here.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device, compute_dtype: str, num_threads: int) -> None:
        files = _text_files(config)
        digest = _weights_sha256(files, config.text_encoder_sha256)
        self._model, family = _load(files, _TEXT_CLASSES, device, compute_dtype)
        self._tokenizer = _load_tokenizer(files)
        self._device = device
        self._compute_dtype = compute_dtype
        self._dtype = config.text_dtype
        self._pads = config.text_padding == "max"
        self._has_mask = not (self._pads and family in _FAMILIES_WITHOUT_MASK)
        self._max_length = _max_length(self._tokenizer, self._model.config, family, config.text_max_tokens)
        self._empty: TextEmbedding | None = None
        self.manifest: ColumnsManifest = new_manifest(
            "text",
            {
                "family": family,
                "columns": list(config.text_columns),
                "padding": config.text_padding,
                "settings_sha256": _settings_sha256(files, _TOKENIZER_FILES),
                **_device_fields(device, compute_dtype, num_threads),
            },
            encoder=files.source,
            revision=files.revision,
            weights_sha256=digest,
            embedding_dim=int(self._model.config.hidden_size),
            embedding_dtype="float16" if config.text_dtype == "float16" else "float32",
            max_length=self._max_length,
        )

    def embed(self, captions: Iterable[str]) -> Iterator[TextEmbedding]:
        """The embeddings of captions, in order; on a GPU in batches, so that up to 16 are taken ahead.

        Raises:
            UsageError: an embedding is not finite in the dtypes that are configured.
        """
        if self._device.type == "cpu":
            for caption in captions:
                yield self._alone(caption)
        else:
            yield from self._batched(captions)

    def _alone(self, caption: str) -> TextEmbedding:
        if caption == "" and self._empty is not None:
            return self._empty
        tokens, is_truncated = self._tokens(caption)
        found = self._embedding(caption, self._hidden([tokens], self._length(tokens))[0], is_truncated)
        if caption == "":
            self._empty = found
        return found

    def _batched(self, captions: Iterable[str]) -> Iterator[TextEmbedding]:
        remaining = list(captions)
        for start in range(0, len(remaining), 8 * _BATCH_TEXTS):
            part = remaining[start : start + 8 * _BATCH_TEXTS]
            tokens = [self._tokens(caption) for caption in part]
            by_length: dict[int, list[int]] = {}
            for place, (ids, _) in enumerate(tokens):
                by_length.setdefault(_padded_length(self._length(ids), self._max_length), []).append(place)
            found: dict[int, TextEmbedding] = {}
            for length, places in by_length.items():
                for first in range(0, len(places), _BATCH_TEXTS):
                    batch = places[first : first + _BATCH_TEXTS]
                    rows = [tokens[place][0] for place in batch]
                    # Short batches are filled up: another number of rows may be another order of sums.
                    hidden = self._hidden([*rows, *[rows[0]] * (_BATCH_TEXTS - len(rows))], length)
                    for place, row in zip(batch, hidden, strict=False):
                        own = row[: self._length(tokens[place][0])]
                        found[place] = self._embedding(part[place], own, tokens[place][1])
            yield from (found[place] for place in range(len(part)))

    def _tokens(self, caption: str) -> tuple[list[int], bool]:
        tokens = list(self._tokenizer(caption, truncation=False, verbose=False)["input_ids"])
        if len(tokens) <= self._max_length:
            return tokens, False
        return list(self._tokenizer(caption, truncation=True, max_length=self._max_length)["input_ids"]), True

    def _length(self, tokens: Sequence[int]) -> int:
        """How many states of a text are stored."""
        return self._max_length if self._pads else len(tokens)

    @torch.inference_mode()
    def _hidden(self, rows: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        """`(len(rows), length, D)`; unless texts are padded, what stands behind the end of a row means nothing."""
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self._device)
        hidden: torch.Tensor = self._model(
            input_ids=ids, attention_mask=mask if self._has_mask else None
        ).last_hidden_state
        return hidden

    def _embedding(self, caption: str, hidden: torch.Tensor, is_truncated: bool) -> TextEmbedding:
        what = f"the caption {caption[:80]!r}"
        stored = _stored(hidden, self._dtype, self._compute_dtype, "text-encoder", what)
        return TextEmbedding(embedding=stored, is_truncated=is_truncated)


def _load_tokenizer(files: _Files) -> Any:
    transformers = _transformers(files.flag)
    if not any((files.beside / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(
            f"--{files.flag}: there is no tokenizer in {files.beside}; copy tokenizer.json beside the model"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(files.beside, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UsageError(
            f"--{files.flag}: the tokenizer in {files.beside} cannot be loaded: {_first_line(error)}"
        ) from error


def _max_length(tokenizer: Any, config: Any, family: str, asked: int | None) -> int:
    """The most tokens of a text: what tokenizer and model both take, and no more than asked for."""
    limits = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < 1_000_000 else []
    if family not in _RELATIVE_POSITIONS:
        offset = (config.pad_token_id or 0) + 1 if family in _OFFSET_POSITIONS else 0
        limits.append(int(config.max_position_embeddings) - offset)
    longest = min(limits, default=_LONGEST_WITHOUT_LIMIT)
    if asked is None:
        return longest
    num_special = tokenizer.num_special_tokens_to_add()
    if not num_special < asked or (limits and asked > longest):
        highest = str(longest) if limits else "any number"
        raise UsageError(
            f"--text-max-tokens: {asked} is not from {num_special + 1} to {highest}: the tokenizer adds {num_special} "
            "tokens to every text, and the model has no places for more"
        )
    return asked


def _padded_length(num_tokens: int, max_length: int) -> int:
    """The length of the batch that a text is in: the next power of two, 16 at least, at most what the model takes."""
    return min(max_length, max(_SHORTEST_BATCH_TOKENS, 1 << (num_tokens - 1).bit_length()))


def _device_fields(device: torch.device, compute_dtype: str, num_threads: int) -> dict[str, object]:
    is_cpu = device.type == "cpu"
    return {
        "device_type": device.type,
        "compute_dtype": compute_dtype,
        "num_threads": num_threads if is_cpu else None,
        "result_version": RESULT_VERSION,
    }


class ImageEncoder:
    """A CLIP vision tower with its projection, on a device, one caller at a time.

    Args:
        config: `image_encoder` must be given.
        compute_dtype: "float32", "bfloat16" or "float16".
        num_threads: as of `TextEncoder`.

    Attributes:
        manifest: the description of the set that it makes.
        batch_size: frames of one call.

    Raises:
        UsageError: as `TextEncoder`.
    """

    def __init__(self, config: ImageEncoderConfig, device: torch.device, compute_dtype: str, num_threads: int) -> None:
        files = _image_files(config)
        digest = _weights_sha256(files, config.image_encoder_sha256)
        self._model, family = _load(files, _IMAGE_CLASSES, device, compute_dtype)
        path = files.beside / _PREPROCESSOR
        stated = _read_json(path, files.flag) if path.is_file() else {}
        self._mean = tuple(map(float, stated.get("image_mean", _CLIP_MEAN)))
        self._std = tuple(map(float, stated.get("image_std", _CLIP_STD)))
        self._size_px = int(self._model.config.image_size)
        self._device = device
        self._compute_dtype = compute_dtype
        self._dtype = config.image_dtype
        self.batch_size = 1 if device.type == "cpu" else _BATCH_FRAMES
        self.manifest: ColumnsManifest = new_manifest(
            "image",
            {
                "family": family,
                "resize": f"svd-{self._size_px}",
                "mean": list(self._mean),
                "std": list(self._std),
                "settings_sha256": _settings_sha256(files, ()),
                **_device_fields(device, compute_dtype, num_threads),
            },
            encoder=files.source,
            revision=files.revision,
            weights_sha256=digest,
            embedding_dim=int(self._model.config.projection_dim),
            embedding_dtype="float16" if config.image_dtype == "float16" else "float32",
            max_length=1,
        )

    @torch.inference_mode()
    def embed(self, frames: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.floating]]:
        """The embeddings `(D,)` of frames, uint8 `(H, W, 3)` in 0..255, RGB; at most `batch_size` of them.

        Raises:
            UsageError: an embedding is not finite in the dtypes that are configured.
        """
        assert len(frames) <= self.batch_size, f"{len(frames)} frames are more than a batch of {self.batch_size}"
        pixels = torch.zeros((self.batch_size, 3, self._size_px, self._size_px), device=self._device)
        for row, frame in zip(pixels, frames, strict=False):
            row.copy_(frame_pixels(torch.from_numpy(frame).to(self._device), self._size_px, self._mean, self._std))
        embeds = self._model(pixel_values=pixels.to(_DTYPES[self._compute_dtype])).image_embeds
        return [
            _stored(embedding, self._dtype, self._compute_dtype, "image-encoder", "a first frame")
            for embedding, _ in zip(embeds, frames, strict=False)
        ]


def frame_pixels(
    frame: torch.Tensor, size_px: int, mean: Sequence[float] = _CLIP_MEAN, std: Sequence[float] = _CLIP_STD
) -> torch.Tensor:
    """A frame as a CLIP vision tower takes it in Stable Video Diffusion (diffusers, `_resize_with_antialiasing`).

    Args:
        frame: uint8 `(H, W, 3)` in 0..255, RGB.

    Returns:
        float32 `(3, size_px, size_px)`, normalised.
    """
    picture = frame.permute(2, 0, 1).to(torch.float32).div(255.0).mul(2.0).sub(1.0)[None]
    blurred = _blur(picture.transpose(2, 3), size_px).transpose(2, 3)
    blurred = _blur(blurred, size_px)
    small = F.interpolate(blurred, size=(size_px, size_px), mode="bicubic", align_corners=True)
    small = small.add(1.0).div(2.0)
    mean_row, std_row = (torch.tensor(values, device=frame.device)[:, None, None] for values in (mean, std))
    return ((small - mean_row) / std_row)[0]


def _blur(pictures: torch.Tensor, size_px: int) -> torch.Tensor:
    """Blurs `(B, C, H, W)` along H for a reduction of H to `size_px`."""
    sigma = max((pictures.shape[2] / size_px - 1.0) / 2.0, 0.001)
    num_taps = int(max(4.0 * sigma, 3))
    num_taps += 1 - num_taps % 2
    places = torch.arange(num_taps, device=pictures.device, dtype=torch.float32) - num_taps // 2
    taps = torch.exp(-places.pow(2.0) / (2.0 * sigma**2))
    taps = (taps / taps.sum()).reshape(1, 1, num_taps, 1).expand(pictures.shape[1], -1, -1, -1)
    padded = F.pad(pictures, (0, 0, num_taps // 2, num_taps // 2), mode="reflect")
    return F.conv2d(padded, taps, groups=pictures.shape[1])
