"""Which text encoder an adapter was made for: digests of weights and tokenizer, in a file beside the adapter."""

import hashlib
import json
import logging
from pathlib import Path

from tokenizers import Tokenizer
from torch import nn

from fixclip_diffusion.text_encoder import FixClipTextEncoder
from fixclip_diffusion.tokenizer import FixClipTokenizer

logger = logging.getLogger(__name__)

MADE_FOR = "made_for.json"


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights as float32, names included; an encoder's adapter does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith("adapter."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: FixClipTokenizer) -> str:
    """SHA-256 of all that decides a tokenizer's ids."""
    backend = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    backend.no_truncation()  # a tokenizer keeps both from the last call
    backend.no_padding()
    settings = [backend.to_str(), tokenizer.context_length, tokenizer.clean_text, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def fingerprint(encoder: FixClipTextEncoder, tokenizer: FixClipTokenizer) -> dict[str, str]:
    """What an adapter belongs to: digests of the encoder's weights (in float32) and of its tokenizer."""
    return {"text encoder": weights_digest(encoder), "tokenizer": tokenizer_digest(tokenizer)}


def check_made_for(folder: Path, made_for: dict[str, str]) -> None:
    """Compare with what an adapter's or a run's folder says; one that says nothing passes with a warning.

    Raises:
        ValueError: the encoder or the tokenizer is another one.
    """
    try:
        found = json.loads((folder / MADE_FOR).read_text())
    except FileNotFoundError:
        logger.warning("%s has no %s, so it is not known which text encoder it belongs to", folder, MADE_FOR)
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / MADE_FOR}: cannot be read: {error}") from None
    other = [name for name, digest in made_for.items() if found.get(name) != digest]
    if other:
        raise ValueError(
            f"{folder}: it was made with another {' and another '.join(other)} than the one given now; give what it "
            "was made with, in training by model.encoder (null: the base's own)"
        )


def warn_of_another_encoder(adapter: Path, encoder: FixClipTextEncoder, tokenizer: FixClipTokenizer, name: str) -> None:
    """Log a warning if an adapter's folder says that it was made for another text encoder or tokenizer.

    Args:
        adapter: folder of the adapter; without `made_for.json`, or none at all, nothing is known and nothing is said.
        encoder: in float32, as digests are.
        tokenizer: of the same pipeline.
        name: of the encoder, for the warning.
    """
    if not (adapter / MADE_FOR).is_file():
        return
    try:
        check_made_for(adapter, fingerprint(encoder, tokenizer))
    except ValueError:
        logger.warning(
            "adapter %s was made for another text encoder than %s: pictures may be worse than without it", adapter, name
        )
