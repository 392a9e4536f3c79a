"""The weights of built-in models; their names are resolved by `fixclip_core.builtin`, which needs no diffusers."""

from fixclip_core.builtin import (
    NO_ADAPTER,
    PREFIX,
    SCENES,
    ModelParts,
    base_of,
    complete,
    is_available,
    resolve,
    resolve_component,
    whole_model,
)

__all__ = [
    "NO_ADAPTER",
    "PREFIX",
    "SCENES",
    "ModelParts",
    "base_of",
    "complete",
    "is_available",
    "resolve",
    "resolve_component",
    "whole_model",
]
