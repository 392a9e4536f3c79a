"""The text tower: more positions than the base's, whose first rows are frozen, and no work on padding.

Causal text never reads what follows it, and nothing after the end-of-text token is read, so a batch may be cut
to its longest text and split into pieces of similar length: exact, and captions of 120 tokens no longer cost 248.

Shapes: B texts, T tokens, D width, E embedding, P positions, L layers.
"""

import copy
from contextlib import nullcontext
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from fixclip_core.model.attention import attend
from fixclip_core.model.config import HiddenState
from fixclip_core.model.image_tower import Block, as_transformer, run_block, unsupported_block
from fixclip_core.model.lora import MATRICES, add_low_rank, changed_once, without_low_rank
from fixclip_core.model.positional import PositionStart, start_positions


class TextBlock(Block):
    """One causal text layer."""

    def forward(self, x_BTD: Tensor, last_B: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x_BTD: tokens, (B, T, D).
            last_B: compute the token at this index of each text alone, which is all that anybody reads of the
                last layer.

        Returns:
            (B, T, D), or (B, 1, D) with `last_B`.
        """
        normed_BTD = self.ln_1(x_BTD)
        if last_B is None:
            q, k, v = self.heads(normed_BTD)
            return self.finish(x_BTD, attend(q, k, v, is_causal=True))
        rows_B = torch.arange(len(last_B), device=last_B.device)
        q, k, v = self.heads_of_one(normed_BTD[rows_B, last_B].unsqueeze(1), normed_BTD)
        past_BT = torch.arange(x_BTD.shape[1], device=last_B.device) <= last_B[:, None]
        read = attend(q, k, v, attn_mask=past_BT[:, None, None])
        return self.finish(x_BTD[rows_B, last_B].unsqueeze(1), read)


class TextTower(nn.Module):
    """open_clip's causal text transformer with stretched (or continued) positions.

    Parameters of the base keep open_clip's names, except that `positional_embedding` becomes the buffer
    `kept_positions` (keep, D), which no optimiser can move, and the parameter `stretched_positions`.

    Args:
        text: an open_clip CLIP or TextTransformer; its modules are taken over, not copied.
        keep: positions that are copied and frozen.
        ratio: rows made of each later position.
        start: what the positions begin as, see `positional.start_positions`.
        lora_rank: rank of the change of each matrix (`model.lora`), beside which the base's weights stay as they are;
            its positions are then kept as the buffer `base_positions`. 0: the base's weights are trained.
        pieces: length-sorted pieces a batch is split into. A fixed number, because sharded training needs
            every process to call the layers equally often.

    Raises:
        ValueError: the tower is not a causal transformer read at its end-of-text token.
    """

    kept_positions: Tensor
    base_positions: Tensor | None

    def __init__(
        self,
        text: Any,
        keep: int,
        ratio: int,
        start: PositionStart = "stretched",
        lora_rank: int = 0,
        pieces: int = 8,
    ):
        super().__init__()
        self.token_embedding, self.ln_final = text.token_embedding, text.ln_final
        self.text_projection = text.text_projection
        self.transformer = as_transformer(TextBlock(block) for block in text.transformer.resblocks)
        positions_PD = start_positions(text.positional_embedding.detach(), start, keep, ratio)
        self.register_buffer("kept_positions", positions_PD[:keep].clone())
        self.stretched_positions = nn.Parameter(positions_PD[keep:].clone())
        self.pool_type = getattr(text, "text_pool_type", None) or text.pool_type
        self.eos_id = text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id
        self.pieces = pieces
        self.grad_checkpointing = False
        self.register_buffer("base_positions", None)
        if lora_rank:
            self.base_positions = text.positional_embedding.detach().clone()
            self.token_embedding.requires_grad_(False)
            self.ln_final.requires_grad_(False)
            add_low_rank(self.blocks, lora_rank)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.transformer["resblocks"])

    @property
    def context_length(self) -> int:
        return len(self.kept_positions) + len(self.stretched_positions)

    def positions(self) -> Tensor:
        """All positions, (P, D); a gradient reaches the stretched rows only."""
        return torch.cat([self.kept_positions, self.stretched_positions])

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Weights under open_clip's names, low-rank changes merged, with one table of positions."""
        merged = {
            f"transformer.resblocks.{layer}.{path}.{name}": getattr(block.get_submodule(path), name).detach()
            for layer, block in enumerate(self.blocks)
            for path, name, _ in MATRICES
        }
        own = ("kept_positions", "stretched_positions", "base_positions")
        weights = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name not in own and ".parametrizations." not in name
        }
        return weights | merged | {"positional_embedding": self.positions().detach()}

    def base(self, rows: list[int]) -> "TextTower":
        """A frozen copy at the base's own positions; low-rank changes are left out.

        Args:
            rows: where the base's positions stand among this tower's, unless it keeps them apart.
        """
        with without_low_rank(self.blocks):
            tower = copy.deepcopy(self)
        apart, tower.base_positions = tower.base_positions, None
        positions_PD = self.positions().detach()[rows] if apart is None else apart
        tower.kept_positions, tower.stretched_positions = positions_PD, nn.Parameter(positions_PD[:0])
        return tower.requires_grad_(False).eval()

    def last_token(self, ids_BT: Tensor) -> Tensor:
        """Index of the end-of-text token that the feature is read from, (B,)."""
        if self.pool_type == "argmax":
            return ids_BT.argmax(dim=-1)
        return (ids_BT == self.eos_id).int().argmax(dim=-1)

    def encode(self, ids_BT: Tensor, first_layer: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run the layers on a batch of texts of any lengths.

        Args:
            ids_BT: token ids, (B, T), T up to the context length.
            first_layer: collect the end-of-text token after each layer from this one on, counted from 0.

        Returns:
            The projected feature, (B, E), not normalised, and the collected tokens, (B, D) each.

        Raises:
            ValueError: there are no texts, they are longer than the context, or not a matrix of ids.
        """
        feature_BE, tokens, _ = self.encode_states(ids_BT, None, first_layer)
        return feature_BE, tokens

    def encode_states(
        self, ids_BT: Tensor, state: HiddenState | None, first_layer: int | None = None
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
        """As `encode`, and the hidden states of each text's tokens from the same pass.

        Args:
            ids_BT: token ids, (B, T).
            state: which hidden states; None: none, and the last layer is computed at the end-of-text tokens alone.
            first_layer: as in `encode`.

        Returns:
            Feature and collected tokens as `encode` gives them, and for each text a matrix (its tokens, D): start
            token included, end-of-text token and padding left out. Empty without `state`.

        Raises:
            ValueError: see `encode`, or there is no such state.
        """
        if state not in (None, *get_args(HiddenState)):
            raise ValueError(f"hidden state {state!r}: it must be one of {', '.join(get_args(HiddenState))}")
        if ids_BT.ndim != 2 or 0 in ids_BT.shape or ids_BT.shape[1] > self.context_length:
            raise ValueError(
                f"token ids of shape {tuple(ids_BT.shape)}: the text tower reads (texts, tokens) with at most "
                f"{self.context_length} tokens"
            )
        last_B = self.last_token(ids_BT)
        lengths_B, order_B = (last_B + 1).sort(stable=True)
        lengths = lengths_B.tolist()
        bounds = piece_bounds(lengths, self.pieces)
        pieces = [ids_BT[order_B[start:stop], : lengths[stop - 1]] for start, stop in bounds]
        # A checkpointed layer makes its matrices again by itself, and keeps none.
        keeps_matrices = torch.is_grad_enabled() and not self.grad_checkpointing
        with changed_once(self.blocks) if keeps_matrices else nullcontext():
            outputs = [
                self._encode_piece(x_BTD, last_B[order_B[start:stop]], first_layer, state)
                for x_BTD, (start, stop) in zip(self._embed(pieces), bounds, strict=True)
            ]
        features, collected, states = zip(*outputs, strict=True)
        restore_B = order_B.argsort()
        tokens = [torch.cat(pieces_BD)[restore_B] for pieces_BD in zip(*collected, strict=True)]
        if state is None:
            return torch.cat(features)[restore_B], tokens, ()
        by_length = torch.cat(states).split([length - 1 for length in lengths])
        return torch.cat(features)[restore_B], tokens, tuple(by_length[index] for index in restore_B.tolist())

    def _embed(self, pieces: list[Tensor]) -> list[Tensor]:
        """Embedded tokens with positions, (B, T, D) for each (B, T)."""
        # One look-up for all, because each makes a gradient of the whole vocabulary's size.
        tokens = self.token_embedding(torch.cat([ids_BT.flatten() for ids_BT in pieces]))
        tokens = tokens.split([ids_BT.numel() for ids_BT in pieces])
        positions_PD = self.positions()
        return [
            token.unflatten(0, ids_BT.shape) + positions_PD[: ids_BT.shape[1]]
            for token, ids_BT in zip(tokens, pieces, strict=True)
        ]

    def _encode_piece(
        self, x_BTD: Tensor, last_B: Tensor, first_layer: int | None, state: HiddenState | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        rows_B = torch.arange(len(last_B), device=last_B.device)
        collected = []
        states_BTD = None
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            if last and state == "penultimate":
                states_BTD = x_BTD
            only_end = last and state != "last"
            x_BTD = run_block(block, self.grad_checkpointing, x_BTD, last_B if only_end else None)
            if first_layer is not None and layer >= first_layer:
                collected.append(x_BTD[:, 0] if only_end else x_BTD[rows_B, last_B])
        normed_BTD = self.ln_final(x_BTD)
        if state == "last":
            states_BTD = normed_BTD
        feature_BE = self._project(normed_BTD[rows_B, last_B] if state == "last" else normed_BTD[:, 0])
        return feature_BE, collected, None if states_BTD is None else before_end(states_BTD, last_B)

    def _project(self, token_BD: Tensor) -> Tensor:
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(token_BD)
        return token_BD if self.text_projection is None else token_BD @ self.text_projection


def before_end(states_BTD: Tensor, last_B: Tensor) -> Tensor:
    """States (S, D) of the tokens before each text's end-of-text token, text after text; S is the sum of last_B."""
    return states_BTD[torch.arange(states_BTD.shape[1], device=last_B.device) < last_B[:, None]]


def piece_bounds(sorted_lengths: list[int], pieces: int, candidates: int = 64) -> list[tuple[int, int]]:
    """Cut ascending lengths into `pieces` runs that pad least (fewer only where there are fewer texts).

    A piece of n texts costs n times its longest. Dynamic programming over at most `candidates` places to cut.

    Returns:
        (start, stop) of each piece.
    """
    total = len(sorted_lengths)
    pieces = min(pieces, total)
    steps = max(min(candidates, total), pieces)
    cuts = [round(i * total / steps) for i in range(steps + 1)]
    # cost[i]: least padded tokens of the first cuts[i] texts in the pieces so far; back[p][i]: where piece p starts.
    cost = [0.0] + [float("inf")] * steps
    back = []
    for _ in range(pieces):
        choices = [
            min(((cost[j] + (cuts[i] - cuts[j]) * sorted_lengths[cuts[i] - 1], j) for j in range(i)), default=None)
            for i in range(steps + 1)
        ]
        cost = [choice[0] if choice else float("inf") for choice in choices]
        back.append([choice[1] if choice else 0 for choice in choices])
    bounds: list[tuple[int, int]] = []
    stop = steps
    for starts in reversed(back):
        bounds.append((cuts[starts[stop]], cuts[stop]))
        stop = starts[stop]
    return bounds[::-1]


def check_text_tower(text: Any) -> None:
    """Raise one clear ValueError where the tower is not a causal transformer read at its end-of-text token."""
    kind = type(text).__name__
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    pool_type = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    reason = None
    if not blocks or not hasattr(text, "positional_embedding"):
        reason = f"it is a {kind}"
    elif getattr(text, "attn_mask", None) is None:
        reason = "it is not causal"
    elif getattr(text, "cls_emb", None) is not None:
        reason = "it appends a CLS token"
    elif pool_type not in ("argmax", "eos"):
        reason = f"it pools by {pool_type!r} instead of reading the end-of-text token"
    else:
        reason = unsupported_block(blocks[0])
    if reason:
        raise ValueError(
            f"unsupported text tower: {reason}. FixClip needs CLIP's causal text transformer, not a Hugging Face, "
            "CLIPA, CoCa or SigLIP one"
        )
