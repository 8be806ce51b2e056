"""Promises: published configurations are read as published, and nothing that the layers cannot build is guessed."""

from __future__ import annotations

from typing import Any

import pytest

from cvvae import ConfigError, CVVAEConfig

PUBLISHED_SD21: dict[str, Any] = {
    "_class_name": "CVVAEModel",
    "_diffusers_version": "0.29.2",
    "_name_or_path": "somewhere",
    "attn_resolutions": [],
    "causal_decoder": False,
    "causal_encoder": True,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "decoder_attn_type": "spatial-temporal-xformer",
    "double_z": True,
    "dropout": 0.0,
    "en_de_n_frames_a_time": 16,
    "encoder_attn_type": "vanilla-xformers",
    "force_upcast": True,
    "half_3d": True,
    "in_channels": 3,
    "num_res_blocks": 2,
    "num_video_frames": None,
    "out_ch": 3,
    "reshape_x_dim_to_4": False,
    "reshape_z_dim_to_4": False,
    "scaling_factor": 0.18215,
    "spatial_n_compress": 8,
    "tile_overlap_ratio": 0.2222,
    "tile_spatial_size": 576,
    "time_n_compress": 4,
    "use_3d_conv": True,
    "z_channels": 4,
}


def test_the_published_sd21_configuration_is_what_missing_fields_default_to() -> None:
    assert CVVAEConfig.from_published(PUBLISHED_SD21) == CVVAEConfig.from_published({"_class_name": "CVVAEModel"})


def test_the_families_differ_in_configuration_only() -> None:
    sd21 = CVVAEConfig.from_published({"_class_name": "CVVAEModel"})
    sd3 = CVVAEConfig.from_published({"_class_name": "CVVAESD3Model"})
    assert (sd21.latent_channels, sd21.scaling_factor, sd21.shift_factor) == (4, 0.18215, 0.0)
    assert (sd3.latent_channels, sd3.scaling_factor, sd3.shift_factor) == (16, 1.5305, 0.0609)
    assert (sd21.norm_eps, sd3.norm_eps) == (1e-5, 1e-6)
    assert (sd21.spatial_padding, sd3.spatial_padding) == ("zeros", "replicate")
    assert (sd21.decoder_attention, sd3.decoder_attention) == ("spatial_temporal", "spatial")
    assert sd21.block_out_channels == sd3.block_out_channels == (128, 256, 512, 512)


@pytest.mark.parametrize("class_name", ["CVVAEModel", "CVVAESD3Model"])
def test_a_configuration_survives_writing_and_reading(class_name: str) -> None:
    fields = {"_class_name": class_name, "half_3d": False, "tile_spatial_size": None, "untrained": True}
    config = CVVAEConfig.from_published(fields)
    assert config.tile_size_px is None
    assert config.untrained
    assert CVVAEConfig.from_published(config.to_published()) == config


def test_what_is_written_holds_every_published_field() -> None:
    written = CVVAEConfig.from_published(PUBLISHED_SD21).to_published()
    wanted = {key: value for key, value in PUBLISHED_SD21.items() if key not in ("_diffusers_version", "_name_or_path")}
    assert written == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"_class_name": "AutoencoderKL"}, "CVVAEModel, CVVAESD3Model"),
        ({"_class_name": "CVVAEModel", "surprise": 1}, "surprise"),
        ({"_class_name": "CVVAEModel", "causal_encoder": False}, "causal_encoder=False"),
        ({"_class_name": "CVVAEModel", "decoder_attn_type": "linear"}, "decoder_attn_type='linear'"),
        ({"_class_name": "CVVAEModel", "ch": 100}, "100 channels wide"),
        ({"_class_name": "CVVAEModel", "ch_mult": [1, 2, 4]}, "4 are needed"),
        ({"_class_name": "CVVAEModel", "en_de_n_frames_a_time": 6}, "multiple of 4"),
        ({"_class_name": "CVVAESD3Model", "tile_overlap_ratio": 1.0}, "0 <= ratio < 1"),
        ({"_class_name": "CVVAESD3Model", "act_fn": "relu"}, "act_fn='relu'"),
    ],
)
def test_what_the_layers_cannot_build_is_refused_by_name(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted.replace("(", r"\(")):
        CVVAEConfig.from_published(fields)
