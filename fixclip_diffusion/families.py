"""What differs between base families: which text encoders a UNet reads, and which of their hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from fixclip_diffusion.conditioning import Context
from fixclip_diffusion.prompt_tokens import context_of
from fixclip_diffusion.tokenizer import FixClipTokenizer

Output = Literal["last", "penultimate"]


@dataclass(frozen=True)
class Tower:
    """Where a base keeps one of its text encoders, and what its UNet reads of it.

    Attributes:
        encoder, tokenizer: names of the pipeline's components.
        output: "last" is the last hidden state behind the final LayerNorm, "penultimate" the hidden state that enters
            the last layer, without LayerNorm.
        pooled: whether the UNet reads its projected end-of-text state too.
    """

    encoder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    output: Output = "last"
    pooled: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of base model; hidden states of its towers are joined along the feature axis."""

    name: str
    towers: tuple[Tower, ...]


STABLE_DIFFUSION = Family("Stable Diffusion 1.x or 2.x", (Tower(),))
STABLE_DIFFUSION_XL = Family(
    "Stable Diffusion XL",
    (
        Tower("text_encoder", "tokenizer", "penultimate"),
        Tower("text_encoder_2", "tokenizer_2", "penultimate", pooled=True),
    ),
)
REFINER = Family("Stable Diffusion XL refiner", (Tower("text_encoder_2", "tokenizer_2", "penultimate", pooled=True),))


@dataclass(frozen=True)
class TextEncoding:
    """A tower with its modules in memory."""

    encoder: Any
    tokenizer: FixClipTokenizer
    tower: Tower = Tower()

    @property
    def context(self) -> Context:
        return context_of(self.encoder, self.tokenizer)

    def __call__(
        self, ids_NP: Tensor, mask_NP: Tensor | None = None, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (N, P) to the hidden states (N, P, D) that the UNet reads, and pooled states (N, E) or None.

        Args:
            ids_NP: padded ids.
            mask_NP: 0 hides a position from attention; None hides none.
            clip_skip: layers left out behind the state that is read otherwise, as diffusers counts them.

        Raises:
            ValueError: the encoder has not that many layers.
        """
        self.check_clip_skip(clip_skip)
        is_plain = self.tower.output == "last" and clip_skip is None
        place = -((clip_skip or 0) + 2)
        with self.encoder.laid_out(place):
            output = self.encoder(ids_NP, attention_mask=mask_NP, output_hidden_states=not is_plain)
        if is_plain:
            return output.last_hidden_state, None
        if self.tower.output == "last":
            hidden_NPD = output.hidden_states[-((clip_skip or 0) + 1)]
            return self.encoder.text_model.final_layer_norm(hidden_NPD), None
        return output.hidden_states[place], output[0] if self.tower.pooled else None

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Raises:
        ValueError: there are not that many layers to skip; of "penultimate" the last one is left out in any case.
        """
        num_layers = self.encoder.config.num_hidden_layers - (self.tower.output == "penultimate")
        if clip_skip is not None and not 0 <= clip_skip <= num_layers:
            raise ValueError(f"clip_skip={clip_skip}: this text encoder has {num_layers} layers to skip")


@contextmanager
def lora_scale_of(encoders: list[Any], scale: float | None) -> Iterator[None]:
    """LoRA layers of text encoders at `scale` while the block runs."""
    for encoder in encoders if scale is not None else ():
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders if scale is not None else ():
            unscale_lora_layers(encoder, scale)
