"""Reading and writing models: published folders, hub repositories, and the models that ship.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`; only safetensors are read, never pickles.
The modules of this package have names of their own; the exact map to each family's published keys is here, so
that files on disk always carry the published keys. Users enter by `load` and `CVVAE.save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cvvae.config import NUM_LEVELS, ConfigError, CVVAEConfig
from cvvae.folders import CONFIG_NAME, SHIPPED, WEIGHTS_NAME, folder_here, is_shipped, sha256_of_file
from cvvae.model import CVVAE

_UNTRAINED_SEED = 20405

_POST_QUANT_RULE = (r"^decoder\.post_quant_conv\.", r"post_quant_conv.")
# Own name -> published name; a family without rules is stored under its own names. The first rule that matches a part
# wins, each rule applies once.
_KEY_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "CVVAEModel": (
        (r"^encoder\.levels\.(\d)\.blocks\.", r"encoder.down.\1.block."),
        (r"^encoder\.levels\.(\d)\.resample\.", r"encoder.down.\1.downsample.conv."),
        (r"^decoder\.levels\.(\d)\.blocks\.", r"decoder.up.<\1>.block."),
        (r"^decoder\.levels\.(\d)\.resample\.conv\.", r"decoder.up.<\1>.upsample.conv."),
        (r"\.middle\.block([12])\.", r".mid.block_\1."),
        (r"\.middle\.attention\.time\.(norm|q|k|v)\.", r".mid.attn_1.\1_t."),
        (r"\.middle\.attention\.time\.out\.", r".mid.attn_1.proj_out_t."),
        (r"\.middle\.attention\.(norm|q|k|v)\.", r".mid.attn_1.\1."),
        (r"\.middle\.attention\.out\.", r".mid.attn_1.proj_out."),
        (r"\.shortcut\.", r".nin_shortcut."),
        _POST_QUANT_RULE,
    ),
    "CVVAESD3Model": (
        (r"^encoder\.levels\.(\d)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.levels\.(\d)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^decoder\.levels\.(\d)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
        (r"^decoder\.levels\.(\d)\.resample\.conv\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
        (r"\.middle\.block1\.", r".mid_block.resnets.0."),
        (r"\.middle\.block2\.", r".mid_block.resnets.1."),
        (r"\.middle\.attention\.norm\.", r".mid_block.attentions.0.group_norm."),
        (r"\.middle\.attention\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
        (r"\.middle\.attention\.out\.", r".mid_block.attentions.0.to_out.0."),
        (r"\.norm_out\.", r".conv_norm_out."),
        (r"\.shortcut\.", r".conv_shortcut."),
        _POST_QUANT_RULE,
    ),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, or does not fit the model that its config describes."""


def load(
    model: str | os.PathLike[str],
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    sha256: str | None = None,
) -> CVVAE:
    """A model in evaluation mode, on the CPU, with every weight filled from its checkpoint.

    Args:
        model: the name of a model that ships ("small"), else a folder, else a hub id such as "AILab-CVC/CV-VAE".
        subfolder: folder inside the folder or hub repository, such as "vae3d_v1-1".
        torch_dtype: data type of the weights and so of the computation; None is float32, whatever the file holds.
        revision: branch, tag or commit of a hub repository.
        sha256: hex digest that the weights' file must have.

    Raises:
        CheckpointError: nothing there, no network for a hub id, another digest, or keys that are missing, unused
            or wrongly shaped; all of them are listed.
        ConfigError: `config.json` does not describe a model that this package can build.
    """
    folder, source, commit = find_folder(os.fspath(model), subfolder, revision)
    config = read_config(folder)
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    if not dtype.is_floating_point:
        raise CheckpointError(f"torch_dtype is {dtype}: a floating point type is needed to compute with")
    weights_path = folder / WEIGHTS_NAME
    with torch.device("meta"):
        vae = CVVAE(config)
    if weights_path.is_file():
        digest = sha256_of_file(weights_path)
        _refuse_other_digest(digest, sha256, source)
        _fill(vae, read_safetensors(weights_path, dtype), str(weights_path))
    elif config.untrained:
        made = _made_weights(vae)
        digest = _sha256_of_tensors(made)
        _refuse_other_digest(digest, sha256, source)
        _fill(vae, {key: tensor.to(dtype) for key, tensor in made.items()}, f"{source} (made weights)")
    else:
        raise CheckpointError(_missing_file(weights_path))
    vae.source, vae.revision, vae.weights_sha256 = source, commit, digest
    return vae.eval().requires_grad_(False)


def _refuse_other_digest(digest: str, wanted: str | None, source: str) -> None:
    if wanted is not None and wanted.lower() != digest:
        raise CheckpointError(
            f"the weights of {source} have the SHA-256 {digest}, wanted is {wanted.lower()}: the file is damaged or "
            f"another version; fetch it again, or give the digest of the version that you mean"
        )


def save(vae: CVVAE, folder: Path) -> None:
    """Writes `config.json` and the weights with the published field names, keys and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in published_state_dict(vae).items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(vae.config.to_published(), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_config(folder: Path) -> CVVAEConfig:
    """The configuration in a model's folder.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it is not JSON, or describes something else.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(_missing_file(path))
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): fetch the file again") from error
    if not isinstance(published, dict):
        raise ConfigError(f"{path} holds a {type(published).__name__}: a JSON object is needed")
    try:
        return CVVAEConfig.from_published(published)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def published_key(name: str, class_name: str) -> str:
    """The family's published key of a parameter of this package, such as encoder.levels.0.blocks.0.conv1.weight."""
    for pattern, replacement in _KEY_RULES.get(class_name, ()):
        name = re.sub(pattern, replacement, name)
    # LDM counts the decoder's levels by resolution, highest first; the decoder here counts them as it runs them.
    return re.sub(r"<(\d)>", lambda match: str(NUM_LEVELS - 1 - int(match[1])), name)


def published_state_dict(vae: CVVAE) -> dict[str, Tensor]:
    """The parameters under their published keys; not copies."""
    return {published_key(name, vae.config.class_name): tensor for name, tensor in vae.state_dict().items()}


def find_folder(model: str, subfolder: str | None, revision: str | None) -> tuple[Path, str, str]:
    """(folder, where it came from, commit of the hub repository or "") of a shipped name, a folder or a hub id.

    Raises:
        CheckpointError: there is none, or no network for a hub id.
    """
    folder = folder_here(model, subfolder)
    if folder is not None:
        return folder, model if is_shipped(model) else str(folder), ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) is None or model.startswith((".", "/")):
        shipped = sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_NAME}"))
        raise CheckpointError(
            f"there is no model {model!r}: give a folder that exists, a hub id OWNER/NAME, or one of the models that "
            f"ship ({', '.join(shipped)})"
        )
    return _fetch(model, subfolder, revision)


def _fetch(hub_id: str, subfolder: str | None, revision: str | None) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + CONFIG_NAME, prefix + WEIGHTS_NAME]
    try:
        snapshot = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"the model {hub_id!r} is no folder here and could not be fetched from the hub ({type(error).__name__}: "
            f"{error}); check the name and the network, or download it elsewhere and give its folder"
        ) from error
    source = f"{hub_id}/{subfolder}" if subfolder else hub_id
    return snapshot / (subfolder or ""), source, snapshot.name


def _missing_file(path: Path) -> str:
    folder = path.parent
    beside = sorted(entry.name for entry in folder.iterdir())[:20] if folder.is_dir() else []
    return (
        f"there is no {path}: a model's folder holds {CONFIG_NAME} and {WEIGHTS_NAME} (only safetensors are read, "
        f"as pickles can run code); this one holds {beside or 'nothing'}: give the right folder or subfolder"
    )


def read_safetensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a file, in that data type.

    Raises:
        CheckpointError: the file is cut off or something else.
    """
    if not path.is_file():
        raise CheckpointError(_missing_file(path))
    tensors: dict[str, Tensor] = {}
    try:
        # One tensor at a time: a file of another type is never in memory twice.
        with safe_open(path, framework="pt") as reader:
            for key in reader.keys():  # noqa: SIM118 (the reader is no mapping and cannot be iterated)
                tensors[key] = reader.get_tensor(key).to(dtype)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    return tensors


def _fill(vae: CVVAE, tensors: Mapping[str, Tensor], source: str) -> None:
    """Makes the tensors the model's parameters, without a copy.

    Raises:
        CheckpointError: a key is missing, unused or wrongly shaped.
    """
    own_names = {published_key(name, vae.config.class_name): name for name in vae.state_dict()}
    wanted = {key: tuple(tensor.shape) for key, tensor in published_state_dict(vae).items()}
    problems = _listing("missing", wanted.keys() - tensors.keys())
    problems += _listing("unused", tensors.keys() - wanted.keys())
    problems += _listing(
        "wrongly shaped",
        (
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in wanted.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ),
    )
    if problems:
        raise CheckpointError(
            f"the weights in {source} do not fit the {vae.config.class_name} that {CONFIG_NAME} describes:\n"
            + "\n".join(problems)
            + "\ncheck that the two files belong together"
        )
    vae.load_state_dict({own_names[key]: tensor for key, tensor in tensors.items()}, strict=True, assign=True)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            # As activations are, or torch reorders it in every call.
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _listing(what: str, entries: Iterable[str]) -> list[str]:
    found = sorted(entries)
    return [f"{len(found)} {what}: {', '.join(found)}"] if found else []


def _made_weights(vae: CVVAE) -> dict[str, Tensor]:
    """Weights from a seed and each key's name, scaled so that activations stay about 1."""
    made = {}
    for key, tensor in published_state_dict(vae).items():
        rng = np.random.default_rng([_UNTRAINED_SEED, zlib.crc32(key.encode())])
        noise = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
        if key.endswith(".bias"):
            noise *= np.float32(0.1)
        elif noise.ndim == 1:
            noise = 1 + np.float32(0.1) * noise
        else:
            noise /= np.sqrt(np.float32(noise[0].size))
        made[key] = torch.from_numpy(noise)
    return made


def _sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
