"""FIX-CLIP for ComfyUI: prompts of any length for Stable Diffusion 1.x, 2.x and XL.

A core with schema V3 calls `comfy_entrypoint`; an older one reads `NODE_CLASS_MAPPINGS`.
"""

from .adapters import add_folder

add_folder()

try:
    from comfy_api.latest import ComfyExtension, io  # noqa: F401
except ImportError:
    from .nodes_v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:
    from .nodes import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
