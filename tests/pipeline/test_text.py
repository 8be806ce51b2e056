"""The promises of the encoders: what a direct call of transformers gives, for every kind, and for nothing else."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertModel,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from pipeline.config import ImageEncoderConfig, TextEncoderConfig
from pipeline.errors import UsageError
from pipeline.text import ImageEncoder, TextEncoder, frame_pixels

CPU = torch.device("cpu")
CAPTIONS = ["a red ball rolls to the left", "", "ein Käfer 🐞", "two dogs " * 100, "x"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small encoders of every kind with made weights."""
    encoders.quiet()
    root = tmp_path_factory.mktemp("encoders")
    for make in (encoders.clip_text, encoders.clip, encoders.clip_vision, encoders.t5):
        make(root / make.__name__)
    return root


def _folder(name: str, made: Path) -> Path:
    return encoders.minilm() if name == "minilm" else made / name


def _text(folder: Path, **more: Any) -> TextEncoder:
    config = TextEncoderConfig(text_encoder=str(folder), text_dtype="float32")
    return TextEncoder(replace(config, **more), CPU, "float32", 1)


def _image(folder: Path, **more: Any) -> ImageEncoder:
    config = ImageEncoderConfig(image_encoder=str(folder), image_dtype="float32")
    return ImageEncoder(replace(config, **more), CPU, "float32", 1)


KINDS: dict[str, tuple[type, int, int]] = {
    "minilm": (BertModel, 384, 512),
    "clip_text": (CLIPTextModel, 16, encoders.MAX_LENGTH),
    "clip": (CLIPTextModel, 16, encoders.MAX_LENGTH),
    "t5": (T5EncoderModel, 16, 512),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_embedding_is_what_a_direct_call_gives_trimmed_to_the_true_length(name: str, made: Path) -> None:
    model_class, dim, max_length = KINDS[name]
    folder = _folder(name, made)
    encoder = _text(folder)
    assert (encoder.manifest.embedding_dim, encoder.manifest.max_length) == (dim, max_length)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model_class.from_pretrained(folder).eval()  # type: ignore[attr-defined]
    for caption, found in zip(CAPTIONS, encoder.embed(CAPTIONS), strict=True):
        tokens = tokenizer(caption, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            wanted = model(**tokens).last_hidden_state[0].numpy()
        np.testing.assert_array_equal(found.embedding, wanted)
        assert found.is_truncated == (len(tokenizer(caption, verbose=False)["input_ids"]) > max_length)


@pytest.mark.parametrize("name", KINDS)
def test_padding_is_embedded_as_diffusion_pipelines_do_it_where_it_is_asked_for(name: str, made: Path) -> None:
    model_class, dim, _ = KINDS[name]
    folder = _folder(name, made)
    encoder = _text(folder, text_padding="max", text_max_tokens=18)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model_class.from_pretrained(folder).eval()  # type: ignore[attr-defined]
    for caption, found in zip(CAPTIONS, encoder.embed(CAPTIONS), strict=True):
        # As StableDiffusionPipeline.encode_prompt: CLIP is given no mask, and looks at the padding.
        tokens = tokenizer(caption, padding="max_length", truncation=True, max_length=18, return_tensors="pt")
        mask = None if "clip" in name else tokens.attention_mask
        with torch.no_grad():
            wanted = model(tokens.input_ids, attention_mask=mask).last_hidden_state[0].numpy()
        assert found.embedding.shape == (18, dim)
        np.testing.assert_array_equal(found.embedding, wanted)
    batched = list(encoder._batched(CAPTIONS))
    for one, many in zip(encoder.embed(CAPTIONS), batched, strict=True):
        assert one.embedding.shape == many.embedding.shape
        np.testing.assert_allclose(one.embedding, many.embedding, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip_text", "t5"])
def test_the_bytes_of_an_embedding_do_not_depend_on_its_neighbours(name: str, made: Path) -> None:
    encoder = _text(made / name)
    together = {c: found.embedding.tobytes() for c, found in zip(CAPTIONS, encoder.embed(CAPTIONS), strict=True)}
    assert [encoder_alone.embedding.tobytes() for encoder_alone in _text(made / name).embed(CAPTIONS[::-1])] == [
        together[caption] for caption in CAPTIONS[::-1]
    ]


@pytest.mark.parametrize("name", ["clip_text", "t5"])
def test_batches_as_a_gpu_takes_them_give_the_same_embeddings_up_to_rounding(name: str, made: Path) -> None:
    """The batching itself runs here on a CPU: no GPU is asked for."""
    encoder = _text(made / name)
    captions = [*CAPTIONS, *(f"caption number {n} " * (n % 5) for n in range(30))]
    batched = list(encoder._batched(captions))
    for one, many in zip(encoder.embed(captions), batched, strict=True):
        assert one.is_truncated == many.is_truncated
        np.testing.assert_allclose(one.embedding, many.embedding, atol=2e-5, rtol=1e-4)
    shuffled = list(encoder._batched(captions[::-1]))
    for one, other in zip(batched, shuffled[::-1], strict=True):
        np.testing.assert_array_equal(one.embedding, other.embedding)


def test_the_stored_dtype_is_the_one_that_is_stated(made: Path) -> None:
    (exact,) = _text(made / "t5").embed(["a cup"])
    half = _text(made / "t5", text_dtype="float16")
    (found,) = half.embed(["a cup"])
    assert half.manifest.embedding_dtype == "float16"
    np.testing.assert_array_equal(found.embedding, exact.embedding.astype(np.float16))


def test_a_tower_of_stable_diffusion_1_with_its_older_names_of_weights_is_read_as_it_is(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "clip_text", tmp_path / "text_encoder")
    weights = load_file(tmp_path / "text_encoder" / "model.safetensors")
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in weights.items()}
    save_file(older, tmp_path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tokenizer").mkdir()
    for path in (tmp_path / "text_encoder").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.rename(tmp_path / "tokenizer" / path.name)
    (found,) = _text(tmp_path).embed(["a cup"])
    (wanted,) = _text(made / "clip_text").embed(["a cup"])
    np.testing.assert_array_equal(found.embedding, wanted.embedding)


def test_weights_in_several_files_are_read_and_have_one_digest(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(made / "t5", folder)
    (folder / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(made / "t5").save_pretrained(folder, max_shard_size="4KB")
    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(names) > 1
    encoder = _text(folder)
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    assert encoder.manifest.weights_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    (found,) = encoder.embed(["a cup"])
    (wanted,) = _text(made / "t5").embed(["a cup"])
    np.testing.assert_array_equal(found.embedding, wanted.embedding)
    (folder / names[0]).unlink()
    with pytest.raises(UsageError, match=names[0]):
        _text(folder)


def test_the_fingerprint_follows_weights_tokenizer_dtype_length_columns_and_threads(made: Path, tmp_path: Path) -> None:
    folder = made / "clip_text"
    fingerprints = {_text(folder).manifest.fingerprint, _text(folder).manifest.fingerprint}
    assert len(fingerprints) == 1
    fingerprints.add(_text(folder, text_dtype="float16").manifest.fingerprint)
    fingerprints.add(_text(folder, text_max_tokens=12).manifest.fingerprint)
    fingerprints.add(_text(folder, text_columns=("caption", "short")).manifest.fingerprint)
    fingerprints.add(_text(folder, text_padding="max").manifest.fingerprint)
    fingerprints.add(_text(made / "clip").manifest.fingerprint)
    config = TextEncoderConfig(text_encoder=str(folder), text_dtype="float32")
    fingerprints.add(TextEncoder(config, CPU, "float32", 2).manifest.fingerprint)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 19}))
    fingerprints.add(_text(other).manifest.fingerprint)
    assert len(fingerprints) == 8


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def _code_of_its_own(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}'
    )
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def _too_few_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if "final_layer_norm" in key))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _no_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_weights, "pickles can run code"),
        (_other_kind, "'gpt2'; known are bert, clip"),
        (_code_of_its_own, "'mine'"),
        (_too_few_weights, "final_layer_norm"),
        (_cut_weights, "cannot be loaded"),
        (_no_tokenizer, "no tokenizer in"),
        (_bad_json, "cannot be read as JSON"),
        (_adapter, "merge it into the model"),
        (_empty, "neither config.json nor text_encoder/config.json"),
    ],
)
def test_what_is_no_text_encoder_is_refused_with_the_reason(
    spoil: Callable[[Path], None], said: str, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(made / "clip_text", folder)
    spoil(folder)
    with pytest.raises(UsageError, match=said) as caught:
        _text(folder)
    assert "--text-encoder" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not (folder / "ran").exists()


def test_other_weights_than_pinned_are_refused(made: Path) -> None:
    digest = hashlib.sha256((made / "clip_text" / "model.safetensors").read_bytes()).hexdigest()
    assert _text(made / "clip_text", text_encoder_sha256=digest).manifest.weights_sha256 == digest
    with pytest.raises(UsageError, match=digest):
        _text(made / "clip_text", text_encoder_sha256="0" * 64)
    with pytest.raises(UsageError, match="image-encoder"):
        _image(made / "clip_vision", image_encoder_sha256="0" * 64)


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused_without_a_network(tmp_path: Path) -> None:
    for name in ("no_such_folder", str(tmp_path / "nowhere"), "./here/there"):
        with pytest.raises(UsageError, match="hub id OWNER/NAME"):
            TextEncoder(TextEncoderConfig(text_encoder=name), CPU, "float32", 1)


def test_a_hub_id_without_a_network_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"'nobody/nothing'.*download it elsewhere"):
        _text(Path("nobody/nothing"))


def test_more_tokens_than_the_encoder_takes_are_not_to_be_had(made: Path) -> None:
    assert _text(made / "clip_text", text_max_tokens=8).manifest.max_length == 8
    (found,) = _text(made / "t5", text_max_tokens=2000).embed(["two dogs " * 400])
    assert len(found.embedding) == 2000
    for wrong in (1, 2, encoders.MAX_LENGTH + 1):
        with pytest.raises(UsageError, match=f"--text-max-tokens: {wrong} is not from 3 to {encoders.MAX_LENGTH}"):
            _text(made / "clip_text", text_max_tokens=wrong)


def test_an_embedding_that_is_not_finite_is_an_error_that_names_the_caption(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loud"
    shutil.copytree(made / "t5", folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.isfinite(next(iter(_text(folder).embed(["a cup"]))).embedding).all()
    with pytest.raises(UsageError, match=r"'a cup'.*stored as float16"):
        list(_text(folder, text_dtype="float16").embed(["a cup"]))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 96), (120, 57), (20, 300)])
def test_frames_are_resized_as_stable_video_diffusion_does_it(height: int, width: int) -> None:
    frame = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))
    picture = frame.permute(2, 0, 1)[None].float() / 255
    wanted = (_resize_with_antialiasing(picture * 2 - 1, (28, 28)) + 1) / 2
    found = frame_pixels(frame, 28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(found[None], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_vision", "clip"])
def test_an_image_embedding_is_what_stable_video_diffusion_computes(name: str, made: Path) -> None:
    encoder = _image(made / name)
    assert encoder.manifest.embedding_dim == 12
    frame = np.random.default_rng(6).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    (found,) = encoder.embed([frame])
    # As StableVideoDiffusionPipeline._encode_image does it.
    picture = torch.from_numpy(frame.astype(np.float32) / 255).permute(2, 0, 1)[None]
    small = (_resize_with_antialiasing(picture * 2.0 - 1.0, (28, 28)) + 1.0) / 2.0
    processor = CLIPImageProcessor.from_pretrained(made / name) if name == "clip_vision" else CLIPImageProcessor()
    pixels = processor(
        images=small,
        do_normalize=True,
        do_center_crop=False,
        do_resize=False,
        do_rescale=False,
        return_tensors="pt",
    ).pixel_values
    model = CLIPVisionModelWithProjection.from_pretrained(made / name).eval()
    with torch.no_grad():
        wanted = model(pixels).image_embeds[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_image_encoder_of_a_pipeline_folder_is_found_with_its_preprocessor(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "clip_vision", tmp_path / "image_encoder")
    (tmp_path / "feature_extractor").mkdir()
    preprocessor = tmp_path / "image_encoder" / "preprocessor_config.json"
    preprocessor.rename(tmp_path / "feature_extractor" / preprocessor.name)
    encoder = _image(tmp_path)
    assert encoder.manifest.fingerprint_fields["mean"] == [0.4, 0.5, 0.6]
    assert encoder.manifest.fingerprint_fields["resize"] == "svd-28"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_embeddings_up_to_rounding_and_the_same_bytes_in_any_company() -> None:
    config = TextEncoderConfig(text_encoder=str(encoders.minilm()), text_dtype="float32")
    on_gpu = TextEncoder(config, torch.device("cuda"), "float32", 1)
    forth, back = list(on_gpu.embed(CAPTIONS)), list(on_gpu.embed(CAPTIONS[::-1]))[::-1]
    for one, other, wanted in zip(forth, back, _text(encoders.minilm()).embed(CAPTIONS), strict=True):
        assert one.embedding.tobytes() == other.embedding.tobytes()
        np.testing.assert_allclose(one.embedding, wanted.embedding, atol=1e-3)
