"""Prompts to draw, and where each of their sentences lies.

A sentence is "before" the 77th token if all of it is read by a stock encoder, "across" if that stops inside it,
"after" if it lies behind and within 248 tokens, and "past" if it does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fixclip_core import scenes
from fixclip_core.data.captions import split_sentences
from fixclip_core.files import parse_json
from fixclip_diffusion.tokenizer import FixClipTokenizer

ZONES: tuple[str, ...] = get_args(scenes.Zone)
SCENES_PREFIX = "scenes:"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the scene it describes where the exact checker can judge its picture."""

    text: str
    scene: scenes.Scene | None = None


def read_prompts(source: str, check_scenes: bool | None = None) -> list[Prompt]:
    """Prompts of a file, or captions of the procedural world.

    Args:
        source: a .jsonl file of objects with `prompt`, a text file with one prompt a line, or `scenes:N` for N
            held-out scene captions.
        check_scenes: read each prompt as a scene's caption; None does so where all of them can be read.

    Raises:
        ValueError: no such file, a line that is no prompt, no prompt at all, or a prompt that describes no scene
            although `check_scenes` is set.
    """
    if source.startswith(SCENES_PREFIX):
        number = source.removeprefix(SCENES_PREFIX)
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"prompts {source!r}: give the number of scenes, like scenes:64")
        drawn = [scenes.scene_at(1, index, num_objects=len(scenes.PLACES)) for index in range(int(number))]
        return [Prompt(scenes.long_caption(s, i, split="heldout").text, s) for i, s in enumerate(drawn)]
    texts = list(_prompt_lines(Path(source)))
    if not texts:
        raise ValueError(f"{source}: it holds no prompt")
    if check_scenes is False:
        return [Prompt(text) for _, text in texts]
    prompts = []
    for line, text in texts:
        try:
            scene = scenes.read_caption(text)
            if not scene.objects:  # "a red bicycle against a white wall" has a background, too
                raise ValueError("it names no object of the world")
            prompts.append(Prompt(text, scene))
        except ValueError as error:
            if check_scenes:
                raise ValueError(f"{source}:{line}: no scene's caption: {error}") from None
            return [Prompt(text) for _, text in texts]
    return prompts


def _prompt_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {str(path)!r}: not a readable text file: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = line.strip()
        if path.suffix == ".jsonl":
            try:
                text = parse_json(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: expected a JSON object with `prompt`") from None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}:{number}: prompt is {text!r}, it must be a text")
        yield number, text


@dataclass(frozen=True)
class Sentence:
    """A sentence of a prompt and where it lies, see the top of this file."""

    text: str
    zone: str


def sentences(text: str, tokenizer: FixClipTokenizer) -> list[Sentence]:
    """The sentences of a prompt in their order, as `tokenizer` reads them."""
    clean = tokenizer.clean(text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = [(start + _leading(clean[start:end]), end) for start, end in split_sentences(clean)]
    caption = scenes.Caption(str(clean), tuple(scenes.Span(*span, str(i)) for i, span in enumerate(spans)))
    zones = scenes.object_zones(caption, offsets, long_length=tokenizer.context_length)
    return [Sentence(clean[start:end].strip(), zones[str(i)]) for i, (start, end) in enumerate(spans)]


def _leading(text: str) -> int:
    return len(text) - len(text.lstrip())
