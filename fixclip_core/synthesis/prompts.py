"""What a multimodal model is asked for: 20 prompts for long captions, 5 for short ones, dealt by a hash.

The long prompts differ in order and emphasis, so that captions do not all begin with the same words; each asks for the
subject, attributes, relations, background and style, and forbids invention. About 120 tokens is what FIX-CLIP trains
on (paper, section 4.1: 20 prompts).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

_RULES = (
    "Describe only what can be seen and leave out what you would have to guess. "
    "Write plain sentences in one paragraph of about 90 words, with no list, no heading and no introduction."
)


@dataclass(frozen=True)
class Prompt:
    """A prompt and the name that its captions are labelled with."""

    id: str
    text: str


_LONG = {
    "subject_first": "Describe this image, beginning with its main subject: what it is, its colours, its material "
    "and its pose. Then say how the other things relate to it, what lies behind it, and in what style it is shown.",
    "background_first": "Describe this image from back to front: the setting and the light first, then what stands "
    "in the middle distance, then the subject with its attributes, and at last the style of the image.",
    "left_to_right": "Go through this image from left to right and describe each thing you pass: its kind, colour, "
    "size and what it touches or faces. Close with the background and the style.",
    "top_to_bottom": "Go through this image from top to bottom. For each part name the objects, their attributes "
    "and their places relative to each other, then the background and the kind of image it is.",
    "centre_outwards": "Start at the centre of this image and work outwards. Describe each object with its "
    "attributes, how far it is from the centre and in which direction, then the surroundings and the style.",
    "large_to_small": "Describe the things in this image in order of size, the largest first. Give each one its "
    "colour, texture and position, mention how they relate, then describe the backdrop and the style.",
    "for_a_painter": "Describe this image so that a painter who cannot see it could paint it: the objects, their "
    "shapes and colours, where each one goes, what is behind them, the light and the manner of painting.",
    "for_a_caller": "Imagine that you describe this image to a friend on the telephone. Say what it shows, how the "
    "things look, where they are relative to one another, what the background is and what sort of picture it is.",
    "for_a_search": "Write a description by which this one image could be told from a thousand similar ones: the "
    "subject, its particular attributes, the arrangement, the background and the style.",
    "attributes": "Describe this image with attention to attributes. Name each object together with its colour, "
    "material, shape, size and condition, then their arrangement, the background and the style.",
    "relations": "Describe this image with attention to relations: which object is beside, above, behind, inside "
    "or in contact with which other. Name attributes as you go, then the background and the style.",
    "actions": "Describe what happens in this image: who or what acts, on what, with which posture and expression. "
    "If nothing moves, say how the things are arranged. Add attributes, background and style.",
    "counting": "Describe this image and give exact numbers where you can count: how many of each thing there are, "
    "of which colours, and where. Then describe the background and the style.",
    "colours": "Describe this image by its colours: which thing has which colour, how the colours are distributed "
    "and how light falls on them. Include the relations between the things, the background and the style.",
    "materials": "Describe this image by surfaces and materials: what each thing seems to be made of, how it is "
    "patterned or worn. Include where the things are, what is behind them and the style.",
    "place_and_time": "Describe the place that this image shows, and the season or time of day where they are "
    "visible. Then describe the subject, its attributes, its relation to the place, and the style.",
    "composition": "Describe how this image is composed: viewpoint, framing, foreground and background, and where "
    "the subject lies in it. Then describe each object with its attributes, and the style.",
    "fine_details": "Describe this image as a whole in one sentence, then go on to fine details that are easily "
    "overlooked: small objects, visible text, marks, edges and the background. Close with the style.",
    "questions": "Answer in flowing text: what is in this image, what does each thing look like, where is it, what "
    "is it next to, what is in the background and in which style is the image made?",
    "sober": "Write a sober, factual record of this image as for an archive: objects with their attributes, their "
    "positions relative to each other, the surroundings and the technique.",
}
_SHORT = {
    "one_sentence": "Describe this image in one sentence of at most 20 words.",
    "title": "Write one plain sentence that would serve as a caption under this image, with the subject and the place.",
    "gist": "Say in one short sentence what this image shows.",
    "subject": "Name the main subject of this image with its most visible attribute, in one sentence.",
    "alt_text": "Write one sentence of alternative text for this image, for somebody who cannot see it.",
}
_SHORT_RULES = "Mention only what can be seen, and write nothing but that sentence."

LONG_PROMPTS = tuple(Prompt(name, f"{text} {_RULES}") for name, text in _LONG.items())
SHORT_PROMPTS = tuple(Prompt(name, f"{text} {_SHORT_RULES}") for name, text in _SHORT.items())


def stable_hash(*parts: object) -> int:
    """A number of 63 bits, the same for the same parts on every machine and in every process."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def choose_prompt(prompts: Sequence[Prompt], key: str, seed: int, attempt: int) -> Prompt:
    """The prompt of a sample's attempt: a hash of key and seed, so no state decides and no engine matters.

    Args:
        prompts: what to choose from; each is equally likely.
        key: the sample's.
        seed: the recipe's.
        attempt: 0, 1, ...; each of the first `len(prompts)` attempts gets another prompt.
    """
    first = stable_hash("prompt", seed, key)
    # A step that shares no factor with the number of prompts visits every prompt before it repeats one.
    steps = [step for step in range(1, len(prompts) + 1) if math.gcd(step, len(prompts)) == 1]
    step = steps[stable_hash("step", seed, key) % len(steps)]
    return prompts[(first + attempt * step) % len(prompts)]
