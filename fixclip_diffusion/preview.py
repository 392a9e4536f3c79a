"""The picture that a running pipeline is heading for, at any step.

Shapes: B images, C latent channels, H and W of the latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class Preview:
    """The last step of the UNet, as `watch_steps` saw it."""

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._sample_BCHW: Tensor | None = None
        self._prediction_BCHW: Tensor | None = None
        self._timestep = 0

    def _remember(self, unet: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._sample_BCHW, self._timestep = args[0], round(float(args[1]))
        self._prediction_BCHW = output[0] if isinstance(output, tuple) else output.sample

    @torch.no_grad()
    def clean_latents(self) -> Tensor:
        """The clean latents (B, C, H, W) that the last step predicts, with guidance.

        With a = alphas_cumprod[t] and x the UNet's input: for epsilon (x - sqrt(1-a) eps) / sqrt(a), for
        v-prediction sqrt(a) x - sqrt(1-a) v.

        Raises:
            ValueError: no step has run, or the scheduler has no `alphas_cumprod` or another prediction type.
        """
        sample, prediction = self._sample_BCHW, self._prediction_BCHW
        if sample is None or prediction is None:
            raise ValueError("no step has run yet")
        if self._pipe.do_classifier_free_guidance:
            negative, positive = prediction.chunk(2)
            prediction = negative + self._pipe.guidance_scale * (positive - negative)
            sample = sample.chunk(2)[0]
        scheduler = self._pipe.scheduler
        alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
        if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"no preview with {type(scheduler).__name__} and prediction_type={kind!r}")
        if kind == "sample":
            return prediction
        alpha = float(alphas[self._timestep])
        if kind == "v_prediction":
            return alpha**0.5 * sample - (1 - alpha) ** 0.5 * prediction
        return (sample - (1 - alpha) ** 0.5 * prediction) / max(alpha, 1e-6) ** 0.5

    @torch.no_grad()
    def image(self, longest: int = 256) -> Image.Image:
        """The first picture of the batch as it is predicted now, at most `longest` pixels wide and high.

        A VAE that overflows in float16, as that of Stable Diffusion XL, decodes in float32, as for the final picture.
        """
        pipe, vae = self._pipe, self._pipe.vae
        dtype = vae.dtype
        overflows = dtype == torch.float16 and vae.config.get("force_upcast", False)
        latents = self.clean_latents()[:1].to(torch.float32 if overflows else dtype) / vae.config.scaling_factor
        try:
            if overflows:
                vae.to(torch.float32)
            decoded = vae.decode(latents, return_dict=False)[0]
        finally:
            if overflows:
                vae.to(dtype)
        image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        image.thumbnail((longest, longest))
        return image


@contextmanager
def watch_steps(pipe: Any) -> Iterator[Preview]:
    """Let the preview follow the pipeline's steps while the block runs; the pictures stay as they are."""
    preview = Preview(pipe)
    hook = pipe.unet.register_forward_hook(preview._remember, with_kwargs=True)
    try:
        yield preview
    finally:
        hook.remove()
