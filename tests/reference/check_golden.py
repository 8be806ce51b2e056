"""The published models' own numbers and key lists; needs the folder named by LATENTMILL_REFERENCE.

Not part of the normal suite, as the values are not in the repository: `pytest tests/reference/check_golden.py`.
The weights and inputs are made from seeds, as the folder's README says.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cvvae
from cvvae.checkpoint import published_state_dict

FOLDER = os.environ.get("LATENTMILL_REFERENCE", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LATENTMILL_REFERENCE names no folder of reference values")

CLASS_NAMES = {"sd21": "CVVAEModel", "sd3": "CVVAESD3Model"}
CASES = ["image", "one_chunk", "three_chunks", "tiles", "odd_size"]
TOLERANCE = 1e-4


def read_json(name):
    return json.loads((Path(FOLDER) / name).read_text())


def made_weight(seed, name, shape):
    n = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith(".bias"):
        return np.float32(0.1) * n
    if len(shape) == 1:
        return 1 + np.float32(0.1) * n
    return n / np.sqrt(np.prod(shape[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    loaded = {}
    for family, class_name in CLASS_NAMES.items():
        golden = read_json(f"golden_{family}.json")
        folder = tmp_path_factory.mktemp(family)
        (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **golden["config"]}))
        seed, shapes = golden["weight_seed"], golden["state_dict_shapes"]
        weights = {key: torch.from_numpy(made_weight(seed, key, shape)) for key, shape in shapes.items()}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        loaded[family] = cvvae.load(folder)
    return loaded


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", CLASS_NAMES)
def test_every_array_equals_the_published_implementation(models, family, name):
    case = next(case for case in read_json(f"golden_{family}.json")["cases"] if case["name"] == name)
    golden = np.load(Path(FOLDER) / f"golden_{family}.npz")
    rng = np.random.default_rng([case["input_seed"], 7])
    x = torch.from_numpy(rng.uniform(-1, 1, case["input_shape"]).astype(np.float32))
    with torch.no_grad():
        latent_dist = models[family].encode(x).latent_dist
        recon = models[family].decode(latent_dist.mode()).sample
    found = {"mean": latent_dist.mean, "logvar": latent_dist.logvar, "recon": recon}
    errors = {}
    for key, tensor in found.items():
        wanted = golden[f"{name}.{key}"]
        assert tuple(tensor.shape) == wanted.shape
        errors[key] = float(np.abs(tensor.numpy() - wanted).max())
    print(family, name, {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize("family", CLASS_NAMES)
def test_the_full_model_has_every_published_key_and_shape_and_no_other(family):
    with torch.device("meta"):
        vae = cvvae.CVVAE(cvvae.CVVAEConfig.from_published({"_class_name": CLASS_NAMES[family]}))
    found = {key: list(tensor.shape) for key, tensor in published_state_dict(vae).items()}
    assert found == read_json(f"state_dict_{family}.json")
