"""The same nodes for cores of ComfyUI that have no schema V3."""

from typing import Any

from .adapters import adapter_names, load_adapter, when_written
from .encode import AUTO, CHOICES, encode_prompt, report_prompt
from .picture import draw_report

MENU = "conditioning/fixclip"
PROMPT_INPUTS: dict[str, Any] = {
    "required": {
        "clip": ("CLIP",),
        "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
        "conditioning": (CHOICES, {"default": AUTO}),
    },
    "optional": {"adapter": ("FIXCLIP_ADAPTER",), "long_clip": ("CLIP",), "adapter_2": ("FIXCLIP_ADAPTER",)},
}


class EncodeLongPrompt:
    CATEGORY = MENU
    FUNCTION = "execute"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return PROMPT_INPUTS

    def execute(
        self,
        clip: Any,
        text: str,
        conditioning: str,
        adapter: Any = None,
        long_clip: Any = None,
        adapter_2: Any = None,
    ) -> tuple:
        return (encode_prompt(clip, text, conditioning, adapter, long_clip, adapter_2),)


class LoadAdapter:
    CATEGORY = MENU
    FUNCTION = "execute"
    RETURN_TYPES = ("FIXCLIP_ADAPTER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": (adapter_names(),)}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> float:
        return when_written(name)

    def execute(self, name: str) -> tuple:
        return (load_adapter(name),)


class TokenReport:
    CATEGORY = MENU
    FUNCTION = "execute"
    RETURN_TYPES = ("STRING", "IMAGE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return PROMPT_INPUTS

    def execute(
        self,
        clip: Any,
        text: str,
        conditioning: str,
        adapter: Any = None,
        long_clip: Any = None,
        adapter_2: Any = None,
    ) -> tuple:
        report = report_prompt(clip, text, conditioning, adapter, long_clip, adapter_2)
        return report.describe(), draw_report(report)


NODE_CLASS_MAPPINGS = {
    "FixClipEncodeLongPrompt": EncodeLongPrompt,
    "FixClipLoadAdapter": LoadAdapter,
    "FixClipTokenReport": TokenReport,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FixClipEncodeLongPrompt": "Encode long prompt (FIX-CLIP)",
    "FixClipLoadAdapter": "Load adapter (FIX-CLIP)",
    "FixClipTokenReport": "Token report (FIX-CLIP)",
}
