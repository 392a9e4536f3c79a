"""The nodes in ComfyUI's schema V3."""

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .adapters import adapter_names, load_adapter, when_written
from .encode import AUTO, CHOICES, encode_prompt, report_prompt
from .picture import draw_report

CATEGORY = "conditioning/fixclip"
Adapter = io.Custom("FIXCLIP_ADAPTER")


def prompt_inputs() -> list[Any]:
    """Of a node that reads a prompt."""
    return [
        io.Clip.Input("clip"),
        io.String.Input("text", multiline=True, dynamic_prompts=True),
        io.Combo.Input("conditioning", options=CHOICES, default=AUTO),
        Adapter.Input("adapter", optional=True),
        io.Clip.Input("long_clip", optional=True, tooltip="Reads what does not fit into 77 tokens of `clip`."),
        Adapter.Input("adapter_2", optional=True, tooltip="XL: on the other one of its two text encoders."),
    ]


class EncodeLongPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixClipEncodeLongPrompt",
            display_name="Encode long prompt (FIX-CLIP)",
            category=CATEGORY,
            description="A prompt of any length for Stable Diffusion 1.x, 2.x and XL, positive or negative.",
            inputs=prompt_inputs(),
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        conditioning: str,
        adapter: Any = None,
        long_clip: Any = None,
        adapter_2: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(encode_prompt(clip, text, conditioning, adapter, long_clip, adapter_2))


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixClipLoadAdapter",
            display_name="Load adapter (FIX-CLIP)",
            category=CATEGORY,
            description="An adapter.safetensors in models/fixclip.",
            inputs=[io.Combo.Input("name", options=adapter_names())],
            outputs=[Adapter.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        return when_written(name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(load_adapter(name))


class TokenReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixClipTokenReport",
            display_name="Token report (FIX-CLIP)",
            category=CATEGORY,
            description="How many tokens a prompt has, where 77 falls, and what reads the rest.",
            inputs=prompt_inputs(),
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="picture")],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        conditioning: str,
        adapter: Any = None,
        long_clip: Any = None,
        adapter_2: Any = None,
    ) -> io.NodeOutput:
        report = report_prompt(clip, text, conditioning, adapter, long_clip, adapter_2)
        return io.NodeOutput(report.describe(), draw_report(report))


class FixClipExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [EncodeLongPrompt, LoadAdapter, TokenReport]


async def comfy_entrypoint() -> FixClipExtension:
    return FixClipExtension()
