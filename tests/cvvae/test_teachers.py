"""Frozen image VAEs: the TAESD family against its description and against diffusers, the adapters, the refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from image_vaes import narrow_image_vae
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cvvae.teachers import FrozenTeacher, KLTeacher, TeacherError, TinyImageVAE, TinyTeacher, load_teacher

FAMILY = {"TAESD": (4, False), "TAESD3 and TAEF1": (16, False), "TAEF2": (32, True)}


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def made(latent_channels: int = 4, *, pools: bool = False, width: int = 8) -> TinyImageVAE:
    torch.manual_seed(5)
    return TinyImageVAE(latent_channels, width=width, pools=pools)


def write_pair(folder: Path, vae: TinyImageVAE, name: str = "tiny", suffix: str = ".pth") -> Path:
    """Half precision, as the released files are."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in ("encoder", "decoder"):
        tensors = {key: tensor.half() for key, tensor in getattr(vae, half).state_dict().items()}
        path = folder / f"{name}_{half}{suffix}"
        torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    return folder


def clip(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 2 - 1


def described_block(x: Tensor, weights: Mapping[str, Tensor], at: int) -> Tensor:
    if f"{at}.pool.0.weight" in weights:
        h = F.conv2d(x, weights[f"{at}.pool.0.weight"])
        h = F.relu(F.group_norm(h, 4, weights[f"{at}.pool.1.weight"], weights[f"{at}.pool.1.bias"]))
        x = x + F.conv2d(h, weights[f"{at}.pool.3.weight"])
    h = x
    for index in (0, 2, 4):
        h = F.conv2d(h, weights[f"{at}.conv.{index}.weight"], weights[f"{at}.conv.{index}.bias"], padding=1)
        h = F.relu(h) if index < 4 else h
    return F.relu(h + x)


def described_encoder(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    x = described_block(F.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1), weights, 1)
    for first in (2, 6, 10):
        x = F.conv2d(x, weights[f"{first}.weight"], stride=2, padding=1)
        for at in (first + 1, first + 2, first + 3):
            x = described_block(x, weights, at)
    return F.conv2d(x, weights["14.weight"], weights["14.bias"], padding=1)


def described_decoder(z: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    z = 3 * torch.tanh(z / 3)
    x = F.relu(F.conv2d(z, weights["1.weight"], weights["1.bias"], padding=1))
    for at in (3, 4, 5):
        x = described_block(x, weights, at)
    for conv, blocks in ((7, (8, 9, 10)), (12, (13, 14, 15)), (17, (18,))):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = F.conv2d(x, weights[f"{conv}.weight"], padding=1)
        for at in blocks:
            x = described_block(x, weights, at)
    return F.conv2d(x, weights["19.weight"], weights["19.bias"], padding=1)


@pytest.mark.parametrize(("latent_channels", "pools"), FAMILY.values(), ids=FAMILY)
def test_a_tiny_vae_computes_what_its_description_says(latent_channels: int, pools: bool) -> None:
    vae = made(latent_channels, pools=pools)
    pixels = clip(2, 3, 32, 24) / 2 + 0.5
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents, described_encoder(pixels, vae.encoder.state_dict()))
    wide = clip(2, latent_channels, 4, 3) * 5
    torch.testing.assert_close(vae.decode(wide), described_decoder(wide, vae.decoder.state_dict()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("latent_channels", "pools"), FAMILY.values(), ids=FAMILY)
def test_files_of_the_family_load_by_their_keys_alone(
    tmp_path: Path, latent_channels: int, pools: bool, suffix: str
) -> None:
    vae = made(latent_channels, pools=pools)
    teacher = load_teacher(str(write_pair(tmp_path, vae, suffix=suffix)))
    assert isinstance(teacher.teacher, TinyImageVAE)
    assert (teacher.latent_channels, teacher.scaling_factor, teacher.shift_factor) == (latent_channels, 1.0, 0.0)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    wanted = vae.half().float()
    frames = clip(1, 3, 16, 16)
    latents = teacher.encode_frames(frames)
    torch.testing.assert_close(latents, wanted.encode((frames + 1) / 2))
    torch.testing.assert_close(teacher.decode_latents(latents), wanted.decode(latents) * 2 - 1)


def test_the_keys_and_shapes_of_taef2_are_those_of_its_release() -> None:
    with torch.device("meta"):
        vae = TinyImageVAE(32, pools=True)
    encoder, decoder = (
        {k: tuple(t.shape) for k, t in half.state_dict().items()} for half in (vae.encoder, vae.decoder)
    )
    block = {f"conv.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    pool = {"pool.0.weight", "pool.1.weight", "pool.1.bias", "pool.3.weight"}
    outer = {"0.weight", "0.bias", "2.weight", "6.weight", "10.weight", "14.weight", "14.bias"}
    blocks = {f"{at}.{key}" for at in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13) for key in block}
    assert set(encoder) == outer | blocks | {f"{at}.{key}" for at in (11, 12, 13) for key in pool}
    outer = {"1.weight", "1.bias", "7.weight", "12.weight", "17.weight", "19.weight", "19.bias"}
    blocks = {f"{at}.{key}" for at in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18) for key in block}
    assert set(decoder) == outer | blocks | {f"{at}.{key}" for at in (3, 4, 5) for key in pool}
    assert (encoder["0.weight"], encoder["14.weight"]) == ((64, 3, 3, 3), (32, 64, 3, 3))
    assert (encoder["11.pool.0.weight"], encoder["11.pool.1.bias"]) == ((256, 64, 1, 1), (256,))
    assert (decoder["1.weight"], decoder["3.pool.3.weight"]) == ((64, 32, 3, 3), (64, 256, 1, 1))
    assert decoder["19.weight"] == (3, 64, 3, 3)


def diffusers_tiny(latent_channels: int = 16) -> AutoencoderTiny:
    torch.manual_seed(3)
    widths = (8, 8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=latent_channels
    ).eval()


def diffusers_kl(**fields: object) -> AutoencoderKL:
    return narrow_image_vae(4, block_out_channels=(8, 8, 8, 8), **fields)


def test_our_module_and_diffusers_tiny_are_one_model_behind_the_frozen_teacher() -> None:
    theirs = diffusers_tiny()
    layers = theirs.state_dict()
    encoder = {key.removeprefix("encoder.layers."): t for key, t in layers.items() if key.startswith("encoder.")}
    shifted = {key.removeprefix("decoder.layers."): t for key, t in layers.items() if key.startswith("decoder.")}
    decoder = {f"{int(at) + 1}.{rest}": t for key, t in shifted.items() for at, _, rest in [key.partition(".")]}
    ours = FrozenTeacher(TinyImageVAE.from_state_dicts(encoder, decoder))
    teacher = FrozenTeacher(TinyTeacher(theirs))
    frames = clip(2, 3, 16, 24)
    latents = teacher.encode_frames(frames)
    torch.testing.assert_close(ours.encode_frames(frames), latents)
    torch.testing.assert_close(ours.decode_latents(latents), teacher.decode_latents(latents))


def test_a_diffusers_image_vae_gives_the_mean_of_its_posterior_unscaled() -> None:
    vae = diffusers_kl(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    teacher = FrozenTeacher(KLTeacher(vae))
    assert (teacher.latent_channels, teacher.scaling_factor, teacher.shift_factor) == (16, 1.5305, 0.0609)
    frames = clip(2, 3, 16, 16)
    latents = teacher.encode_frames(frames)
    torch.testing.assert_close(latents, vae.encode(frames).latent_dist.mean)
    torch.testing.assert_close(teacher.decode_latents(latents), vae.decode(latents).sample)


@pytest.mark.parametrize("make", [diffusers_kl, diffusers_tiny])
def test_a_folder_of_diffusers_loads_by_its_class_name(tmp_path: Path, make) -> None:
    vae = make(latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    teacher = load_teacher(str(tmp_path), "vae")
    adapter = {AutoencoderKL: KLTeacher, AutoencoderTiny: TinyTeacher}[type(vae)]
    assert isinstance(teacher.teacher, adapter)
    frames = clip(1, 3, 16, 16)
    torch.testing.assert_close(teacher.encode_frames(frames), FrozenTeacher(adapter(vae)).encode_frames(frames))
    assert teacher.shift_factor == 0.0


@pytest.mark.parametrize("pools", [False, True])
def test_every_frame_of_a_clip_is_coded_by_itself(pools: bool) -> None:
    teacher = FrozenTeacher(made(pools=pools))
    frames = clip(2, 3, 5, 16, 24)
    latents = teacher.encode_frames(frames)
    assert latents.shape == (2, 4, 5, 2, 3)
    decoded = teacher.decode_latents(latents)
    assert decoded.shape == frames.shape
    for index in range(5):
        torch.testing.assert_close(latents[:, :, index], teacher.encode_frames(frames[:, :, index]))
        torch.testing.assert_close(decoded[:, :, index], teacher.decode_latents(latents[:, :, index]))


def test_gradients_pass_through_a_teacher_and_stay_out_of_it() -> None:
    teacher = FrozenTeacher(made())
    latents = clip(1, 4, 2, 2, 2).requires_grad_()
    teacher.decode_latents(latents).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0
    frames = clip(1, 3, 16, 16).requires_grad_()
    teacher.encode_frames(frames).square().sum().backward()
    assert frames.grad is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_inside_a_module_that_trains_stays_in_evaluation_mode() -> None:
    teacher = FrozenTeacher(made())
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())


def test_any_object_with_the_protocol_can_be_a_teacher() -> None:
    class Shrink:
        latent_channels, pixel_range, scaling_factor, shift_factor = 3, (0.0, 255.0), 2.0, 1.0

        def encode(self, pixels: Tensor) -> Tensor:
            return F.avg_pool2d(pixels, 8)

        def decode(self, latents: Tensor) -> Tensor:
            return F.interpolate(latents, scale_factor=8.0)

    teacher = FrozenTeacher(Shrink())
    white_and_black = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 8, 8)
    latents = teacher.encode_frames(white_and_black)
    assert latents.flatten().tolist() == [255, 0, 255, 0, 255, 0]
    torch.testing.assert_close(teacher.decode_latents(latents), white_and_black)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (1, 3, 20, 16), (1, 3, 5, 16, 12)])
def test_frames_that_no_teacher_can_take_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needed"):
        FrozenTeacher(made()).encode_frames(torch.zeros(shape))


def test_latents_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="this teacher has 4 channels"):
        FrozenTeacher(made()).decode_latents(torch.zeros(1, 16, 2, 2))


def test_the_encoder_file_names_the_pair_where_a_folder_holds_two(tmp_path: Path) -> None:
    write_pair(tmp_path, made(4), "taesd")
    write_pair(tmp_path, made(16), "taesd3")
    with pytest.raises(TeacherError, match=r"taesd3_encoder\.pth.*give the encoder's file"):
        load_teacher(str(tmp_path))
    assert load_teacher(str(tmp_path / "taesd3_encoder.pth")).latent_channels == 16


def test_the_same_model_in_both_formats_is_one_model(tmp_path: Path) -> None:
    write_pair(write_pair(tmp_path, made()), made(), suffix=".safetensors")
    assert load_teacher(str(tmp_path)).latent_channels == 4


def test_a_path_without_a_teacher_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="nothing"):
        load_teacher(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TeacherError, match=r"holds \['notes.txt'\]"):
        load_teacher(str(tmp_path))
    with pytest.raises(TeacherError, match="there is no /no/such/folder"):
        load_teacher("/no/such/folder")


def test_another_class_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CVVAEModel"}))
    with pytest.raises(TeacherError, match=r"'CVVAEModel'.*AutoencoderKL, AutoencoderTiny.*subfolder 'vae'"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="is not JSON"):
        load_teacher(str(tmp_path))


def test_a_diffusers_folder_without_weights_is_refused(tmp_path: Path) -> None:
    diffusers_kl().save_config(tmp_path)
    with pytest.raises(TeacherError, match=r"AutoencoderKL in .* could not be read"):
        load_teacher(str(tmp_path))


def test_an_image_vae_of_another_compression_is_refused() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(TeacherError, match="compresses 1x"):
        KLTeacher(vae)


def test_a_pair_that_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, made(16))
    decoder = {key: tensor.half() for key, tensor in made(4).decoder.state_dict().items()}
    torch.save(decoder, tmp_path / "tiny_decoder.pth")
    with pytest.raises(TeacherError, match=r"1\.weight is \(8, 4, 3, 3\) instead of \(8, 16, 3, 3\)"):
        load_teacher(str(tmp_path))
    (tmp_path / "tiny_decoder.pth").unlink()
    with pytest.raises(TeacherError, match=r"decoder is missing.*tiny_decoder\.pth"):
        load_teacher(str(tmp_path))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, made())
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "tiny_encoder.pth")
    with pytest.raises(TeacherError, match=r"\['conv.weight'\].*TAESD"):
        load_teacher(str(tmp_path))
    torch.save([1, 2], tmp_path / "tiny_encoder.pth")
    with pytest.raises(TeacherError, match="holds a list"):
        load_teacher(str(tmp_path))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, made())
    torch.save({"0.weight": Path("x")}, tmp_path / "tiny_encoder.pth")
    with pytest.raises(TeacherError, match="could not be read as weights"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    write_pair(tmp_path, made(), suffix=suffix)
    path = tmp_path / f"tiny_encoder{suffix}"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TeacherError, match=path.name):
        load_teacher(str(tmp_path))


def test_a_hub_id_without_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=r"could not be fetched.*subfolder"):
        load_teacher("no-such-owner/no-such-model", "vae")


def test_a_pickle_is_not_opened_with_a_torch_that_a_crafted_one_can_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in (".pth", ".safetensors"):
        (tmp_path / suffix).mkdir()
        write_pair(tmp_path / suffix, made(), suffix=suffix)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    with pytest.raises(TeacherError, match=r"2\.9\.1.*CVE-2026-24747.*safetensors"):
        load_teacher(str(tmp_path / ".pth"))
    load_teacher(str(tmp_path / ".safetensors"))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    load_teacher(str(tmp_path / ".pth"))
