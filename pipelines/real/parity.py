"""Layer by layer: are weights in our classes what they are in the libraries that published them?

Each comparison gives a row a layer: the largest difference of the hidden states (B, T, D), and the largest state, by
which it is to be judged.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.weights.load import build_clip, load_fixclip
from fixclip_core.weights.read import read_clip
from fixclip_diffusion import FixClipTextEncoder, FixClipTextEncoderWithProjection

LIMIT = 1e-4  # of the largest state, in float32
WINDOW = 77
LONG = 248


@dataclass(frozen=True)
class Row:
    """One layer: what was compared, the layer, the largest difference and the largest state."""

    what: str
    layer: str
    difference: float
    largest: float

    @property
    def is_right(self) -> bool:
        return self.difference <= LIMIT * self.largest


def rows(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], last: str = "features") -> list[Row]:
    """A row a layer; the last entry of both sequences is the projected feature.

    Raises:
        ValueError: another number of layers, or of states.
    """
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        raise ValueError(f"{what}: shapes {[tuple(x.shape) for x in ours]} and {[tuple(x.shape) for x in theirs]}")
    names = [*(str(layer) for layer in range(len(ours) - 1)), last]
    return [
        Row(what, name, (a.double() - b.double()).abs().max().item(), b.abs().max().item())
        for name, a, b in zip(names, ours, theirs, strict=True)
    ]


@contextmanager
def outputs_of(blocks: nn.ModuleList) -> Any:
    """Collects what each layer returns."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, inputs, output: found.append(output)) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def transformers_states(model: CLIPModel, ids_BT: Tensor, pixels_BCHW: Tensor) -> dict[str, list[Tensor]]:
    """Hidden states of all layers and the feature, of texts and images."""
    text = model.text_model(input_ids=ids_BT, output_hidden_states=True)
    image = model.vision_model(pixel_values=pixels_BCHW, output_hidden_states=True)
    return {
        "text": [*text.hidden_states[1:], model.text_projection(text.pooler_output)],
        "image": [*image.hidden_states[1:], model.visual_projection(image.pooler_output)],
    }


@torch.no_grad()
def clip_parity(folder: Path, texts: Sequence[str], images: Sequence[Image.Image], device: str) -> list[Row]:
    """OpenAI's CLIP: transformers against open_clip's layers as we read them, and against our own towers."""
    theirs = CLIPModel.from_pretrained(folder, attn_implementation="eager").to(device).eval()
    checkpoint = read_clip(folder)
    clip = build_clip(checkpoint).to(device).eval()
    fixclip = load_fixclip(folder, num_prompts=0, num_groups=0, short_branch="off", positions="kept").to(device).eval()
    ids_BT = SimpleTokenizer(context_length=WINDOW)(list(texts)).to(device)
    transform = fixclip.preprocess(train=False)
    pixels_BCHW = torch.stack([transform(image) for image in images]).to(device)
    wanted = transformers_states(theirs, ids_BT, pixels_BCHW)

    with outputs_of(clip.transformer.resblocks) as found:
        feature_BE = clip.encode_text(ids_BT)
    result = rows("CLIP text: open_clip's layers", [*found, feature_BE], wanted["text"])
    with outputs_of(clip.visual.transformer.resblocks) as found:
        feature_BE = clip.encode_image(pixels_BCHW)
    result += rows("CLIP image: open_clip's layers", [*found, feature_BE], wanted["image"])

    rows_B = torch.arange(len(ids_BT), device=device)
    ends = [states[rows_B, ids_BT.argmax(dim=-1)] for states in wanted["text"][:-1]]
    feature_BE, tokens = fixclip.text.encode(ids_BT, first_layer=0)
    result += rows("CLIP text: FixClip's tower, end-of-text token", [*tokens, feature_BE], [*ends, wanted["text"][-1]])
    classes = [states[:, 0] for states in wanted["image"][:-1]]
    x_BTD = fixclip.visual.sequence(fixclip.visual.patch_tokens(pixels_BCHW))
    feature_BE, tokens = fixclip.visual.encode(x_BTD, first_layer=0)
    result += rows("CLIP image: FixClip's tower, CLS token", [*tokens, feature_BE], [*classes, wanted["image"][-1]])
    return result


@torch.no_grad()
def long_clip_parity(file: Path, texts: Sequence[str], device: str) -> list[Row]:
    """A Long-CLIP's text tower in open_clip's layers, as we read the .pt file, and in the diffusers component."""
    clip = build_clip(read_clip(file)).to(device).eval()
    encoder = FixClipTextEncoder.from_file(file).to(device).eval()
    fixclip = load_fixclip(file, num_prompts=0, num_groups=0, short_branch="off")
    ids_BT = fixclip.tokenizer()(list(texts)).to(device)
    with outputs_of(clip.transformer.resblocks) as found:
        clip.encode_text(ids_BT)
        final_BTD = clip.ln_final(found[-1])
    states = encoder(input_ids=ids_BT, output_hidden_states=True)
    return rows(
        f"Long-CLIP text, {LONG} tokens: the diffusers component",
        [*states.hidden_states[1:], states.last_hidden_state],
        [*found, final_BTD],
        last="after the final LayerNorm",
    )


@torch.no_grad()
def component_parity(
    model: str, folder: Path, name: str, tokenizer: Any, texts: Sequence[str], device: str
) -> list[Row]:
    """A base's own text encoder against the FixClip component made of it, for texts that fit into 77 tokens."""
    stock: Callable[..., Any] = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
    ours: Callable[..., Any] = FixClipTextEncoder if name == "text_encoder" else FixClipTextEncoderWithProjection
    models = [
        make.from_pretrained(folder, subfolder=name, attn_implementation="eager").to(device).float().eval()  # type: ignore[attr-defined]
        for make in (ours, stock)
    ]
    ids_BT = tokenizer(list(texts), padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    found = []
    for encoder in models:
        output = encoder(input_ids=ids_BT.input_ids.to(device), output_hidden_states=True)
        found.append([*output.hidden_states[1:], output.last_hidden_state])
    return rows(f"{model}, {name}: the diffusers component", found[0], found[1], last="after the final LayerNorm")
