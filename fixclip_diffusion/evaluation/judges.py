"""What pictures show of their prompts: cosines of a CLIP, and verdicts of the exact checker.

Shape letters: B pictures, C, H, W channels, height and width, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fixclip_core import scenes
from fixclip_core.evaluation.encoders import Encoder, encode_images, encode_texts
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.tokenizer import FixClipTokenizer


@torch.no_grad()
def text_scores(
    pictures: Sequence[Sequence[Image.Image]], texts: Sequence[Sequence[str]], encoder: Encoder
) -> list[list[float]]:
    """Cosine between a prompt's pictures (mean over them) and each of its texts.

    Args:
        pictures: of each prompt.
        texts: of each prompt, any number.
        encoder: a CLIP; choose one that reads as many tokens as the prompts have.
    """
    flat = [text for those in texts for text in those]
    text_TE, _ = encode_texts(encoder, flat)
    scores, start = [], 0
    for those, own in zip(pictures, texts, strict=True):
        image_BE = encode_images(encoder, torch.stack([encoder.preprocess(picture) for picture in those]))
        cosine_BT = image_BE @ text_TE[start : start + len(own)].T
        scores.append(cosine_BT.mean(0).tolist())
        start += len(own)
    return scores


def scene_verdicts(pictures: Sequence[Image.Image], prompt: Prompt, tokenizer: FixClipTokenizer) -> dict[str, Any]:
    """What the exact checker says of a scene's pictures: each object's zone, and whether it is right."""
    assert prompt.scene is not None
    clean = tokenizer.clean(prompt.text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    zones = scenes.object_zones(scenes.annotate_caption(str(clean)), offsets, long_length=tokenizer.context_length)
    objects = []
    checks = scenes.check_batch(torch.stack([as_tensor(p) for p in pictures]), [prompt.scene] * len(pictures))
    for check in checks:
        objects += [
            {"zone": zones[v.place], "right": v.right, "shape": v.shape_right, "colour": v.colour_right}
            for v in check.objects
        ]
    return {"objects": objects, "background": [check.background_right for check in checks]}


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
