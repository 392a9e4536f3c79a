"""CLIP objects and nodes of a real ComfyUI, with the weights of transformers' models.

    pytest tests/comfyui --comfyui PATH     # a checkout of ComfyUI; its requirements are installed

The text encoders are ComfyUI's own classes with its own tokenizers, made small by `model_options`, and hold fp32.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


class RealCore:
    """A core like `stand_in`, made of a checkout.

    Args:
        path: the checkout.
        folder: for the files of textual inversions.
    """

    def __init__(self, path: Path, folder: Path):
        if not (path / "comfy" / "sd.py").is_file():
            raise ValueError(f"--comfyui {path}: no checkout of ComfyUI (it has no comfy/sd.py)")
        sys.path.append(str(path.resolve()))  # last: its folders `app`, `tests` and `utils` hide nothing of ours
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        self.folder = folder

    def clip(self, models, inversions=None):
        """A CLIP object; see `stand_in.ClipOfToday`."""
        import comfy.sd
        from comfy import sd1_clip, sdxl_clip
        from comfy.supported_models_base import ClipTarget
        from comfy.text_encoders import sd2_clip

        target = {
            ("l",): ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
            ("h",): ClipTarget(sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
            ("l", "g"): ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
        }[tuple(models)]
        for name, vectors in (inversions or {}).items():
            save_file({"emb_params": vectors}, self.folder / f"{name}.safetensors")
        configs = {key: _config(key, model) for key, (model, _) in models.items()}
        options = {"dtype": torch.float32}
        options |= {f"clip_{key}_model_config": config for key, config in configs.items()}
        lengths = {f"clip_{key}_max_length": config["max_position_embeddings"] for key, config in configs.items()}
        clip = comfy.sd.CLIP(
            target, str(self.folder), False, lengths, model_options={"dtype": torch.float32, **options}
        )
        for key, (model, _) in models.items():
            missing, unexpected = getattr(clip.cond_stage_model, f"clip_{key}").load_sd(_weights(key, model))
            assert not set(missing) - {"text_projection.weight"}, missing
            assert not unexpected, unexpected
            getattr(clip.tokenizer, f"clip_{key}").embedding_size = model.config.hidden_size
        return clip

    def modules(self, folder, schema):
        """{name: module} that the pack needs besides what can be imported; see `stand_in.core_modules`."""
        import folder_paths

        folder_paths.models_dir = str(folder)
        return {} if schema else {"comfy_api": None, "comfy_api.latest": None}


def _config(key, model):
    config = model.config.to_dict()
    # Stable Diffusion 2 reads the last layer but one; diffusers leaves out the last, checkpoints have it.
    return config | {"num_hidden_layers": config["num_hidden_layers"] + (key == "h")}


def _weights(key, model):
    """By the names that checkpoints and ComfyUI have."""
    weights = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    if key == "h":
        last = f"text_model.encoder.layers.{model.config.num_hidden_layers - 1}."
        more = f"text_model.encoder.layers.{model.config.num_hidden_layers}."
        weights |= {more + name[len(last) :]: value for name, value in weights.items() if name.startswith(last)}
    return weights
