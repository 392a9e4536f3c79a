"""CLIPScore as torchmetrics computes it, for people who report that number.

torchmetrics cuts a text behind the model's positions and its end token with it, from which CLIP's feature is read, and
version 1.9 cannot read what transformers 5 returns. So it is handed a model and a processor that cut before the end
token and return tensors; the formula is torchmetrics' own: max(100 cos(image, text), 0).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from fixclip_diffusion.evaluation.judges import as_tensor

PREFIX = "torchmetrics:"  # --scorer torchmetrics:MODEL
LONG_LENGTH = 248


class ClipScore:
    """torchmetrics' CLIPScore of pictures and texts.

    Args:
        source: a CLIP in transformers' format, folder or hub name, like openai/clip-vit-large-patch14 or
            zer0int/LongCLIP-L-Diffusers.
        device: where it runs.

    Raises:
        ValueError: the package `torchmetrics` is missing, or transformers can load no such CLIP.
    """

    format = "torchmetrics CLIPScore"
    title = "CLIPScore of picture and text (torchmetrics), 0 to 100"

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        try:
            from torchmetrics.multimodal import CLIPScore
        except ModuleNotFoundError:
            raise ValueError(
                f"scorer {PREFIX}{source} needs the package torchmetrics: pip install 'fixclip[judge]'"
            ) from None
        self.source, self.device = source, torch.device(device)
        try:
            model, processor = _load(source), CLIPProcessor.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"scorer {PREFIX}{source}: no CLIP that transformers can load: {first}") from error
        self.context_length = int(model.config.text_config.max_position_embeddings)
        parts = _Features(model.eval()), _Processor(processor, self.context_length)
        self.metric = CLIPScore(model_name_or_path=lambda: parts).to(self.device)

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "format": self.format, "context_length": self.context_length}

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """CLIPScore of each text, the mean over the pictures."""
        images = [as_tensor(picture).to(self.device) for picture in pictures]
        return [float(self.metric(images, [text] * len(images))) for text in texts]


def _load(source: str) -> CLIPModel:
    config = CLIPConfig.from_pretrained(source)
    try:
        return CLIPModel.from_pretrained(source, config=config)
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
    config.text_config.max_position_embeddings = LONG_LENGTH  # some Long-CLIPs are published with the 77 of their base
    return CLIPModel.from_pretrained(source, config=config)


class _Features(nn.Module):
    """A CLIP whose two methods return feature tensors (B, E)."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, image_BCHW: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=image_BCHW).pooler_output

    def get_text_features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids=ids_BT, attention_mask=mask_BT).pooler_output


class _Processor:
    """A processor that cuts texts before their end token."""

    def __init__(self, processor: CLIPProcessor, length: int):
        self.processor, self.length = processor, length

    def __call__(self, text: list[str] | None = None, **options: Any) -> Any:
        if text is not None:
            options |= {"text": text, "truncation": True, "max_length": self.length}
        return self.processor(**options)
