"""Entry of a Space: the page on the model that the environment names, or on the default one.

FIXCLIP_BASE, FIXCLIP_ENCODER and FIXCLIP_ADAPTER are folders or hub names; address and port are Gradio's own
variables (GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), which a Space sets.
"""

import os

from fixclip_app.command import load
from fixclip_app.model import ModelChoice
from fixclip_app.page import build, launch


def choice_from_environment() -> ModelChoice | None:
    """The model that the FIXCLIP_ variables name, or None.

    Raises:
        ValueError: an encoder or adapter without the base that it belongs to.
    """
    base, encoder, adapter = (os.environ.get(f"FIXCLIP_{name}") or None for name in ("BASE", "ENCODER", "ADAPTER"))
    if base is None and (encoder or adapter):
        raise ValueError("FIXCLIP_ENCODER and FIXCLIP_ADAPTER need FIXCLIP_BASE, the model that they belong to")
    return None if base is None else ModelChoice(base, encoder, adapter)


if __name__ == "__main__":
    launch(build(load(choice_from_environment(), None)))
