"""Which language a text is in, by py3langid: naive Bayes over bytes, 4 MB, 0.1 ms a caption."""

from functools import lru_cache
from typing import Any


def language_probability(text: str, language: str) -> float:
    """How probable a language (ISO 639 code) is against the likeliest other one, from 0 to 1.

    Near 0 or 1 for a sentence; a few words leave it undecided, somewhere around 0.5.
    """
    probabilities = dict(_identifier().rank(text))
    own = probabilities.pop(language, 0.0)
    return own / (own + max(probabilities.values()))


def languages() -> frozenset[str]:
    """ISO 639 codes of the languages that can be told."""
    return frozenset(_identifier().labels)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
