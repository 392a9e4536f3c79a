"""What the principal components of a batch keep of its features: Long-CLIP's short branch, HiMo-CLIP's decomposition.

Long-CLIP's short captions meet what few components keep of the image features. With the image features I (N, E) of all
processes, their mean m and the `rank` right singular vectors V (rank, E) of largest singular value of I - m:
I_short = normalise((I - m) V^T V + m)  (Long-CLIP, section 3.3). HiMo-CLIP's images meet the same of the long captions'
features, with as many components as hold a share of their variance (HiMo-CLIP, arXiv 2511.06653): for the long
captions' features T (N, E) of mean m, T_himo = normalise((T - m) V^T V + m), with the fewest rows of V whose squared
singular values sum up to 0.9 of all.

Where this leaves HiMo-CLIP's published code (github.com/UnicomAI/HiMo-CLIP, `model/model_himo.py`), and why:

- It does not normalise (T - m) V^T V + m. We do, as Long-CLIP does: both losses then hold cosines, which the one logit
  scale was trained for, and a caption of which little is kept does not get smaller logits for that.
- Its gradient goes through V. Ours takes V as constant: the gradient of singular vectors has the factors
  1 / (s_i^2 - s_j^2), which grow without bound where two variances come close to each other.
- Its function's default share of the variance is 0.85, and its training script passes 0.9, which is our default.
- It takes the components of each GPU's own batch, ours are those of the batch of all processes, so that the loss does
  not depend on how samples are spread over GPUs and micro-batches.
- It smooths labels by 0.1; here that is `train.label_smoothing`, 0 by default.

Shapes: B samples of this process, N samples of all processes, E embedding, R components.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fixclip_core.training.encoder.losses.contrastive import gather


def pca_reconstruction(features_BE: Tensor, rank: int) -> Tensor:
    """What the principal components of the batch of all processes keep of each feature (Long-CLIP).

    Features are centred, projected on the `rank` components of largest variance, projected back, and the mean is
    added again. The components count as constants: their own gradient is undefined where variances coincide,
    which they always do when a batch is smaller than the embedding.

    Args:
        features_BE: this process's image features, (B, E).
        rank: components to keep; with rank >= N - 1 nothing is lost.

    Returns:
        The reconstructions, (B, E), normalised.

    Raises:
        ValueError: rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: it must be at least 1")
    return _reconstruct(features_BE, lambda variance_C: rank)


def variance_reconstruction(features_BE: Tensor, share: float) -> Tensor:
    """As `pca_reconstruction` with the fewest components that hold `share` of the variance, e.g. 0.9 (HiMo-CLIP).

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: it must be above 0 and at most 1")

    def fewest(variance_C: Tensor) -> int:
        variance_C = variance_C.cpu().double()  # some GPUs have no float64
        held_C = variance_C.cumsum(0) / variance_C.sum()
        return int((held_C < share - 1e-9).sum()) + 1

    return _reconstruct(features_BE, fewest)


def _reconstruct(features_BE: Tensor, choose_rank: Callable[[Tensor], int]) -> Tensor:
    """`choose_rank` gets the variances of the components in descending order, times the number of samples."""
    with torch.autocast(features_BE.device.type, enabled=False):
        features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
        all_NE = gather(features_BE)
        mean_E = all_NE.mean(dim=0)
        with torch.no_grad():
            centred_NE = all_NE - mean_E
            # torch.linalg.svd raises at what is not finite. The mean of all samples, added below, is not finite then
            # either, so that the loss is NaN in every process and the step is skipped.
            centred_NE = torch.where(centred_NE.isfinite(), centred_NE, 0)
            _, singular_C, components_CE = torch.linalg.svd(centred_NE, full_matrices=False)
            components_RE = components_CE[: choose_rank(singular_C.square())]
        kept_BE = (features_BE - mean_E) @ components_RE.T @ components_RE + mean_E
        return F.normalize(kept_BE, dim=-1)
