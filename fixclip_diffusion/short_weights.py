"""The base's own weights inside a trained text encoder, for texts that fit into 77 tokens.

Two kinds. A copy: the base's whole `CLIPTextModel` beside the trained one. A delta: the base's weights with a low-rank
change W + B A of each matrix and a longer table of positions, both left out for short texts; it takes a few MB and can
be shared without the base. Either way short texts have the base's hidden states bit for bit.

Shapes: B batch, T tokens, O outputs, I inputs, r rank, D width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from fixclip_core.check import refuse_stand_in

DELTA_FILE = "text_delta.safetensors"
POSITIONS = "text_model.embeddings.position_embedding.weight"
PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"), "mlp": ("fc1", "fc2")}


# -- a copy --------------------------------------------------------------------------------------------------------


class AddedTokenEmbedding(nn.Embedding):
    """The base's token embedding; tokens that were added later (textual inversion) are looked up in the trained one."""

    trained: list[nn.Embedding]  # in a list, so that it is no submodule

    def forward(self, ids_BT: Tensor) -> Tensor:
        known_BTD = super().forward(ids_BT.clamp(max=self.num_embeddings - 1))
        if self.trained[0].num_embeddings <= self.num_embeddings:
            return known_BTD
        return torch.where((ids_BT >= self.num_embeddings)[..., None], self.trained[0](ids_BT), known_BTD)


def make_short_model(config: dict[str, Any], trained: Any) -> CLIPTextModel:
    """The base's text model with fresh weights.

    Args:
        config: of the base's `CLIPTextModel`.
        trained: the trained encoder's `nn.Embedding` of tokens.
    """
    model = CLIPTextModel._from_config(CLIPTextConfig(**config))
    own = model.embeddings.token_embedding
    own.__class__ = AddedTokenEmbedding
    own.trained = [trained]
    return model


# -- a delta -------------------------------------------------------------------------------------------------------


class LongRows:
    """Which rows of the batch in work are long texts: True for a long one, (B, 1, 1); None: none is long."""

    mask: Tensor | None = None


class LowRankLinear(nn.Linear):
    """x W^T + bias, and for rows of long texts + x A^T B^T.

    Args:
        linear: the base's layer; its weights are taken over.
        rank: r.
        rows: tells which rows are long.
    """

    def __init__(self, linear: nn.Linear, rank: int, rows: LongRows):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_zeros(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.rows = rows

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = super().forward(x_BTI)
        if self.rows.mask is None:
            return y_BTO
        return y_BTO + F.linear(F.linear(x_BTI, self.lora_A), self.lora_B) * self.rows.mask


def add_low_rank(text_model: CLIPTextModel, rank: int, rows: LongRows) -> None:
    """Replace the matrices of every layer by `LowRankLinear`; their change is 0 until factors are loaded."""
    for _, parent, name in _projections(text_model):
        setattr(parent, name, LowRankLinear(getattr(parent, name), rank, rows))


def _projections(text_model: CLIPTextModel) -> Iterator[tuple[str, nn.Module, str]]:
    for number, layer in enumerate(text_model.encoder.layers):
        for module, names in PROJECTIONS.items():
            for name in names:
                yield f"text_model.encoder.layers.{number}.{module}.{name}", getattr(layer, module), name


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], int, int]:
    """The tensors of a delta, its rank, and how many of its first positions are the base's.

    Args:
        path: what `fixclip export --format delta` wrote: text_delta.safetensors or the folder with it.

    Raises:
        ValueError: there is no such file, it is damaged, or it is no delta.
    """
    path = Path(path)
    path = path / DELTA_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"delta {str(path)!r}: no such file; `fixclip export --format delta` writes {DELTA_FILE}")
    refuse_stand_in(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"delta {str(path)!r} is damaged: {error}") from error
    if metadata.get("fixclip") != "text_delta" or POSITIONS not in tensors:
        raise ValueError(f"delta {str(path)!r} is none: it is not what `fixclip export --format delta` writes")
    return tensors, int(metadata["rank"]), int(metadata["kept_positions"])


def check_delta(tensors: dict[str, Tensor], kept: int, text_model: CLIPTextModel) -> None:
    """Is this the delta of that base?

    Raises:
        ValueError: layers or widths differ, or its first positions, which training leaves as they are, are others.
    """
    wanted = {POSITIONS: (None, text_model.config.hidden_size)}
    for place, parent, name in _projections(text_model):
        linear = getattr(parent, name)
        wanted[f"{place}.lora_A.weight"] = (None, linear.in_features)
        wanted[f"{place}.lora_B.weight"] = (linear.out_features, None)
    problem = next(
        (
            name
            for name in sorted({*wanted, *tensors})
            if name not in wanted
            or name not in tensors
            or any(size not in (None, given) for size, given in zip(wanted[name], tensors[name].shape, strict=True))
        ),
        None,
    )
    if problem:
        raise ValueError(f"this delta belongs to a text encoder of another size: {problem} does not fit")
    base_KD = text_model.embeddings.position_embedding.weight[:kept].detach().float().cpu()
    if not torch.allclose(tensors[POSITIONS][:kept].float(), base_KD, atol=1e-3, rtol=1e-2):
        raise ValueError("this delta belongs to another base: its first positions are not this text encoder's")


def factors_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors under the names that they have in a `LowRankLinear`."""
    return {
        name.removeprefix("text_model.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if ".lora_" in name
    }
