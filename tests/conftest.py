"""Folders of tiny real models, made once a session."""

import os
import signal

# Before anything of Hugging Face is imported: no test may wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Messages of the command line must come through unbroken in any terminal.
os.environ.update(COLUMNS="40", NO_COLOR="1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

# A suite in a shell's background begins with Ctrl-C ignored, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose path is longer than a terminal is wide: messages must not break in it either."""
    folder = tmp_path / ("a-folder-with-a-long-name-" * 4)
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory):
    """{"sd1": folder, "sd2": folder} of stock Stable Diffusion pipelines with random weights."""
    import tiny

    from fixclip_diffusion.tiny import stable_diffusion

    folders = {}
    for kind, pad_token in (("sd1", "<|endoftext|>"), ("sd2", "!")):
        folders[kind] = tmp_path_factory.mktemp(kind)
        stable_diffusion(tiny.clip_tokenizer(pad_token=pad_token), kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The folder of a stock Stable Diffusion XL with random weights."""
    import tiny

    from fixclip_diffusion.tiny import stable_diffusion_xl

    folder = tmp_path_factory.mktemp("sdxl")
    stable_diffusion_xl(tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd1(base_folders):
    return base_folders["sd1"]
