"""What a weight file is, told from the names of its tensors, for errors that say what somebody has mixed up."""

import re
from collections.abc import Iterable
from pathlib import Path

from fixclip_core.weights.files import open_weights

# The first that fits counts: a ControlNet holds a UNet's blocks, a checkpoint those of a VAE.
KINDS = (
    (r"lora_(up|down|A|B|unet|te)|\.lora\.|hada_w|lokr_w", "a LoRA"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|<.*>)$", "a textual inversion"),
    (r"(^|\.)kept_positions$", "a FixClip's weights without their folder"),
    (r"controlnet_cond_embedding|^control_model\.", "a ControlNet"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^blocks\.\d+\.(fc1|in_proj)\.", "an adapter of this project"),
    (r"\.SelfAttention\.q\.weight$|^shared\.weight$", "a T5 text encoder"),
    (r"(^|\.)(double_blocks|joint_blocks|single_transformer_blocks|transformer_blocks\.0\.attn\.)", "a transformer"),
    (r"^model\.diffusion_model\.", "a checkpoint without its text encoder"),
    (r"^(diffusion_model\.|unet\.)?(down_blocks|input_blocks)\.", "a UNet"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|down_blocks|up_blocks|mid|down|up)\b", "a VAE"),
    (r"(^|\.)token_embedding\.weight$", "a text encoder alone"),  # where a whole CLIP is asked for
    (r"(^|\.)(vision_model|visual)\.", "an image encoder"),
)


def what_is_in(place: Path) -> str:
    """Such as "; model.safetensors there is a VAE", of a file or of a folder's first; "" for a folder without.

    Raises:
        LoadError: the file is damaged.
    """
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return f"; {files[0].name} there is {what_it_is(open_weights(files[0]).shapes)}" if files else ""


def what_it_is(names: Iterable[str]) -> str:
    """Such as "a VAE"; for names of no known kind, "123 tensors, the first are a, b, c"."""
    names = list(names)
    for pattern, kind in KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"{len(names)} tensors, the first are {', '.join(names[:3])}"
