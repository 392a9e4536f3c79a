"""Long-CLIP's short branch: short captions meet what the principal components keep of the image features.

With the image features I (N, E) of all processes, their mean m and the `rank` right singular vectors V (rank, E) of
largest singular value of I - m:  I_short = normalise((I - m) V^T V + m)  (Long-CLIP, section 3.3).

Shapes: B samples of this process, N samples of all processes, E embedding, R components.
"""

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
    with torch.autocast(features_BE.device.type, enabled=False):
        features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
        all_NE = gather(features_BE)
        mean_E = all_NE.mean(dim=0)
        with torch.no_grad():
            components_RE = torch.linalg.svd(all_NE - mean_E, full_matrices=False).Vh[:rank]
        kept_BE = (features_BE - mean_E) @ components_RE.T @ components_RE + mean_E
        return F.normalize(kept_BE, dim=-1)
