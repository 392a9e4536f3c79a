"""Numbers for a CLIP: retrieval in both directions and zero-shot classification.

Shape letters: I images, T texts, E embedding width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# Cosines closer than this are one score: float32 matrix products of other block sizes differ by less.
TIE_TOLERANCE = 1e-6


@torch.no_grad()
def retrieval_metrics(
    image_features_IE: Tensor,
    text_features_TE: Tensor,
    text_to_image: Tensor | Sequence[int],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 4096,
    progress: bool = False,
) -> dict[str, float]:
    """Recall at k from images to texts and from texts to images, by cosine similarity.

    An image is found at rank 1 + (texts of other images that score at least as high as its best text), a text
    at rank 1 + (other images that score at least as high as its own). A tie thus counts against the match, so
    an encoder that maps everything to one point scores 0, not 1; scores within 1e-6 are ties. Images may have
    any number of texts, at least one each. Memory beyond the features is one block of chunk_size squared.

    Args:
        image_features_IE: (I, E) on any device; need not be normalised.
        text_features_TE: (T, E) on the same device.
        text_to_image: (T,) index of each text's image.
        ks: the ranks to report.
        chunk_size: rows and columns of a block of scores.
        progress: show a bar.

    Returns:
        "image_to_text_recall_at_K" and "text_to_image_recall_at_K" for every K, as fractions of 1.

    Raises:
        ValueError: shapes that do not fit, an index outside the images, an image without a text, or features
            that are not finite (their ranks would look perfect).
    """
    text_to_image_T = torch.as_tensor(text_to_image, device=image_features_IE.device)
    _check_retrieval_input(image_features_IE, text_features_TE, text_to_image_T)
    image_IE = F.normalize(image_features_IE.float(), dim=-1)
    text_TE = F.normalize(text_features_TE.float(), dim=-1)
    starts_T = range(0, len(text_TE), chunk_size)
    own_score_T = torch.cat(
        [
            (text_TE[s : s + chunk_size] * image_IE[text_to_image_T[s : s + chunk_size]]).sum(-1)
            for s in starts_T
        ]
    )
    best_score_I = own_score_T.new_full((len(image_IE),), -torch.inf)
    best_score_I.scatter_reduce_(0, text_to_image_T, own_score_T, "amax")

    rank_I = torch.ones(len(image_IE), dtype=torch.long, device=image_IE.device)
    rank_T = torch.ones(len(text_TE), dtype=torch.long, device=image_IE.device)
    for i in tqdm(range(0, len(image_IE), chunk_size), desc="ranking", disable=not progress):
        images = slice(i, i + chunk_size)
        index_I1 = torch.arange(i, min(i + chunk_size, len(image_IE)), device=image_IE.device)[:, None]
        for t in starts_T:
            texts = slice(t, t + chunk_size)
            score_IT = image_IE[images] @ text_TE[texts].T + TIE_TOLERANCE
            foreign_IT = text_to_image_T[texts] != index_I1
            rank_I[images] += ((score_IT >= best_score_I[images, None]) & foreign_IT).sum(1)
            rank_T[texts] += ((score_IT >= own_score_T[texts]) & foreign_IT).sum(0)
    return {
        f"{direction}_recall_at_{k}": (rank <= k).double().mean().item()
        for direction, rank in (("image_to_text", rank_I), ("text_to_image", rank_T))
        for k in ks
    }


def _check_retrieval_input(image_IE: Tensor, text_TE: Tensor, text_to_image_T: Tensor) -> None:
    if image_IE.ndim != 2 or text_TE.ndim != 2 or image_IE.shape[1] != text_TE.shape[1]:
        raise ValueError(
            f"features must be (images, width) and (texts, width) of one width, got {tuple(image_IE.shape)} "
            f"and {tuple(text_TE.shape)}"
        )
    if text_to_image_T.shape != text_TE.shape[:1] or text_to_image_T.is_floating_point():
        raise ValueError(f"text_to_image must be {len(text_TE)} whole numbers, one for each text")
    if len(image_IE) == 0 or len(text_TE) == 0:
        raise ValueError("retrieval needs at least one image and one text")
    if text_to_image_T.min() < 0 or text_to_image_T.max() >= len(image_IE):
        raise ValueError(f"text_to_image points outside the {len(image_IE)} images")
    counts_I = torch.bincount(text_to_image_T, minlength=len(image_IE))
    if (counts_I == 0).any():
        raise ValueError(f"image {int((counts_I == 0).nonzero()[0])} has no text")
    for name, features in (("image", image_IE), ("text", text_TE)):
        if not features.isfinite().all():
            raise ValueError(f"{name} features hold nan or inf")
