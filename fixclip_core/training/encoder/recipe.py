"""The recipe of the encoder's training: what `load_recipe` checks an encoder.yaml against."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from fixclip_core.data.config import CaptionsSection, DataSection, SourceSection
from fixclip_core.model.config import HiddenState, Modules, wrong_module
from fixclip_core.section import Section
from fixclip_core.training.recipe import OptimSection, OutputSection, RunSection


class ModelSection(Section, Modules):  # type: ignore[misc]  # a Section is frozen, too
    """The base CLIP, and FIX-CLIP's modules as `Modules` describes them."""

    name: str = Field(min_length=1, description="open_clip's model name, hf-hub:..., or weights on disk")
    pretrained: str | None = Field(default=None, description="open_clip's tag or a weights file; null: random weights")
    cache_dir: str | None = Field(default=None, description="where open_clip keeps downloads; null: its own folder")

    @field_validator("short_branch", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # which YAML reads `off` as

    @field_validator("*")
    @classmethod
    def _check_module(cls, value: Any, info: ValidationInfo) -> Any:
        if reason := wrong_module(str(info.field_name), value):
            raise PydanticCustomError("module", "{reason}", {"reason": reason})
        return value


class TrainSection(RunSection):
    """`RunSection` and what belongs to the contrastive step."""

    micro_batch_size: int | None = Field(
        default=None, ge=1, description="samples a pass in each process; below the batch: exact GradCache"
    )
    text_pieces: int = Field(
        default=8, ge=1, description="pieces of like lengths a batch's texts are read in: more calls, less padding"
    )
    loss_chunk_size: int | None = Field(default=None, ge=1, description="rows of the loss computed at a time")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the contrastive losses")
    weight_long: float = Field(default=1.0, ge=0, description="of the long branch's loss")
    weight_short: float = Field(default=1.0, ge=0, description="of the short branch's loss")
    weight_mid: list[float] = Field(
        default_factory=lambda: [1.0],
        min_length=1,
        description="of hierarchical alignment: one for all groups K..G, or one each",
    )
    weight_himo: float = Field(
        default=0.0, ge=0, description="of the image against the long caption's principal components; 0: off"
    )
    himo_variance: float = Field(default=0.9, gt=0, le=1, description="share of variance that the components hold")
    weight_states: float = Field(
        default=0.0, ge=0, description="of the hidden states' distance to the base's windows; 0: off"
    )
    weight_plain: float = Field(
        default=0.0,
        ge=0,
        description="of that distance at the tokens that windows misread, by captions' plain wordings; 0: off",
    )
    align_state: HiddenState = Field(
        default="last", description="the hidden states that are aligned; SDXL: penultimate"
    )


class EvalSection(SourceSection):
    """Retrieval on held-out pairs during training; the mean of both R@1 chooses the best model."""

    source: str | None = Field(  # type: ignore[assignment]
        default=None, min_length=1, description="as data.source; null: no evaluation"
    )
    held_out: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="in place of a source: share of the data, its first samples, at most 1000, that is not trained on",
    )
    short_caption: Literal["given", "first_sentence"] | None = Field(
        default=None,
        description="to retrieve by: the data's own, or the long one's first sentence; null: given where the training "
        "takes those, else first_sentence",
    )
    every: int = Field(default=1000, ge=1, description="steps between two evaluations; the last step always has one")
    batch_size: int = Field(default=64, ge=1, description="samples a pass in each process")


class EncoderRecipe(Section):
    """Everything that `train_encoder.py` needs to know.

    `method` longclip or finetune turns this recipe into that baseline: it switches off FIX-CLIP's modules
    whatever the model section says, and leaves all else as it is.
    """

    method: Literal["fixclip", "longclip", "finetune"] = Field(
        default="fixclip", description="longclip and finetune are baselines, whatever the model section says"
    )
    seed: int = Field(default=0, ge=0, description="of everything that is drawn: weights, order, captions, masks")
    model: ModelSection
    data: DataSection
    captions: CaptionsSection = CaptionsSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from self._idle_short_captions()
        train, model = self.train, self.model
        if self.eval.held_out is not None and self.eval.source is not None:
            yield f"eval.held_out={self.eval.held_out}: it is a share of the data; set eval.source=null"
        if train.align_state != "last" and not train.weight_states:
            yield f"train.align_state={train.align_state}: it is a part of state alignment; set weight_states"
        if train.weight_plain and not train.weight_states:
            yield f"train.weight_plain={train.weight_plain}: it is a part of state alignment; set weight_states"
        if not train.weight_himo and train.is_changed("himo_variance"):
            yield f"train.himo_variance={train.himo_variance}: it is a part of HiMo-CLIP's loss; set weight_himo"
        aligned = model.num_groups - model.first_group + 1
        if self.method == "fixclip" and model.num_groups and aligned < 1:
            yield f"model.first_group={model.first_group}: it must lie between 1 and {model.num_groups}"
        if self.method == "fixclip" and model.num_groups and len(train.weight_mid) not in (1, aligned):
            yield (
                f"train.weight_mid={train.weight_mid}: give 1 weight, or {aligned} for groups "
                f"{model.first_group}..{model.num_groups}"
            )
        if train.micro_batch_size and train.micro_batch_size > train.batch_size:
            yield (
                f"train.micro_batch_size={train.micro_batch_size}: it must be at most "
                f"train.batch_size={train.batch_size}, or null: the whole batch at a time"
            )

    def _idle_short_captions(self) -> Iterator[str]:
        captions, states = self.captions, self.train.weight_states
        if captions.num_short > 1 and states:
            yield f"captions.num_short={captions.num_short}: state alignment reads one short caption"
        if captions.pad_short and states:
            yield "captions.pad_short=true: state alignment would take this padding for text; set it to false"
        off = self.method == "finetune" or (self.method == "fixclip" and self.model.short_branch == "off")
        if not off or states:
            return
        # Where the short caption's sentences are left out of the long one, their choice acts on that.
        idle = {
            "num_short": captions.num_short > 1,
            "pad_short": captions.pad_short,
            "short_caption": captions.short_caption == "debiased" and not captions.drop_short_from_long,
        }
        why = "method=finetune" if self.method == "finetune" else "model.short_branch=off"
        for name, is_set in idle.items():
            if is_set:
                yield (
                    f"captions.{name}={getattr(captions, name)}: {why} reads no short caption, so it would not act; "
                    "leave it out, or choose another method or short branch"
                )
