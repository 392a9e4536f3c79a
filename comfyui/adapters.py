"""Adapter files in the folder models/fixclip of ComfyUI."""

import os
from functools import lru_cache

import folder_paths

from fixclip_diffusion.adapter import TextAdapter

FOLDER = "fixclip"


def add_folder() -> None:
    """Let ComfyUI look for adapters in models/fixclip, beside what extra_model_paths.yaml says."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def adapter_names() -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]


def when_written(name: str) -> float:
    """Of the adapter's file, by which ComfyUI sees that it must load it again; 0.0 if there is none."""
    path = folder_paths.get_full_path(FOLDER, name)
    return 0.0 if path is None else os.path.getmtime(path)


def load_adapter(name: str) -> TextAdapter:
    """The adapter of that name; it stays in memory until its file changes.

    Raises:
        ValueError: there is no such file, or it is no adapter.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"adapter {name!r}: no such file in models/{FOLDER}; there are {adapter_names()}")
    return _load(path, os.path.getmtime(path))


@lru_cache(maxsize=2)
def _load(path: str, changed: float) -> TextAdapter:
    return TextAdapter.from_file(path).eval().requires_grad_(False)
