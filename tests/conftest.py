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
from accelerator import reset_accelerator
from diffusers.utils import logging as diffusers_logging
from hypothesis import settings
from transformers.utils import logging as transformers_logging

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

# A suite in a shell's background begins with Ctrl-C ignored, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_process():
    """What a process shares is as it begins: random numbers, threads, Accelerate's settings, what libraries say.

    Which tests one process runs after each other depends on how many processes there are.
    """
    threads = torch.get_num_threads()
    said = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    torch.manual_seed(0)
    reset_accelerator()  # which fixtures of several tests may have set
    yield
    reset_accelerator()
    torch.set_num_threads(threads)
    for library, level in said:
        library.set_verbosity(level)


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
