"""Retrieval in both directions: recall at k, and a report that says under which protocol.

Shape letters: I images, T texts, E embedding width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fixclip_core.data.samples import Skipped
from fixclip_core.evaluation.encoders import Encoder, Precision, encode_images, encode_texts
from fixclip_core.evaluation.items import BenchmarkItems, Item, SourceItems
from fixclip_core.evaluation.report import skipped_report

# Cosines closer than this are one score: float32 matrix products of other block sizes differ by less.
TIE_TOLERANCE = 1e-6
TIE_RULE = "a tie counts against the match; cosines within 1e-6 are ties"


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
        [(text_TE[s : s + chunk_size] * image_IE[text_to_image_T[s : s + chunk_size]]).sum(-1) for s in starts_T]
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
            score_IT = (image_IE[images] @ text_TE[texts].T).add_(TIE_TOLERANCE)
            foreign_IT = text_to_image_T[texts] != index_I1
            rank_I[images] += ((score_IT >= best_score_I[images, None]) & foreign_IT).sum(1, dtype=torch.int32)
            rank_T[texts] += ((score_IT >= own_score_T[texts]) & foreign_IT).sum(0, dtype=torch.int32)
    return {
        f"{direction}_recall_at_{k}": (rank <= k).cpu().double().mean().item()
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


@dataclass
class Features:
    """Encoded images (I, E) and texts (T, E); `cut_texts` counts texts that fill the context, probably cut off."""

    image: Tensor
    text: Tensor
    text_to_image: list[int]
    cut_texts: int
    skipped: list[Skipped] = field(default_factory=list)


@torch.no_grad()
def encode_dataset(
    encoder: Encoder, items: Dataset[Item], *, batch_size: int = 64, workers: int = 0, precision: Precision = "fp32"
) -> Features:
    """Encode every image once and every caption.

    Raises:
        ValueError: no sample could be used.
    """
    index_of: dict[str, int] = {}
    texts: list[str] = []
    text_to_image: list[int] = []
    skipped: list[Skipped] = []
    features: list[Tensor] = []
    loader = DataLoader(items, batch_size, num_workers=workers, collate_fn=list)
    for batch in tqdm(loader, desc="images", unit="batch"):
        fresh = []
        for item in batch:
            if item.skipped is not None:
                skipped.append(item.skipped)
                continue
            if item.identity not in index_of:
                index_of[item.identity] = len(index_of)
                fresh.append(item.image)
            texts += item.captions
            text_to_image += [index_of[item.identity]] * len(item.captions)
        if fresh:
            features.append(encode_images(encoder, torch.stack(fresh), precision))
    if not features:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).items())
        raise ValueError(f"no sample could be used ({reasons or 'there are none'})")
    text_TE, cut_texts = encode_texts(encoder, texts, batch_size, precision)
    return Features(torch.cat(features), text_TE, text_to_image, cut_texts, skipped)


def retrieval_report(
    encoder: Encoder,
    items: SourceItems | BenchmarkItems,
    name: str,
    protocol: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Encode, rank, and say under which protocol: everything that a figure needs to be compared.

    Raises:
        ValueError: no sample could be used, or an image of a benchmark is damaged.
    """
    features = encode_dataset(encoder, items, batch_size=batch_size, workers=workers, precision=precision)
    if features.skipped and isinstance(items, BenchmarkItems):
        first = features.skipped[0]
        raise ValueError(
            f"{first.file}: {first.reason} {first.detail} ({len(features.skipped)} damaged images in {name}; a "
            "benchmark is evaluated whole or not at all)"
        )
    metrics = retrieval_metrics(features.image, features.text, features.text_to_image, progress=True)
    counts = Counter(Counter(features.text_to_image).values())
    return {
        "model": encoder.describe(),
        "data": {
            "name": name,
            "protocol": protocol,
            "images": len(features.image),
            "texts": len(features.text),
            "captions_per_image": sorted(counts),
            "texts_that_fill_the_context": features.cut_texts,
            "skipped": skipped_report(features.skipped),
        },
        "precision": precision,
        "tie_rule": TIE_RULE,
        "metrics": metrics,
    }
