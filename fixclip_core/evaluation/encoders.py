"""A CLIP of any kind, ready to encode images and texts.

Shape letters: B batch, T texts, E embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fixclip_core.check import check_vocabulary, loading
from fixclip_core.device import Precision

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encoder:
    """A CLIP of any kind, ready to encode.

    Attributes:
        model: has `encode_image` and `encode_text` with `normalize=True`, in evaluation mode.
        tokenizer: list of strings to ids, (T, context_length).
        preprocess: PIL image to (C, H, W).
        source, format: where it came from and what it was recognised as.
        context_length: tokens it reads.
        resolution: pixels of its images' sides.
        device: where it runs.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    source: str
    format: str
    context_length: int
    resolution: int | tuple[int, int]
    device: torch.device

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "format": self.format,
            "context_length": self.context_length,
            "resolution": self.resolution,
        }


def load_encoder(
    source: str | Path,
    *,
    model_name: str | None = None,
    pretrained: str | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Load a CLIP to evaluate, as it is: nothing is stretched or added.

    Args:
        source: a FixClip folder, any file, folder or built-in name that `weights.read.read_clip` knows, or an open_clip
            model name or "hf-hub:" address, which may be downloaded.
        model_name: see `weights.read.read_clip`.
        pretrained: open_clip's weight tag, for an open_clip model name.
        device: where to run.

    Raises:
        LoadError: nothing of that name, see `weights.read.read_clip`, or the tokenizer is of another model.
        ValueError: a model name without its weights, or `pretrained` for weights on disk.
    """
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    from fixclip_core.model.fixclip import FixClip
    from fixclip_core.weights.load import (
        build_clip,
        check_pretrained,
        create_open_clip,
        find_fixclip,
        is_open_clip_name,
    )
    from fixclip_core.weights.read import read_clip, refuse_model_name

    name, device = str(source), torch.device(device)
    check_pretrained(source, pretrained)
    if find_fixclip(source) or is_open_clip_name(source):
        refuse_model_name(source, model_name)
    if folder := find_fixclip(source):
        fixclip = FixClip.from_pretrained(folder)
        config, length, format = fixclip.config.clip, int(fixclip.config.context_length or 0), "FixClip"
        model, preprocess = fixclip, fixclip.config.preprocess
        tokenizer, transform = fixclip.tokenizer(), fixclip.preprocess(train=False)
    else:
        if is_open_clip_name(source):
            if pretrained is None and not name.startswith(("hf-hub:", "local-dir:")):
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
                raise ValueError(f"{name} is an open_clip model name: choose its weights with --pretrained ({tags})")
            model, config, preprocess = create_open_clip(name, pretrained)
            length, format = int(model.context_length), "open_clip"
            options = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
            with loading(f"tokenizer of {name!r}"):
                tokenizer = open_clip.get_tokenizer(name, **options)
        else:
            checkpoint = read_clip(source, model_name)
            model, config, preprocess = build_clip(checkpoint), checkpoint.model_config, checkpoint.preprocess
            length, format = checkpoint.context_length, checkpoint.format
            if tokenizer_name := config["text_cfg"].get("hf_tokenizer_name"):
                with loading(f"tokenizer {tokenizer_name!r}"):
                    tokenizer = HFTokenizer(tokenizer_name, context_length=length, trust_remote_code=False)
            else:
                tokenizer = open_clip.SimpleTokenizer(context_length=length)
        transform = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**preprocess), is_train=False
        )
    size = preprocess.get("size", config["vision_cfg"].get("image_size", 224))
    return _checked(Encoder(model.to(device).eval(), tokenizer, transform, name, format, length, size, device))


def _checked(encoder: Encoder) -> Encoder:
    """Refuse a tokenizer whose ids the model has no embeddings for, instead of an index error later."""
    for name, module in encoder.model.named_modules():
        if name.endswith("token_embedding"):
            check_vocabulary(int(encoder.tokenizer([""]).max()), module.num_embeddings, encoder.source)
    return encoder


@torch.no_grad()
def encode_images(encoder: Encoder, image_BCHW: Tensor, precision: Precision = "fp32") -> Tensor:
    """Normalised float32 features, (B, E), on the encoder's device."""
    with autocast(encoder.device, precision):
        return encoder.model.encode_image(image_BCHW.to(encoder.device), normalize=True).float()


@torch.no_grad()
def encode_texts(
    encoder: Encoder, texts: Sequence[str], batch_size: int = 64, precision: Precision = "fp32"
) -> tuple[Tensor, int]:
    """Normalised float32 features, (T, E), and how many texts fill the whole context."""
    features, cut = [], 0
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", unit="batch"):
        ids_BT = encoder.tokenizer(list(texts[start : start + batch_size]))
        # The end token has the highest id; where it is the last one, the text was cut or just fits.
        cut += int((ids_BT.argmax(dim=-1) == ids_BT.shape[1] - 1).sum())
        with autocast(encoder.device, precision):
            features.append(encoder.model.encode_text(ids_BT.to(encoder.device), normalize=True).float())
    return torch.cat(features), cut


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")
