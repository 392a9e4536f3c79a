"""What a FixClip model is made of: one frozen dataclass with a JSON round trip."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fixclip_core.check import check_tokenizer_options
from fixclip_core.model.positional import PositionStart, stretched_length

PromptFlow = Literal["carry", "replace"]
Masking = Literal["replace", "drop", "none"]
ShortBranch = Literal["masked", "pca", "off"]
HierarchyBranch = Literal["long", "short"]
# Which hidden states an image generator reads: Stable Diffusion 1 and 2 those behind the final LayerNorm, SDXL those
# before the last layer (`hidden_states[-2]`), without LayerNorm.
HiddenState = Literal["last", "penultimate"]


NUMBERS: dict[Any, tuple[Any, str]] = {int: (int, "a whole number"), float: ((int, float), "a number")}
# The least of what counts something.
LEAST = {"keep": 0, "ratio": 1, "lora_rank": 0, "num_prompts": 0, "pca_rank": 1, "num_groups": 0, "first_group": 1}


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What FIX-CLIP changes of its base: the fields that a recipe's `model` section and `FixClipConfig` share.

    Args:
        keep: text positions that are copied and stay frozen, whatever the others start as.
        ratio: rows made of each later position; the base's 77 become keep + (77 - keep) * ratio.
        positions: what the text positions start as: "stretched" as in the paper, or "kept": the base's rows as they are
            and copies of the last 35 behind them, as many rows as stretching makes.
        lora_rank: rank of the change of the text tower's matrices; all else of it stays the base's, except for the
            positions and the text projection. 0: every weight is trained.
        num_prompts: regional prompts M in each image layer; 0 turns them off.
        prompt_flow: "carry" adds a layer's fresh prompts to what the layer before made of its own,
            "replace" throws that away.
        short_branch: what the short caption meets: the "masked" image, the "pca" reconstruction of the
            batch's image features (Long-CLIP), or nothing ("off").
        masking: masked patches become a learnable vector ("replace") or leave the sequence ("drop");
            "none" shows the short caption the whole image.
        mask_ratio: share of patches that are masked.
        pca_rank: components that the PCA short branch keeps.
        num_groups: groups G of consecutive layers for hierarchical alignment; 0 turns it off.
        first_group: first group K, counted from 1, whose features are aligned; K..G count.
        hierarchy_branch: the branch whose layers are aligned.
    """

    keep: int = 20
    ratio: int = 4
    positions: PositionStart = "stretched"
    lora_rank: int = 0
    num_prompts: int = 4
    prompt_flow: PromptFlow = "carry"
    short_branch: ShortBranch = "masked"
    masking: Masking = "replace"
    mask_ratio: float = 0.75
    pca_rank: int = 32
    num_groups: int = 4
    first_group: int = 3
    hierarchy_branch: HierarchyBranch = "long"


def wrong_module(name: str, value: Any) -> str | None:
    """Why a field of `Modules` cannot have a value of the right type, None if it can; `FixClipConfig` asks for more."""
    if name in LEAST and value < LEAST[name]:
        return f"it must be at least {LEAST[name]}"
    if name == "mask_ratio" and not 0 < value < 1:
        return "it must lie between 0 and 1, both excluded"
    return None


@dataclass(frozen=True)
class FixClipConfig(Modules):
    """The model's shape and the modules that are on; training settings live in the recipe.

    Args:
        clip: open_clip's model configuration of the base (embed_dim, vision_cfg, text_cfg, quick_gelu).
        preprocess: open_clip's preprocessing (size, mean, std, interpolation, resize_mode).
        context_length: tokens the text tower reads; follows from keep and ratio, so it may be left out.

    Raises:
        ValueError: a value is out of its range; the message names it and what is valid.
    """

    clip: dict[str, Any]
    preprocess: dict[str, Any] = field(default_factory=dict)
    context_length: int | None = None

    def __post_init__(self) -> None:
        # JSON's own types, so that a configuration equals what is read back, and is nobody else's dict.
        for name in ("clip", "preprocess"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in self.clip]
        if missing:
            raise ValueError(f"clip={sorted(self.clip)}: open_clip's model configuration lacks {missing}")
        for key in ("hf_model_name", "timm_model_name"):
            if model := {**self.clip["vision_cfg"], **self.clip["text_cfg"]}.get(key):
                raise ValueError(f"unsupported base: {key}={model!r}; FixClip needs CLIP's own two transformers")
        check_tokenizer_options(self.clip["text_cfg"])
        for module in dataclasses.fields(Modules):
            value, valid = getattr(self, module.name), NUMBERS.get(module.type)
            if valid is not None and (isinstance(value, bool) or not isinstance(value, valid[0])):
                raise ValueError(f"{module.name}={value!r}: it must be {valid[1]}")
        length = stretched_length(self.base_context_length, self.keep, self.ratio)
        if self.context_length not in (None, length):
            raise ValueError(
                f"context_length={self.context_length}: {self.base_context_length} positions with "
                f"keep={self.keep} and ratio={self.ratio} make {length}"
            )
        object.__setattr__(self, "context_length", length)
        _check_choice("positions", self.positions, get_args(PositionStart))
        _check_choice("prompt_flow", self.prompt_flow, get_args(PromptFlow))
        _check_choice("short_branch", self.short_branch, get_args(ShortBranch))
        _check_choice("masking", self.masking, get_args(Masking))
        _check_choice("hierarchy_branch", self.hierarchy_branch, get_args(HierarchyBranch))
        for module in dataclasses.fields(Modules):
            value = getattr(self, module.name)
            if reason := wrong_module(module.name, value):
                raise ValueError(f"{module.name}={value}: {reason}")
        if self.num_groups and not 1 <= self.first_group <= self.num_groups:
            raise ValueError(f"first_group={self.first_group}: it must lie between 1 and {self.num_groups}")
        if self.num_groups and self.hierarchy_branch == "short" and not self.short_is_encoded:
            raise ValueError(
                f"hierarchy_branch=short: the short branch must run the image tower, but "
                f"short_branch={self.short_branch} and masking={self.masking}"
            )

    @property
    def base_context_length(self) -> int:
        """Text positions of the base model, 77 for CLIP."""
        return self.clip["text_cfg"].get("context_length", 77)

    @property
    def short_is_encoded(self) -> bool:
        """Whether the short branch needs an image pass of its own."""
        return self.short_branch == "masked" and self.masking != "none"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FixClipConfig":
        """The configuration of `to_dict`.

        Raises:
            ValueError: a key is unknown (the nearest valid one is named), missing or out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(names)}"
                raise ValueError(f"unknown key {key!r} in a FixClip configuration: {hint}")
        if "clip" not in values:
            raise ValueError("a FixClip configuration needs the key 'clip', open_clip's model configuration")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "FixClipConfig":
        return cls.from_dict(json.loads(text))


# Rivals as configurations of the same code.
LONG_CLIP: dict[str, Any] = {"num_prompts": 0, "num_groups": 0, "short_branch": "pca"}
FINE_TUNE: dict[str, Any] = {"num_prompts": 0, "num_groups": 0, "short_branch": "off"}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value}: it must be one of {', '.join(choices)}")
