"""Tiny CLIPs with random weights, in open_clip's and in transformers' classes."""

import open_clip
import torch
from transformers import CLIPConfig, CLIPModel

VOCAB_SIZE = 50


def tiny_config(context_length=77, quick_gelu=True):
    return {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": VOCAB_SIZE,
            "width": 128,
            "heads": 2,
            "layers": 2,
        },
        "quick_gelu": quick_gelu,
    }


@torch.no_grad()
def tiny_clip(context_length=77, quick_gelu=True, seed=0):
    """An open_clip CLIP whose every weight is random and large enough to show a wrong activation."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**tiny_config(context_length, quick_gelu)).eval()
    for name, parameter in clip.named_parameters():
        if name != "logit_scale":
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return clip


def tiny_transformers_clip(context_length=77, activation="quick_gelu", **text):
    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "max_position_embeddings": context_length,
            "bos_token_id": VOCAB_SIZE - 2,
            "eos_token_id": VOCAB_SIZE - 1,
            "projection_dim": 32,
            **sizes,
            **text,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 3,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
            **sizes,
        },
        projection_dim=32,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def full_vocabulary_clip(**layers):
    """As `tiny_clip`, with the vocabulary that the tokenizer files of an export describe; `layers=4` of both towers."""
    torch.manual_seed(5)
    config = tiny_config()
    config["text_cfg"] |= {"vocab_size": 49408, "width": 64, "heads": 2, **layers}
    config["vision_cfg"] |= {"head_width": 32, **layers}
    clip = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    preprocess = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
    return clip, config, preprocess


TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def batch(context_length=77, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB_SIZE - 1, (3, context_length), generator=generator)
    for row, end in enumerate((5, 40, context_length - 1)):
        ids[row, end:] = 0
        ids[row, end] = VOCAB_SIZE - 1
    return torch.randn(3, 3, 32, 32, generator=generator), ids


def collect(blocks, run):
    """The output of `run` after the outputs of every block."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.no_grad():
            result = run()
    finally:
        for hook in hooks:
            hook.remove()
    return [*outputs, result]


def open_clip_states(clip, images, ids):
    return [
        *collect(clip.visual.transformer.resblocks, lambda: clip.encode_image(images)),
        *collect(clip.transformer.resblocks, lambda: clip.encode_text(ids)),
    ]


def transformers_states(model, images, ids):
    image = collect(model.vision_model.encoder.layers, lambda: model.get_image_features(images).pooler_output)
    text = collect(model.text_model.encoder.layers, lambda: model.get_text_features(ids).pooler_output)
    return [*image, *text]


def assert_same_states(actual, expected, count=3 + 1 + 2 + 1):
    assert len(actual) == len(expected) == count
    for layer, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda text, layer=layer: f"layer {layer}: {text}")
