"""Promises: published keys and shapes exactly, nothing missing and nothing left over, and errors that say which."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cvvae
from cvvae.checkpoint import published_state_dict

MakeModel = Callable[..., cvvae.CVVAE]
CLIPS = Path(__file__).parents[1] / "data" / "clips"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Number of keys, and SHA-256 over the sorted lines "key [shape]", of the released checkpoints.
PUBLISHED_KEYS = {
    "CVVAEModel": (254, "948da73b593e55d2098c04ce3cc9703d0fe0a10d55b4574064ad8d8159ff17c8"),
    "CVVAESD3Model": (244, "0de54642b6e5ca6dd6883aa65cbb45f188e6e8c6e468bcab6bc7f3128f3bbe6f"),
}
SOME_KEYS = {
    "CVVAEModel": {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.mid.attn_1.proj_out_t.weight": (512, 512),
        "decoder.up.3.upsample.conv.bias": (1024,),
        "decoder.up.0.block.0.conv2.weight": (128, 128, 3, 3),
        "decoder.norm_out.weight": (128,),
    },
    "CVVAESD3Model": {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": (1024, 512, 3, 3, 3),
        "decoder.conv_norm_out.weight": (128,),
        "encoder.conv_out.weight": (32, 512, 3, 3, 3),
    },
}


@pytest.mark.parametrize("class_name", PUBLISHED_KEYS)
def test_the_full_model_has_every_published_key_and_shape_and_no_other(class_name: str) -> None:
    with torch.device("meta"):
        vae = cvvae.CVVAE(cvvae.CVVAEConfig.from_published({"_class_name": class_name}))
    shapes = {key: tuple(tensor.shape) for key, tensor in published_state_dict(vae).items()}
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert SOME_KEYS[class_name].items() <= shapes.items()
    assert (len(shapes), digest) == PUBLISHED_KEYS[class_name]


@pytest.fixture
def folder(family: str, make_model: MakeModel, tmp_path: Path) -> Path:
    make_model(family).save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_comes_back_with_every_weight(family: str, make_model: MakeModel, folder: Path) -> None:
    vae, again = make_model(family), cvvae.load(folder)
    assert again.config == vae.config
    assert again.weights_sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    for key, tensor in published_state_dict(vae).items():
        assert torch.equal(tensor, published_state_dict(again)[key])
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_half_precision_files_load_as_float32_unless_told_otherwise(folder: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    assert cvvae.load(folder).dtype == torch.float32
    assert cvvae.load(folder, torch_dtype=torch.float16).dtype == torch.float16


def test_a_subfolder_is_read(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "vae3d")
    assert cvvae.load(tmp_path, "vae3d").config == make_model(family).config


def test_missing_unused_and_wrongly_shaped_keys_are_all_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder.conv_in.bias"]
    tensors["decoder.conv_out.bias"] = torch.zeros(5)
    tensors["quant_conv.weight"] = torch.zeros(2)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(cvvae.CheckpointError) as caught:
        cvvae.load(folder)
    message = str(caught.value)
    assert "1 missing: encoder.conv_in.bias" in message
    assert "1 unused: quant_conv.weight" in message
    assert "1 wrongly shaped: decoder.conv_out.bias (5,) instead of (3,)" in message
    assert str(folder) in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_a_checkpoint_of_the_other_family_is_refused(folder: Path, family: str) -> None:
    other = "CVVAESD3Model" if family == "CVVAEModel" else "CVVAEModel"
    fields = {"_class_name": other}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(cvvae.CheckpointError, match="check that the two files belong together"):
        cvvae.load(folder)


def test_a_cut_off_file_is_named(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(cvvae.CheckpointError, match="not a whole safetensors file"):
        cvvae.load(folder)


def test_a_folder_without_weights_says_what_it_holds(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "CVVAEModel"}')
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(cvvae.CheckpointError, match=r"only safetensors are read.*model\.ckpt"):
        cvvae.load(tmp_path)


def test_another_digest_than_wanted_is_refused(folder: Path) -> None:
    digest = cvvae.load(folder).weights_sha256
    assert cvvae.load(folder, sha256=digest.upper()).weights_sha256 == digest
    with pytest.raises(cvvae.CheckpointError, match=digest):
        cvvae.load(folder, sha256="0" * 64)


class Gadget:
    """Runs a command when it is unpickled: makes the file of its name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.pt", "config.json"])
def test_a_pickle_that_runs_code_is_never_unpickled_whatever_its_name(folder: Path, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    if name != "config.json":
        (folder / WEIGHTS).unlink()
    torch.save({"encoder.conv_in.weight": Gadget(ran)}, folder / name)
    with suppress(cvvae.CheckpointError, cvvae.ConfigError):  # without a file, weights are made from a seed
        cvvae.load(folder)
        assert name not in (WEIGHTS, "config.json")
    assert not ran.exists()


def test_a_wrong_digest_is_refused_before_the_file_is_parsed(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(cvvae.CheckpointError, match="wanted is 0000"):
        cvvae.load(folder, sha256="0" * 64)


def test_a_broken_configuration_is_named_with_its_file(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(cvvae.ConfigError, match=r"config\.json is not JSON"):
        cvvae.load(folder)


def test_the_model_that_ships_is_trained_and_light() -> None:
    vae = cvvae.load("small")
    assert (vae.is_trained, vae.is_causal, vae.latent_channels) == (True, True, 32)
    shipped = Path(cvvae.__file__).parent / "weights"
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 5_500_000


def test_weights_are_told_without_loading_them_where_the_model_is_here_and_never_fetched(folder: Path) -> None:
    for model in ("small", str(folder)):
        assert cvvae.weights_sha256_here(model) == cvvae.load(model).weights_sha256
    assert cvvae.weights_sha256_here("OWNER/NAME") is None


def test_the_model_that_ships_reconstructs_a_real_picture() -> None:
    with Image.open(CLIPS / "city_still.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB").resize((256, 144), Image.Resampling.LANCZOS), dtype=np.float32)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    vae = cvvae.load("small")
    error = (vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1) - image).square().mean()
    assert 10 * math.log10(4 / float(error)) > 22


def test_weights_made_from_a_seed_are_the_same_every_time_and_say_what_they_are(tmp_path: Path) -> None:
    fields = {"_class_name": "CVVAELightModel", "encoder_widths": [8, 8, 8], "decoder_widths": [8, 8, 8]}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "untrained": True}), encoding="utf-8")
    first, second = cvvae.load(tmp_path), cvvae.load(tmp_path)
    assert first.weights_sha256 == second.weights_sha256
    assert not first.is_trained
    z = first.encode(torch.zeros(1, 3, 5, 32, 32)).latent_dist.mean
    assert z.shape == (1, 32, 2, 4, 4)
    assert z.isfinite().all()


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(cvvae.CheckpointError, match=r"no model 'smal'.*OWNER/NAME.*small"):
        cvvae.load("smal")


def test_a_hub_id_without_a_network_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The offline switch is read at import; a real attempt would wait for the network's time-out.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(cvvae.CheckpointError, match=r"'nobody/nothing'.*network.*give its folder"):
        cvvae.load("nobody/nothing", subfolder="vae3d")


def test_a_data_type_that_cannot_compute_is_refused(folder: Path) -> None:
    with pytest.raises(cvvae.CheckpointError, match=r"torch\.int8"):
        cvvae.load(folder, torch_dtype=torch.int8)
