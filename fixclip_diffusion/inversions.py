"""Textual inversions: vectors that a name in a prompt stands for. Read, and looked at before a text encoder changes.

Shapes: V vectors of an inversion, D width of a text encoder.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from torch import Tensor

from fixclip_core.check import LoadError, check_finite, loading, refuse_stand_in
from fixclip_core.weights.kinds import what_it_is

# Names of Stable Diffusion XL's vectors in a file of both its text encoders.
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
ALONE = "vectors"  # of one text encoder
WIDTHS = "768 Stable Diffusion 1, 1024 Stable Diffusion 2, 768 + 1280 Stable Diffusion XL"


@dataclass(frozen=True)
class Inversion:
    """A textual inversion.

    Attributes:
        what: begins messages, such as "textual inversion 'style.pt'".
        name: what a prompt says.
        vectors: (V, D) of one text encoder as `ALONE`, or of Stable Diffusion XL's two as `XL_KEYS` has them.
    """

    what: str
    name: str
    vectors: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """Of all vectors, as diffusers names them: NAME, NAME_1, NAME_2, ..."""
        num_vectors = len(next(iter(self.vectors.values())))
        return [self.name, *(f"{self.name}_{number}" for number in range(1, num_vectors))]


@dataclass(frozen=True)
class Place:
    """A text encoder and its tokenizer that vectors go into; `key` is its own in a file of both text encoders."""

    encoder: Any
    tokenizer: Any
    key: str | None = None

    @property
    def width(self) -> int:
        return int(self.encoder.get_input_embeddings().weight.shape[-1])

    def inversions(self) -> dict[str, list[str]]:
        """Names of the textual inversions that are loaded, and of the vectors of each."""
        added = self.tokenizer.added_tokens_decoder
        vectors = {
            token.content: [added[index].content for index in self.tokenizer.inversion_ids(token_id)]
            for token_id, token in added.items()
            if not token.special
        }
        further = {name for names in vectors.values() for name in names[1:]}
        return {name: names for name, names in vectors.items() if name not in further}


def read_inversions(source: Any, token: str | list[str] | None, **kwargs: Any) -> list[Inversion]:
    """Read what `load_textual_inversion` of diffusers takes, with its own reader.

    Args:
        source: a file, a folder, a hub name, the tensors of a file or a list of these.
        token: a name for each; by default what the file says. Of one tensor, or one file of both text encoders, it
            may name each vector.
        **kwargs: weight_name, subfolder, revision and so on, as diffusers has them.

    Raises:
        LoadError: one is not there, damaged, no textual inversion, or without a name.
        ValueError: more or fewer names than inversions.
    """
    sources = source if isinstance(source, list) else [source]
    tokens = token if isinstance(token, list) else [token]
    if tokens == [None]:
        tokens = tokens * len(sources)
    found = [_read(item, kwargs) for item in sources]
    if len(found) == 1 and len(tokens) > 1:
        what, name, vectors = found[0]
        if name is None and {len(part) for part in vectors.values()} == {len(tokens)}:
            found = [(what, None, {k: part[[i]] for k, part in vectors.items()}) for i in range(len(tokens))]
    if len(found) != len(tokens):
        raise ValueError(f"token={tokens} for {len(found)} textual inversion(s): give one name for each")
    inversions = []
    for (what, own_name, vectors), given in zip(found, tokens, strict=True):
        name = own_name if given is None else given
        if name is None:
            raise LoadError(f"{what}: these vectors have no name of their own: give token=")
        if not isinstance(name, str) or not name.strip():
            raise LoadError(f"{what}: {name!r} is no name that a prompt can say: give token=, such as '<style>'")
        inversions.append(Inversion(what, name, vectors))
    return inversions


def _read(source: Any, kwargs: dict[str, Any]) -> tuple[str, str | None, dict[str, Tensor]]:
    """What begins messages, the name that the file has for it, and the vectors of a textual inversion."""
    in_memory = isinstance(source, (dict, Tensor))
    what = "textual inversion in memory" if in_memory else f"textual inversion {str(source)!r}"
    with loading(what):
        if not in_memory and Path(source).is_file():
            refuse_stand_in(Path(source))
        name, tensors = _name_and_vectors(load_textual_inversion_state_dicts([source], **kwargs)[0])
        vectors = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.ndim not in (1, 2) or not tensor.numel():
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{key} are {shape}, where (V, D) is needed, V vectors of width D")
            vectors[key] = tensor.detach().reshape(-1, tensor.shape[-1])
        if len({len(part) for part in vectors.values()}) > 1:
            counts = " and ".join(f"{len(part)} vectors {key}" for key, part in vectors.items())
            raise ValueError(f"it holds {counts}: both text encoders need equally many")
    return what, name, vectors


def _name_and_vectors(state: Any) -> tuple[str | None, dict[str, Any]]:
    if isinstance(state, Tensor):
        return None, {ALONE: state}
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, where named tensors are needed")
    if XL_KEYS["text_encoder_2"] in state:
        return None, {key: state[key] for key in XL_KEYS.values() if key in state}
    if "string_to_param" in state:  # Automatic1111
        return state.get("name"), {ALONE: state["string_to_param"]["*"]}
    if len(state) == 1:
        name, vectors = next(iter(state.items()))
        return name, {ALONE: vectors}
    names = [str(name) for name in state]
    raise ValueError(
        f"it holds {len(names)} tensors ({what_it_is(names)}), and a textual inversion is one, or clip_l and clip_g"
    )


def place_inversions(inversions: list[Inversion], places: list[Place]) -> list[tuple[Place, list[dict[str, Tensor]]]]:
    """What each text encoder is to be given, {name: (V, D)} of each inversion. Nothing is changed yet.

    Args:
        inversions: to be loaded; vectors that are not told apart go into the first text encoder.
        places: text encoders that are to be given some.

    Raises:
        LoadError: vectors are not finite or of another width, or a name could not be told from another one.
    """
    for inversion in inversions:
        _check_width(inversion, places)
    given: list[tuple[Place, list[dict[str, Tensor]]]] = []
    for place in places:
        taken = {fold(token.content): token.content for token in place.tokenizer.added_tokens_decoder.values()}
        states = []
        for inversion in inversions:
            vectors = inversion.vectors.get(ALONE if ALONE in inversion.vectors else str(place.key))
            if vectors is None or (ALONE in inversion.vectors and place is not places[0]):
                continue
            # In the text encoder's dtype, where large values may not be finite.
            check_finite({inversion.name: vectors.to(place.encoder.dtype)}, inversion.what)
            _check_names(inversion, place.tokenizer.get_vocab(), taken)
            taken.update({fold(name): name for name in inversion.names})
            states.append({inversion.name: vectors})
        if states:
            given.append((place, states))
    return given


def _check_width(inversion: Inversion, places: list[Place]) -> None:
    own = {key: part.shape[-1] for key, part in inversion.vectors.items()}
    here = {ALONE: places[0].width} if ALONE in own else {place.key: place.width for place in places}
    common = own.keys() & here.keys()
    if not common or any(own[key] != here[key] for key in common):
        further = any(place.width == own.get(ALONE) for place in places[1:])
        raise LoadError(
            f"{inversion.what}: it was made for another base: its vectors have the width "
            f"{' + '.join(map(str, own.values()))}, and {' + '.join(map(str, here.values()))} is needed here ({WIDTHS})"
            + ("; for the second text encoder give text_encoder= and tokenizer=" if further else "")
        )


def _check_names(inversion: Inversion, vocabulary: dict[str, int], taken: dict[str, str]) -> None:
    """Compare the names of an inversion's vectors with those that are there, {as they are compared: as they are}."""
    name, names = inversion.name, inversion.names
    plain = name.strip("<>")
    free = next(other for n in count(2) if fold(other := f"<{plain}-{n}>") not in taken)
    base, _, number = name.rpartition("_")
    if number.isdigit() and fold(base) in taken:
        other = taken[fold(base)]
        raise LoadError(
            f"{inversion.what}: {name!r} would be read as one of the vectors of {other!r}: give another token=, such "
            f"as {free!r}"
        )
    for new in [*names, f"{name}_{len(names)}"]:
        other = taken.get(fold(new), new)
        if other != new:
            raise LoadError(
                f"{inversion.what}: prompts are read without regard to case, so {new!r} cannot be told from {other!r}, "
                f"which is loaded: give another token=, such as {free!r}"
            )
        if new in vocabulary:
            raise LoadError(
                f"{inversion.what}: the tokenizer has a token {new!r} already: give another token=, such as {free!r}, "
                "or call unload_textual_inversion if it is an inversion's"
            )


def fold(name: str) -> str:
    """A name as it is compared with a prompt: without regard to case, white space and composition of accents."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", name)).lower()
