"""The page and its API. Lets visitors describe pictures; never reads what they send as a path or a program."""

import asyncio
import contextlib
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from fixclip_cli.pictures import save_png
from fixclip_diffusion.conditioning import get_conditioning

from .jobs import Event, Limits, Picture, Progress, Settings, check_settings, compare, generate, run, settings_from_link
from .listeners import Listeners, TrackListeners
from .model import DevicePool
from .views import STYLE, heat_map_view, judge, token_view, verdict_view, verdict_words

DEVICE_QUEUE = "device"
LISTENERS = Listeners()  # of all pages that this process serves; sessions have random names
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# A link pasted over the current one changes the fragment only, which does not load the page anew.
HEAD = "<script>window.addEventListener('hashchange', () => location.reload())</script>"
LINK_NAMES = (
    "prompt",
    "negative_prompt",
    "steps",
    "guidance_scale",
    "width",
    "height",
    "seed",
    "num_images",
    "heat_maps",
)
WRITE_LINK = """(...values) => {
  if (!window.fixclipReady) return;
  clearTimeout(window.fixclipTimer);
  window.fixclipTimer = setTimeout(() => {
    const link = new URLSearchParams();
    %s.forEach((name, i) => link.set(name, String(values[i] ?? "")));
    history.replaceState(null, "", "#" + link);
  }, 250);
}""" % list(LINK_NAMES)  # noqa: UP031 - JavaScript is full of braces
COPY_LINK = """() => {
  if (navigator.clipboard) navigator.clipboard.writeText(location.href);
  else window.prompt("Copy this link:", location.href);
}"""


def build(pool: DevicePool, limits: Limits | None = None, max_waiting: int = 32) -> gr.Blocks:
    """The page as Blocks, with its queue set up.

    Args:
        pool: the models; all show the same one, each on its own device.
        limits: what a visitor may ask for at most.
        max_waiting: jobs that wait in line at most; further ones are told that the line is full.
    """
    limits = limits or Limits()
    model = pool.models[0]
    examples = model.examples()
    width, height = (min(side, limits.side // 8 * 8) for side in model.default_size)

    async def checked(**values: Any) -> Settings:
        """Checks tokenize what a visitor wrote: in a thread, so that no other visitor waits for it."""
        try:
            return await asyncio.to_thread(check_settings, values, model, limits)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show_tokens(prompt: str) -> str:
        return token_view(model.token_report((prompt or "")[: limits.characters]), limits.tokens)

    def tokens(prompt: str) -> dict:
        """Count a prompt's tokens and say where a 77-token encoder and this one stop reading.

        Returns num_tokens, context_length, stock_cut and cut (characters of `text`, or null), conditioning and passes.
        """
        if not isinstance(prompt, str) or len(prompt) > limits.characters:
            raise gr.Error(f"The prompt must be text of at most {limits.characters:,} characters.")
        return asdict(model.token_report(prompt))

    async def generate_pictures(
        prompt: str,
        negative_prompt: str,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        seed: float,
        num_images: float,
        heat_maps: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio passes it
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        settings = await checked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            seed=seed,
            num_images=num_images,
            heat_maps=heat_maps,
        )
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fixclip-") as folder:
            drawing = _draw(pool, generate, settings, Path(folder), progress, request)
            async with contextlib.aclosing(drawing) as updates:
                async for shown, pictures in updates:  # noqa: B007 - the last ones are used below
                    yield shown, gr.skip(), gr.skip()
            report = await asyncio.to_thread(model.token_report, prompt)
            maps = await asyncio.to_thread(heat_map_view, pictures, f"fc-{uuid.uuid4().hex[:8]}")
            yield shown, _info(settings, pictures, report.num_tokens, started), maps

    async def compare_systems(
        prompt: str,
        negative_prompt: str,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        seed: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio passes it
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        settings = await checked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            seed=seed,
        )
        started = time.monotonic()
        report = await asyncio.to_thread(model.token_report, prompt)
        with tempfile.TemporaryDirectory(prefix="fixclip-") as folder:
            drawing = _draw(pool, compare, settings, Path(folder), progress, request)
            async with contextlib.aclosing(drawing) as updates:
                async for shown, pictures in updates:  # noqa: B007 - the last ones are used below
                    yield shown, gr.skip(), gr.skip()
            info = _info(settings, pictures, report.num_tokens, started)
            if model.scenes:
                info["verdicts"] = await asyncio.to_thread(_verdicts, report.text, pictures)
                table = await asyncio.to_thread(verdict_view, report.text, pictures, report.stock_cut)
            yield shown, info, table if model.scenes else ""

    def restore(fragment: str) -> list[Any]:
        return list(settings_from_link(fragment or "", defaults, model, limits).values())

    how = get_conditioning(model.pipe.conditioning).summary
    with gr.Blocks(title="FIX-CLIP: long prompts", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# What a long prompt does\nModel: `{model.name}`. Long prompts are {how}; a stock encoder stops "
            "at 77 tokens."
        )
        if model.notice:
            gr.Markdown(model.notice, elem_id="notice")
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_id="left"):
                prompt = gr.Textbox(
                    examples[0],
                    label="Prompt",
                    info=f"Up to {limits.tokens} tokens; Shift+Enter generates.",
                    lines=6,
                    max_lines=14,
                    max_length=limits.characters,
                    elem_id="prompt",
                )
                token_html = gr.HTML(
                    show_tokens(examples[0]), label="The prompt as the encoder reads it", elem_id="tokens"
                )
                gr.Examples(
                    [[text] for text in examples],
                    [prompt],
                    label="Long examples",
                    example_labels=[text[:60] + "…" for text in examples],
                    api_visibility="private",
                )
                with gr.Column(elem_id="settings"):
                    negative_prompt = gr.Textbox(
                        "",
                        label="Negative prompt",
                        info="What the picture should not show.",
                        max_length=limits.characters,
                        elem_id="negative-prompt",
                    )
                    with gr.Row():
                        steps = gr.Slider(1, limits.steps, 20, step=1, label="Steps", elem_id="steps")
                        guidance_scale = gr.Slider(
                            0, limits.guidance_scale, model.default_guidance, step=0.1, label="Guidance"
                        )
                    with gr.Row():
                        width_box = gr.Slider(16, limits.side, width, step=8, label="Width")
                        height_box = gr.Slider(16, limits.side, height, step=8, label="Height")
                    with gr.Row(equal_height=True):
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=limits.seed, elem_id="seed")
                        die = gr.Button("🎲 Random seed", min_width=140, elem_id="die")
                    num_images = gr.Slider(1, limits.images, 1, step=1, label="Number of images")
                    heat_maps = gr.Checkbox(
                        False,
                        label="Show which sentence drew what",
                        info="Heat maps of the UNet's attention; slower.",
                        elem_id="heat-maps",
                    )
                    copy = gr.Button("Copy a link to these settings", size="sm")
            with gr.Column(scale=3, min_width=300, elem_id="right"), gr.Tabs():
                with gr.Tab("Generate"):
                    with gr.Row():
                        generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop_generate = gr.Button("Stop", variant="stop", elem_id="stop-generate")
                    generate_status = gr.HTML("<p>Nothing drawn yet.</p>", elem_id="generate-status")
                    gallery = _gallery("Pictures", "gallery")
                    maps_html = gr.HTML(label="Which sentence drew what", elem_id="maps")
                    with gr.Accordion("Settings of these pictures", open=False):
                        generate_info = gr.JSON(label="Settings", show_label=False)
                with gr.Tab("Compare"):
                    gr.Markdown("The same prompt, settings and seed through each system.")
                    with gr.Row():
                        compare_button = gr.Button("Compare", variant="primary", elem_id="compare")
                        stop_compare = gr.Button("Stop", variant="stop", elem_id="stop-compare")
                    compare_status = gr.HTML("<p>Nothing compared yet.</p>", elem_id="compare-status")
                    sheet = _gallery("Side by side", "sheet", columns=3)
                    verdicts = gr.HTML(label="Verdicts", elem_id="verdicts")
                    with gr.Accordion("Settings of this comparison", open=False):
                        compare_info = gr.JSON(label="Settings", show_label=False)

        common = [prompt, negative_prompt, steps, guidance_scale, width_box, height_box, seed]
        everything: list[Any] = [*common, num_images, heat_maps]
        defaults = {name: component.value for name, component in zip(LINK_NAMES, everything, strict=True)}
        defaults["guidance_scale"] = float(defaults["guidance_scale"])
        link = gr.Textbox(visible=False)

        generating = gr.on(
            [generate_button.click, prompt.submit],
            generate_pictures,
            everything,
            [gallery, generate_info, maps_html],
            api_name="generate",
            api_description="Make pictures from a prompt of any length. Picture i starts from seed + i. Returns the "
            "pictures, their settings, and the heat maps as HTML if heat_maps is true.",
            show_progress_on=generate_status,
            concurrency_id=DEVICE_QUEUE,
            concurrency_limit=len(pool.models),
            trigger_mode="once",
            preprocess=False,  # what was sent, untouched: `check_settings` has the clearer messages
        )
        comparing = compare_button.click(
            compare_systems,
            common,
            [sheet, compare_info, verdicts],
            api_name="compare",
            api_description="One picture per system from the same seed: stock, base encoder in windows, their adapter, "
            "and a trained encoder with what belongs to it, as far as there are any. Returns the pictures, their "
            "settings with the checker's verdicts on a scenes model, and the verdicts as HTML.",
            show_progress_on=compare_status,
            concurrency_id=DEVICE_QUEUE,
            concurrency_limit=len(pool.models),
            trigger_mode="once",
            preprocess=False,  # what was sent, untouched: `check_settings` has the clearer messages
        )
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for event, status, stop in (
            (generating, generate_status, stop_generate),
            (comparing, compare_status, stop_compare),
        ):
            event.success(lambda: _said("Done."), None, status, **quiet)
            # A job that was stopped counts as failed.
            event.failure(
                lambda said: said if "Stopped" in said else _said("Not done: see the message."), status, status, **quiet
            )
            stop.click(lambda: _said("Stopped."), None, status, cancels=[event], **quiet)
        prompt.change(show_tokens, prompt, token_html, trigger_mode="always_last", **quiet)
        die.click(None, None, seed, js=f"() => Math.floor(Math.random() * {limits.seed})", **quiet)
        copy.click(None, js=COPY_LINK, **quiet)
        gr.on([component.change for component in everything], None, everything, js=WRITE_LINK, **quiet)
        page.load(restore, link, everything, js="() => [window.location.hash]", **quiet).then(
            None, js="() => { window.fixclipReady = true }", **quiet
        )
        gr.api(tokens, api_name="tokens", queue=False)
    page.queue(max_size=max_waiting, default_concurrency_limit=len(pool.models))
    return page


def _gallery(label: str, elem_id: str, columns: int = 2) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        columns=columns,
        height="auto",
        object_fit="contain",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id=elem_id,
    )


def _said(words: str) -> str:
    return f'<p role="status">{words}</p>'


async def _draw(
    pool: DevicePool,
    work: Callable[..., None],
    settings: Settings,
    folder: Path,
    progress: gr.Progress,
    request: gr.Request,
) -> AsyncGenerator[tuple[list[tuple[Any, str]], list[Picture]], None]:
    """After each preview and each picture: what to show, its files in `folder`, and the pictures so far."""
    pictures: list[Picture] = []
    files: list[tuple[Any, str]] = []
    progress(0, desc="Waiting for the device")
    try:
        jobs = run(pool, lambda model, emit: work(settings, model, emit), lambda: LISTENERS.waits(request))
        async with contextlib.aclosing(jobs) as events:
            async for event in events:
                if isinstance(event, Picture):
                    file = folder / f"fixclip-{len(pictures) + 1}-seed{event.settings['seed']}.png"
                    await asyncio.to_thread(save_png, event.image, file, event.settings)
                    pictures.append(event)
                    files.append((str(file), event.label))
                shown = _shown(event, files, progress)
                if shown:
                    yield shown, pictures
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _shown(event: Event, files: list[tuple[Any, str]], progress: gr.Progress) -> list[tuple[Any, str]] | None:
    """What the gallery shows after this event; None for no change."""
    if not isinstance(event, Progress):
        return list(files)
    progress((event.step, event.steps), desc="Drawing", unit="steps")
    return [*files, (event.preview, "forming")] if event.preview else None


def _info(settings: Settings, pictures: list[Picture], num_tokens: int, started: float) -> dict[str, Any]:
    return {
        **asdict(settings),
        "tokens": num_tokens,
        "pictures": [{"system": picture.system, "seed": picture.settings["seed"]} for picture in pictures],
        "seconds": round(time.monotonic() - started, 2),
    }


def _verdicts(prompt: str, pictures: list[Picture]) -> list[dict[str, str]]:
    """The checker's words as data; empty for a prompt that it cannot read."""
    with contextlib.suppress(ValueError):
        rows, checks = judge(prompt, pictures)
        judged = list(zip(pictures, checks, strict=True))
        return [
            {"sentence": sentence, **{picture.system: verdict_words(place, check) for picture, check in judged}}
            for place, sentence in rows
        ]
    return []


def launch(page: gr.Blocks, **kwargs: Any) -> Any:
    """Serve the page; kwargs are those of `Blocks.launch`. Nothing is shared unless share=True is passed."""
    return page.launch(
        **{
            "share": False,
            "ssr_mode": False,
            "theme": THEME,
            "css": STYLE,
            "head": HEAD,
            "show_error": False,
            "max_file_size": 1,  # nothing here takes uploads
            "run_history": False,  # would keep prompts in browsers that others may use
            "footer_links": ["api", "settings"],
            "app_kwargs": {"middleware": [Middleware(TrackListeners, listeners=LISTENERS)]},
            **kwargs,
        }
    )
