"""Clips to latents: a record depends on its clip alone, every clip is answered once, and bad numbers are rejections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cvvae
from pipeline.codec import ClipEncoder, LatentDecoder, batch_size, output_to_pixels, pixels_to_input
from pipeline.config import EncodingConfig, parse_arguments
from pipeline.errors import UsageError
from pipeline.records import Bucket, Clip, ClipFailure, LatentRecord, VideoFacts

CPU = torch.device("cpu")
BUCKET = Bucket(width_px=40, height_px=32, num_frames=9)
_FACTS = VideoFacts(
    width_px=40, height_px=32, num_frames=9, fps=8.0, duration_s=1.1, codec="h264", decoder="decord-0.6"
)


def _encoding(*flags: str) -> EncodingConfig:
    return parse_arguments(["--input", "i", "--output", "o", "--model", "small", *flags]).encoding


def _clip(seed: int, bucket: Bucket = BUCKET) -> Clip:
    shape = (bucket.num_frames, bucket.height_px, bucket.width_px, 3)
    return Clip(
        key=f"key{seed}",
        clip_index=seed,
        bucket=bucket,
        frames=np.random.default_rng(seed).integers(0, 256, shape, np.uint8),
        frame_times_s=np.arange(bucket.num_frames) / 8,
        start_s=0.0,
        end_s=bucket.num_frames / 8,
        fps=8.0,
        crop=(0, 0, 40, 32),
        facts=_FACTS,
        caption=f"caption {seed}",
        fields={"seed": seed},
        source_uri="u",
    )


def _records(encoder: ClipEncoder, clips: Sequence[Clip | ClipFailure]) -> list[LatentRecord]:
    records = [entry for entry in encoder.encode(clips) if isinstance(entry, LatentRecord)]
    assert len(records) == len(clips)
    return records


def test_a_record_is_the_posterior_mean_unscaled_with_all_that_was_said_of_the_clip() -> None:
    clip = _clip(3)
    (record,) = _records(ClipEncoder(_encoding("--store-dtype", "float32"), CPU), [clip])
    vae = cvvae.load("small")
    with torch.inference_mode():
        frames = torch.from_numpy(clip.frames)[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        expected = vae.encode(frames).latent_dist.mean[0].numpy()
    np.testing.assert_allclose(record.mean, expected, atol=1e-5)
    assert (record.mean.shape, record.mean.dtype) == ((32, 3, 4, 5), np.float32)
    assert (record.key, record.clip_index, record.caption, record.fields) == ("key3", 3, "caption 3", {"seed": 3})
    assert record.logvar is None


def test_moments_carry_the_log_variance_beside_the_mean() -> None:
    (record,) = _records(ClipEncoder(_encoding("--store", "moments"), CPU), [_clip(0)])
    assert record.logvar is not None
    assert record.mean.shape == record.logvar.shape == (32, 3, 4, 5)
    assert record.mean.dtype == record.logvar.dtype == np.float16
    assert not np.array_equal(record.mean, record.logvar)


def test_a_latent_does_not_depend_on_its_neighbours_or_their_order() -> None:
    image = Bucket(width_px=40, height_px=32, num_frames=1)
    clips = [_clip(0), _clip(1, image), _clip(2), _clip(3, image)]
    encoder = ClipEncoder(_encoding(), CPU)
    together = {record.key: record.mean.tobytes() for record in _records(encoder, clips)}
    alone = {record.key: record.mean.tobytes() for clip in reversed(clips) for record in _records(encoder, [clip])}
    assert together == alone


def test_failures_pass_through_and_every_clip_is_answered() -> None:
    failure = ClipFailure(key="x", clip_index=None, step="decode", reason="timeout", message="m", source_uri="u")
    answers = list(ClipEncoder(_encoding(), CPU).encode([_clip(0), failure, _clip(1)]))
    assert failure in answers
    assert {answer.key for answer in answers} == {"key0", "x", "key1"}


def test_latents_that_are_not_finite_become_rejections(tmp_path: Path) -> None:
    vae = cvvae.load("small")
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.startswith("encoder") and parameter.dim() > 1:
                parameter.mul_(1e4)
    vae.save_pretrained(tmp_path)
    encoding = replace(_encoding("--store-dtype", "float16"), model=str(tmp_path))
    (answer,) = ClipEncoder(encoding, CPU).encode([_clip(0)])
    assert isinstance(answer, ClipFailure)
    assert (answer.reason, answer.step, answer.clip_index) == ("nonfinite_latent", "encode", 0)
    assert "stored as float16" in answer.message


def test_a_model_that_cannot_be_loaded_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--model"):
        ClipEncoder(replace(_encoding(), model=str(tmp_path / "nowhere")), CPU)


def test_batches_hold_about_the_same_number_of_pixels_on_a_gpu_and_one_clip_on_a_cpu() -> None:
    video = Bucket(width_px=256, height_px=256, num_frames=17)
    large = Bucket(width_px=1024, height_px=1024, num_frames=49)
    assert batch_size(video, 136, "cpu") == 1
    assert batch_size(video, 136, "cuda") == 8
    assert batch_size(large, 136, "cuda") == 1
    assert batch_size(Bucket(width_px=256, height_px=256, num_frames=1), 136, "cuda") == 136


def test_pixels_survive_the_way_in_and_out() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    back = output_to_pixels(pixels_to_input(frames, torch.float32)[0])
    np.testing.assert_array_equal(back, frames[0].numpy())
    assert output_to_pixels(torch.tensor([-2.0, 0.0, 2.0]).reshape(3, 1, 1, 1)).ravel().tolist() == [0, 128, 255]


def test_a_latent_decodes_to_the_frames_of_its_clip() -> None:
    encoding = _encoding()
    (record,) = _records(ClipEncoder(encoding, CPU), [_clip(0)])
    frames = LatentDecoder(encoding, CPU).decode(record.mean)
    assert (frames.shape, frames.dtype) == ((9, 32, 40, 3), np.uint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_an_encoder_that_cannot_be_compiled_says_why_and_gives_the_bytes_of_one_that_was_not_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The C++ compiler is not there; torch finds that out by itself."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    image = Bucket(width_px=40, height_px=32, num_frames=1)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "c++"))}):
        encoder = ClipEncoder(_encoding("--compile", "--buckets", str(image)), CPU)
    assert encoder.compile_error is not None
    assert str(tmp_path / "c++") in encoder.compile_error
    plain = ClipEncoder(_encoding("--buckets", str(image)), CPU)
    assert plain.compile_error is None
    (fallen_back,), (wanted,) = (_records(one, [_clip(0, image)]) for one in (encoder, plain))
    assert fallen_back.mean.tobytes() == wanted.mean.tobytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_encoder_is_whole_before_the_first_clip_and_gives_the_latents_to_rounding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    image = Bucket(width_px=40, height_px=32, num_frames=1)
    flags = "--buckets", f"{BUCKET};{image}", "--store-dtype", "float32"
    encoder = ClipEncoder(_encoding("--compile", *flags), CPU)
    assert encoder.compile_error is None
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert num_graphs >= 2
    clips = [_clip(0), _clip(1, image)]
    for found, wanted in zip(
        _records(encoder, clips), _records(ClipEncoder(_encoding(*flags), CPU), clips), strict=True
    ):
        np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_latents_are_near_those_of_the_cpu_and_do_not_depend_on_the_batch() -> None:
    encoding = _encoding("--compute-dtype", "float32", "--store-dtype", "float32", "--batch-frames", "1")
    device = torch.device("cuda")
    assert batch_size(BUCKET, encoding.batch_frames, "cuda") > 3
    clips = [_clip(seed) for seed in range(3)]
    encoder = ClipEncoder(encoding, device)
    together = {record.key: record.mean for record in _records(encoder, clips)}
    expected = {record.key: record.mean for record in _records(ClipEncoder(encoding, CPU), clips)}
    for clip in clips:
        (alone,) = _records(encoder, [clip])
        np.testing.assert_array_equal(alone.mean, together[clip.key])
        np.testing.assert_allclose(alone.mean, expected[clip.key], atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk_frames", [0, 8])
def test_on_a_gpu_recorded_batches_give_the_bytes_of_those_that_are_not(chunk_frames: int) -> None:
    image = Bucket(width_px=40, height_px=32, num_frames=1)
    encoding = replace(_encoding("--buckets", f"{BUCKET};{image}", "--batch-frames", "1"), chunk_frames=chunk_frames)
    device = torch.device("cuda")
    recorded = ClipEncoder(encoding, device, cuda_graphs=True)
    assert recorded.cuda_graphs_error is None
    clips = [_clip(seed, (BUCKET, image)[seed % 2]) for seed in range(400)]
    wanted = {record.key: record.mean for record in _records(ClipEncoder(encoding, device), clips)}
    for record in _records(recorded, clips):
        np.testing.assert_array_equal(record.mean, wanted[record.key])


def test_an_encoder_that_is_not_on_a_gpu_says_that_it_records_nothing() -> None:
    encoder = ClipEncoder(_encoding(), CPU, cuda_graphs=True)
    assert encoder.cuda_graphs_error == "the encoder is not on a GPU"
    assert len(_records(encoder, [_clip(0)])) == 1


@pytest.fixture
def causal_model(tmp_path: Path) -> Path:
    sizes = {"encoder_widths": [8, 8, 8], "encoder_blocks": [1, 1, 1], "motion_blocks": 1}
    sizes |= {"decoder_widths": [8, 8, 8], "decoder_blocks": [1, 2, 2]}
    fields = {"_class_name": "CVVAELightModel", "untrained": True, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("num_frames", [1, 5, 9, 21])
def test_a_causal_model_encodes_piece_by_piece_what_it_would_encode_at_once(
    causal_model: Path, num_frames: int
) -> None:
    clip = _clip(0, Bucket(width_px=40, height_px=32, num_frames=num_frames))
    at_once, in_pieces = (
        replace(_encoding("--store-dtype", "float32"), model=str(causal_model), chunk_frames=chunk) for chunk in (0, 8)
    )
    (wanted,) = _records(ClipEncoder(at_once, CPU), [clip])
    encoder = ClipEncoder(in_pieces, CPU)
    lengths: list[int] = []
    encoder._vae.encoder.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    (found,) = _records(encoder, [clip])
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-5)
    assert sum(lengths) == num_frames
    assert max(lengths) <= 9
    frames = [LatentDecoder(encoding, CPU).decode(wanted.mean).astype(int) for encoding in (at_once, in_pieces)]
    assert frames[0].shape == (num_frames, 32, 40, 3)
    assert abs(frames[0] - frames[1]).max() <= 1
