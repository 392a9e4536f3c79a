"""What is loaded is looked at: one error for everything that cannot be used, and one set of checks for all loaders.

Every loader of weights (encoder, whole CLIP, adapter, LoRA) opens its files inside `loading`, compares the sizes that a
configuration gives with those of the file's own tensors before anything is built, and checks the values afterwards.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]

CLIP_END_ID = 49407
OUT_OF_REACH = "fetch it where it can be (hf download NAME --local-dir FOLDER) and name the folder"
# Of open_clip's tokenizers; it hands all others on to transformers, and `trust_remote_code` among them runs code.
TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask")
LEGACY_END_ID = 2  # in configurations of CLIP from before transformers 4.31, whatever the vocabulary


class LoadError(ValueError, OSError):
    """A file or folder cannot be loaded.

    A ValueError, as for all bad input of this project, and an OSError, which is what callers of transformers' and
    diffusers' `from_pretrained` catch.
    """


def check_tokenizer_options(text_cfg: Mapping[str, Any]) -> None:
    """Refuse options of a tokenizer that are not open_clip's own.

    Args:
        text_cfg: of open_clip's model configuration; its `tokenizer_kwargs` are looked at.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, value in dict(text_cfg.get("tokenizer_kwargs") or {}).items():
        if name not in TOKENIZER_OPTIONS:
            raise ValueError(
                f"tokenizer_kwargs: {name}={value!r} is no option of open_clip's tokenizers, and others may run code; "
                f"valid are {', '.join(TOKENIZER_OPTIONS)}: take it out of the configuration"
            )


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn every exception into a LoadError of one line that begins with `what`, such as "adapter 'runs/a'".

    Damaged and hostile files end in a dozen kinds of exceptions of the libraries that read them: KeyError, TypeError,
    ZeroDivisionError, errors of strict dataclasses. Out of memory stays what it is, and so does a LoadError.
    """
    try:
        yield
    except (LoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LoadError(f"{what}: {hub_reason(error)}") from error


def refuse_stand_in(file: Path) -> None:
    """Say what a file is that lies where weights should be: a pointer of Git LFS, or the page that a download got.

    Raises:
        LoadError: it is one of the two.
    """
    with file.open("rb") as opened:
        start = opened.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise LoadError(f"{file} is a pointer of Git LFS to the weights: run `git lfs pull` in that folder")
    if start.startswith((b"<!doctype html", b"<html")):
        raise LoadError(f"{file} is a web page in place of weights: download it again, logged in if its site asks")


def one_line(error: BaseException) -> str:
    """The error's message on one line; with the exception's name where the message alone would say nothing."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_folder_or_hub_name(what: str, name: str, *, or_file: bool = False) -> None:
    """Say so at once where a name can be neither; the hub client would retry, or explain its own rules.

    Args:
        what: begins the message, e.g. "adapter".
        name: as somebody wrote it.
        or_file: a file will do, too.

    Raises:
        LoadError: it is a file and none will do, or it is not there and not like owner/model.
    """
    path = Path(name)
    if path.is_file():
        if or_file:
            return
        raise LoadError(f"{what} {name!r} is a file; a folder or a hub name like owner/model is needed")
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        nothing = "neither a file nor a folder, nor" if or_file else "neither a folder nor"
        raise LoadError(f"{what} {name!r} is {nothing} a hub name like owner/model")


def split_scale(text: str) -> tuple[str, float]:
    """`style.safetensors:0.7`, a LoRA and its weight, to ("style.safetensors", 0.7); without a number the weight is 1.

    Raises:
        ValueError: the weight is not finite.
    """
    source, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(scale):
        raise ValueError(f"LoRA {text!r}: its weight must be a finite number")
    return (source, scale) if colon else (text, 1.0)


def hub_reason(error: BaseException) -> str:
    """Why something could not be fetched from the hub, in words that say what to do; else the error on one line.

    The hub's client and the libraries around it wrap each other's errors, with paragraphs about their own settings;
    what happened is told by the class of one of them.
    """
    forbidden = huggingface_hub.constants.HF_HUB_OFFLINE
    reach = "HF_HUB_OFFLINE forbids to look on the hub" if forbidden else "the hub cannot be reached to look there"
    reasons = {
        "GatedRepoError": "access to it must be asked for on its page of the hub, then: hf auth login",
        "RepositoryNotFoundError": "there is no such folder here and no such public repository on the hub; for a "
        "private one: hf auth login",
        "RevisionNotFoundError": "the repository has no such revision",
        "RemoteEntryNotFoundError": "the repository has no such file",
        "LocalEntryNotFoundError": f"there is no such folder here, and {reach}; {OUT_OF_REACH}",
        "OfflineModeIsEnabled": f"there is no such folder here, and {reach}; {OUT_OF_REACH}",
    }
    if "argument `trust_remote_code=True`" in str(error):  # transformers advises to run it
        return "it needs code that comes with it, and no code is run"
    return next((reasons[name] for name in _classes_behind(error) if name in reasons), one_line(error))


def is_hub_out_of_reach(error: BaseException) -> bool:
    """Whether there is no connection to the hub, or none is allowed, behind an error."""
    return not {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}.isdisjoint(_classes_behind(error))


def _classes_behind(error: BaseException) -> Iterator[str]:
    """Names of the classes of an error, and of those that it was raised from."""
    chain: BaseException | None = error
    while chain is not None:
        yield from (item.__name__ for item in type(chain).__mro__)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def check_finite(weights: nn.Module | Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that hold NaN or infinity: every picture made with them would be black.

    Args:
        weights: a module, whose parameters and buffers are looked at, or a state dict.
        what: begins the message.

    Raises:
        LoadError: names the first such tensor.
    """
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    for name, tensor in named.items():
        if not is_finite(tensor):
            raise LoadError(f"{what}: {name} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; true for whole numbers, empty tensors and tensors without values (meta)."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # float8 has no minimum and maximum
        tensor = tensor.float()
    low, high = tensor.detach().aminmax()  # NaN wins both; no copy of the tensor is made
    return bool(low.isfinite() & high.isfinite())


def check_shapes(expected: Shapes, found: Shapes, what: str) -> None:
    """Compare the shapes that a configuration makes with those of a file's tensors.

    Raises:
        LoadError: says how many tensors are missing or of another shape, and names the first.
    """
    missing = [name for name in expected if name not in found]
    other = [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]
    if missing:
        raise LoadError(f"{what}: {len(missing)} of {len(expected)} weights are missing, the first is {missing[0]}")
    if other:
        name = other[0]
        raise LoadError(
            f"{what}: {len(other)} of {len(expected)} weights are missing or of another shape, the first is {name}: "
            f"{tuple(found[name])}, where the configuration makes {tuple(expected[name])}"
        )


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a module's state dict; the module may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def count_layers(names: Iterable[str], tower: str) -> int:
    """How many layers a tower's tensors belong to: 2 of "a.layers.0.x", "a.layers.1.x" for the tower "a.layers"."""
    pattern = re.compile(rf"{re.escape(tower)}\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def check_layers(configured: Any, names: Iterable[str], tower: str, what: str) -> None:
    """Compare a configuration's number of layers with the file's, before a module of a million layers is built.

    Raises:
        LoadError: they differ.
    """
    found = count_layers(names, tower)
    if configured != found:
        raise LoadError(f"{what}: the configuration says {configured} layers, the weights have {found} ({tower})")


def check_vocabulary(highest_id: int, vocab_size: int, what: str) -> None:
    """Refuse a tokenizer whose ids have no embedding, instead of "index out of range" later (on a GPU: a dead process).

    Args:
        highest_id: the largest id that the tokenizer gives.
        vocab_size: rows of the encoder's token embedding.
        what: begins the message.

    Raises:
        LoadError: ids are out of range.
    """
    if highest_id >= vocab_size:
        raise LoadError(
            f"{what}: the text encoder has embeddings for {vocab_size} tokens, but its tokenizer gives ids up to "
            f"{highest_id}; it needs the tokenizer files of its own model"
        )


def check_tokenizer(tokenizer: Any, config: Any, what: str) -> None:
    """Compare a transformers tokenizer with the configuration of a CLIP text encoder: vocabulary, start and end.

    Args:
        tokenizer: a `CLIPTokenizer`; added tokens (textual inversions) count.
        config: has `vocab_size` and `eos_token_id`; the latter may have the legacy value 2, which means the largest id.
        what: begins the message.

    Raises:
        LoadError: ids without embedding, or another end token than the one whose state is pooled.
    """
    ids = tokenizer.get_vocab().values()
    check_vocabulary(max(ids), config.vocab_size, what)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None or end is None or start == end:
        raise LoadError(f"{what}: the tokenizer's start and end tokens have the ids {start} and {end}, two are needed")
    if config.eos_token_id not in (LEGACY_END_ID, end):
        raise LoadError(
            f"{what}: the tokenizer ends texts with id {end}, but the text encoder was trained with "
            f"{config.eos_token_id}; the two belong to different models"
        )
