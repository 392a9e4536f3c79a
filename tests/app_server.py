"""The page on tiny real models, for the tests of its API and in the browser."""

import os
from contextlib import contextmanager

import torch
from fixclip_app.model import DemoModel, DevicePool, ModelChoice, mark_as_scenes
from fixclip_app.page import build, launch

from fixclip_diffusion import FixClipTextEncoder, TextAdapter
from fixclip_diffusion.tiny import WIDTH, stable_diffusion, train_tokenizer


def make_model(folder, scenes):
    """Base, encoder and adapter with random weights that all differ; the scenes flag is in the folder."""
    import tiny

    texts = [tiny.sentences(20), *captions()]
    stable_diffusion(train_tokenizer(texts)).save_pretrained(folder / "base")
    stable_diffusion(train_tokenizer(texts), seed=1).text_encoder.save_pretrained(folder / "clip")
    encoder = FixClipTextEncoder.from_pretrained(folder / "clip")
    encoder.save_pretrained(folder / "encoder")
    adapter = TextAdapter(WIDTH)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    adapter.save_pretrained(folder / "adapter")
    if scenes:
        mark_as_scenes(folder / "base")
    choice = ModelChoice(str(folder / "base"), str(folder / "encoder"), str(folder / "adapter"), name="tiny")
    return DemoModel(choice, "cpu")


def captions():
    from fixclip_core.scenes import long_caption, sample_scene

    return [long_caption(sample_scene(i), i).text for i in range(20)]


@contextmanager
def serve(model, folder, **kwargs):
    """The page on a free port; yields (url, pool)."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    pool = DevicePool([model])
    page = build(pool, **kwargs)
    try:
        url = launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1]
        yield url, pool
    finally:
        page.close(verbose=False)
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
