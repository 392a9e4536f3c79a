"""The recipe of `train_adapter.py`: what `load_recipe` checks an adapter.yaml against."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fixclip_core.data.config import CaptionsSection, DataSection
from fixclip_core.section import Section
from fixclip_core.training.recipe import OptimSection, OutputSection, RunSection
from fixclip_diffusion.conditioning import ALIASES, CONDITIONINGS, Stock


class BaseSection(Section):
    """The Stable Diffusion to adapt to, and the text encoders to adapt."""

    base: str = Field(min_length=1, description="Stable Diffusion 1.x, 2.x or XL: folder, hub or built-in name")
    encoder: str | None = Field(
        default=None, description="text encoder: folder, hub or built-in name; null: the base's"
    )
    encoder_2: str | None = Field(default=None, description="Stable Diffusion XL: the second one, a ViT-bigG/14")
    conditioning: str | None = Field(
        default=None,
        description="how captions of more than 77 tokens are read: overlap, one_pass or chunks, see "
        "`fixclip_diffusion.conditioning`; null: as the encoder says. The adapter remembers it",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_old_name(cls, values: Any) -> Any:
        """`long_prompt` is the name of `conditioning` in recipes of version 0.1."""
        if isinstance(values, dict) and "long_prompt" in values:
            values = {**values, "conditioning": ALIASES.get(values["long_prompt"], values["long_prompt"])}
            del values["long_prompt"]
        return values

    @field_validator("conditioning")
    @classmethod
    def _check_conditioning(cls, name: str | None) -> str | None:
        longer = [other for other in CONDITIONINGS if other != Stock.name]
        if name is not None and name not in longer:  # version 0.1's "windows" was its name of one_pass
            raise ValueError(
                f"conditioning={name!r}: valid are {', '.join(longer)}, which read prompts of more than 77 tokens"
            )
        return name


class AdapterSection(Section):
    """The adapter; see `TextAdapter`."""

    kind: Literal["mlp", "attention"] = Field(
        default="mlp", description="mlp: each state for itself; attention: states of a pass see one another"
    )
    hidden_width: int = Field(default=0, ge=0, description="of the hidden layers; 0: 2 D for mlp, 4 D for attention")
    num_layers: int = Field(default=2, ge=1, description="residual layers")
    num_heads: int = Field(default=8, ge=1, description="of attention")
    mask_padding: bool = Field(default=True, description="attention leaves the padding behind a text out")
    scope: Literal["window", "text"] = Field(
        default="window", description="attention reads one window at a time, or the joined states of all: text"
    )
    rotary: bool = Field(default=False, description="attention depends on how far away a token stands, too")
    causal_heads: int = Field(default=0, ge=0, description="heads of attention that read what stands before alone")
    start_from: str | None = Field(default=None, description="adapter folder whose weights and sizes to go on from")
    transfer: bool = Field(
        default=False,
        description="start_from may belong to another text encoder, such as the one whose states this one was taught",
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.scope == "text" and self.start_from is None and not (self.kind == "attention" and self.mask_padding):
            yield (
                f"adapter.scope=text needs adapter.kind=attention and adapter.mask_padding=true, got kind={self.kind}, "
                f"mask_padding={str(self.mask_padding).lower()}; or set adapter.scope=window"
            )
        if self.transfer and self.start_from is None:
            yield "adapter.transfer=true needs an adapter to go on from: set adapter.start_from, or leave it out"
        if self.kind == "attention" and self.causal_heads > self.num_heads:
            yield f"adapter.causal_heads={self.causal_heads}: it must be at most adapter.num_heads={self.num_heads}"
        for name in ("num_heads", "mask_padding", "rotary", "causal_heads"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.kind == "mlp" and self.start_from is None and value != default:
                given, usual = str(value).lower(), str(default).lower()
                yield f"adapter.{name}={given} needs adapter.kind=attention, and kind is mlp; leave it at {usual}"


class LoraSection(Section):
    """LoRA on the query, key, value and output projections of the UNet's cross-attention."""

    rank: int = Field(default=0, ge=0, description="0: none, the UNet stays as it is")


class ObjectivesSection(Section):
    """What is minimised; every weight is that of a mean over the draws it speaks of. See the package `objectives`."""

    weight_long: float = Field(default=1.0, ge=0, description="noise prediction with long captions")
    weight_short: float = Field(default=0.0, ge=0, description="noise prediction with short captions")
    weight_prediction: float = Field(default=1.0, ge=0, description="short captions: the base's noise predictions")
    weight_states: float = Field(default=0.0, ge=0, description="short captions: the base encoder's text states")
    weight_windows: float = Field(
        default=0.0, ge=0, description="long captions: the base encoder's text states of their windows of 77 tokens"
    )
    weight_plain: float = Field(
        default=0.0,
        ge=0,
        description="captions with a plain wording: as weight_windows, of the tokens that windows misread",
    )
    short_share: float = Field(default=0.25, ge=0, lt=1, description="draws that read the short caption")
    caption_dropout: float = Field(default=0.1, ge=0, lt=1, description="draws that read no caption, for guidance")
    snr_gamma: float | None = Field(default=None, gt=0, description="min-SNR weighting, usually 5; null: none")
    noise_draws: int = Field(default=1, ge=1, description="noises and timesteps a sample and step")
    high_noise_share: float = Field(
        default=0.0, ge=0, le=1, description="draws taken from the noisiest 40 % of the timesteps; 0: uniform"
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for name in ("weight_short", "weight_prediction", "weight_states"):
            value = getattr(self, name)
            if not self.reads_short and value not in (0, type(self).model_fields[name].default):
                yield (
                    f"objectives.{name}={value:g} with short_share=0: no draw reads a short caption; set {name}=0, or "
                    "a share above 0"
                )

    @property
    def reads_short(self) -> bool:
        """Whether any draw reads the short caption."""
        return self.short_share > 0

    @property
    def reads_noise(self) -> bool:
        """Whether the UNet is needed."""
        return self.weight_long > 0 or (self.reads_short and self.weight_short + self.weight_prediction > 0)

    @property
    def reads_windows(self) -> bool:
        """Whether the base's own encoder reads the long captions too, in windows."""
        return self.weight_windows + self.weight_plain > 0

    @property
    def is_taught(self) -> bool:
        """Whether the base's own encoder is needed as a teacher of short captions."""
        return self.reads_short and self.weight_prediction + self.weight_states > 0


class CaptionedImagesSection(DataSection):
    """`DataSection` and how a picture is brought to the UNet's size."""

    resolution: int | None = Field(default=None, ge=8, multiple_of=8, description="pixels; null: the UNet's own")
    random_crop: bool = Field(default=False, description="cut out a random square instead of the middle one")
    flip: bool = Field(default=False, description="mirror half of the pictures; wrong where captions say left")


class FeaturesSection(Section):
    """The cache of latents and text states; see `features`."""

    folder: str | None = Field(default=None, min_length=1, description="null: encode at every step")
    text: bool = Field(
        default=False, description="cache text states too: 0.4 MB a caption at 248 x 768 in fp16, 1 MB for two encoders"
    )
    dtype: Literal["fp16", "fp32"] = Field(default="fp16", description="of what the cache holds")
    shard_size: int = Field(default=512, ge=1, description="samples a file")
    batch_size: int = Field(default=8, ge=1, description="samples encoded at a time")

    def contradictions(self) -> Iterator[str]:
        """With `folder: null`, said in so many words, the rest may stand: it is how a recipe's cache is turned off."""
        yield from super().contradictions()
        for name in sorted(self.model_fields_set):
            if "folder" not in self.model_fields_set and self.is_changed(name):
                yield (
                    f"features.{name}={str(getattr(self, name)).lower()} is of the cache of features, and there is "
                    f"none: set features.folder, or leave features.{name} out"
                )


class AdapterOptimSection(OptimSection):
    """`OptimSection` with the adapter's learning rates."""

    lr: float = Field(default=1e-4, ge=0, description="peak learning rate of the adapter; 0: it stays as it is")
    lr_new: float = Field(default=1e-4, gt=0, description="peak learning rate of the LoRA")


class AdapterRunSection(RunSection):
    """`RunSection` and how much of a batch is in memory at a time."""

    batch_size: int = Field(default=64, ge=1, description="samples a step over all processes")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="samples a pass in each process; below the batch: exact accumulation"
    )


class SamplesSection(Section):
    """Pictures of fixed prompts and seeds: stock | untuned | current side by side."""

    prompts: list[str] = Field(default_factory=list, description="none: no sheets")
    every: int = Field(default=1000, ge=1, description="steps between two sheets; the last step always has one")
    seed: int = Field(default=0, ge=0, description="of the noise, the same for all sheets")
    steps: int = Field(default=30, ge=1, le=999, description="denoising steps")
    guidance_scale: float = Field(default=7.5, ge=0, description="1 and less: no guidance")


class AdapterOutputSection(OutputSection):
    """`OutputSection` with a folder of its own."""

    folder: str = Field(default="runs/adapter", min_length=1, description="where the run writes, and resumes from")


class AdapterRecipe(Section):
    """Everything that `train_adapter.py` needs to know."""

    seed: int = Field(default=0, ge=0, description="of everything that is drawn: weights, order, captions, noise")
    model: BaseSection
    adapter: AdapterSection = AdapterSection()
    lora: LoraSection = LoraSection()
    objectives: ObjectivesSection = ObjectivesSection()
    data: CaptionedImagesSection
    captions: CaptionsSection = CaptionsSection()
    features: FeaturesSection = FeaturesSection()
    optim: AdapterOptimSection = AdapterOptimSection()
    train: AdapterRunSection = AdapterRunSection()
    samples: SamplesSection = SamplesSection()
    output: AdapterOutputSection = AdapterOutputSection()

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        train, objectives = self.train, self.objectives
        if self.captions.num_short > 1:
            yield f"captions.num_short={self.captions.num_short}: an adapter's training reads one at a time"
        if self.captions.pad_short:
            yield "captions.pad_short=true: an adapter's training would take that padding for text"
        if train.micro_batch_size and train.micro_batch_size > train.batch_size:
            yield (
                f"train.micro_batch_size={train.micro_batch_size}: it must be at most "
                f"train.batch_size={train.batch_size}, or null: the whole batch at a time"
            )
        weights = [objectives.weight_long, objectives.weight_windows, objectives.weight_plain]
        if objectives.short_share:
            weights += [objectives.weight_short, objectives.weight_prediction, objectives.weight_states]
        if not any(weights):
            yield "objectives: every weight that counts is 0, so there is nothing to learn"
        if self.lora.rank and not objectives.reads_noise:
            yield (
                f"lora.rank={self.lora.rank}: a LoRA learns from noise predictions, and every objectives.weight_long, "
                "weight_short and weight_prediction that counts is 0; set lora.rank=0"
            )
        if self.features.folder is not None:
            yield from self._cached_otherwise()

    def _cached_otherwise(self) -> Iterator[str]:
        data, captions = self.data, self.captions
        if not self.features.text and not self.objectives.reads_noise:
            yield (
                "features.text=false: the cache would hold latents alone, which nothing reads, as the objectives have "
                "no noise predictions; set it to true, or features.folder to null"
            )
        for name in ("random_crop", "flip"):
            if getattr(data, name):
                yield (
                    f"data.{name}=true: a cache of features holds one view of a picture; set it to false, or "
                    "features.folder to null"
                )
        if self.features.text and captions.short_caption not in ("given", "first_sentence"):
            yield (
                f"features.text: a cache holds one short caption a picture, captions.short_caption="
                f"{captions.short_caption} draws new ones; set it to given or first_sentence, or features.text=false"
            )
