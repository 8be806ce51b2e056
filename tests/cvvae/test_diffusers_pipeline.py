"""A video VAE as `vae` of a text-to-image pipeline of diffusers: text in, images out, and images in, images out.

The pipeline is small and its weights are made; what it draws means nothing. That it draws the same with the video VAE
as with the image VAE that it was inflated from is the promise: CV-VAE's first use, arXiv 2405.20279, section 4.2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from image_vaes import narrow_image_vae
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import cvvae
from cvvae.inflate import inflate

SIDE_PX = 64
PROMPT = "a cup"


@pytest.fixture(scope="module")
def image_vae() -> AutoencoderKL:
    """SD2.1's shape with narrow levels, quantisation layers and scale included."""
    with torch.no_grad():
        return narrow_image_vae(1, latent_channels=4, sample_size=SIDE_PX, scaling_factor=0.18215)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything of a pipeline but the VAE."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=SIDE_PX // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of tokenizer with single letters for words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _text_to_image(parts: dict[str, Any], vae: Any) -> Tensor:
    pipeline = StableDiffusionPipeline(vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return _images(pipeline, height=SIDE_PX, width=SIDE_PX)


def _image_to_image(parts: dict[str, Any], vae: Any, images: Tensor) -> Tensor:
    pipeline = StableDiffusionImg2ImgPipeline(vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return _images(pipeline, image=images, strength=0.7)


def _images(pipeline: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = pipeline(
        PROMPT, num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="pt", **arguments
    )
    images: Tensor = drawn.images
    return images


def test_text_to_image_draws_the_same_with_the_inflated_video_vae(
    parts: dict[str, Any], image_vae: AutoencoderKL
) -> None:
    drawn = _text_to_image(parts, inflate(image_vae))
    assert drawn.shape == (1, 3, SIDE_PX, SIDE_PX)
    assert drawn.std() > 0.01
    torch.testing.assert_close(drawn, _text_to_image(parts, image_vae), atol=1e-4, rtol=0)


def test_image_to_image_draws_the_same_with_the_inflated_video_vae(
    parts: dict[str, Any], image_vae: AutoencoderKL
) -> None:
    # The pipeline draws from the latent distribution: mean, deviation and the use of the generator must agree too.
    images = torch.rand(1, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(4))
    drawn = _image_to_image(parts, inflate(image_vae), images)
    assert drawn.shape == images.shape
    torch.testing.assert_close(drawn, _image_to_image(parts, image_vae, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_name", ["CVVAEModel", "CVVAESD3Model"])
def test_a_published_video_vae_draws_images_from_text_and_from_images(
    parts: dict[str, Any], make_model: Any, class_name: str
) -> None:
    channels = {"CVVAEModel": {}, "CVVAESD3Model": {"out_channels": 4}}[class_name]
    vae: cvvae.CVVAE = make_model(class_name, **channels)
    images = torch.rand(1, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(5))
    for drawn in (_text_to_image(parts, vae), _image_to_image(parts, vae, images)):
        assert drawn.shape == images.shape
        assert torch.isfinite(drawn).all()
        assert drawn.std() > 0.01


def test_a_pipeline_with_a_video_vae_moves_and_counts_its_latents_by_the_vae(
    parts: dict[str, Any], image_vae: AutoencoderKL
) -> None:
    pipeline = StableDiffusionPipeline(vae=inflate(image_vae), **parts)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.to(torch.float64).vae.dtype == torch.float64
    assert pipeline.to(torch.float32).vae.dtype == torch.float32
