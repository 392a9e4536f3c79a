"""Put the parts of the scenes miniature together: `base` for training, `install` for the package's own folder.

`restore` goes the other way: it lays out what the package holds, so that other stages go on from it without the chain.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from fixclip_core.model.config import FINE_TUNE
from fixclip_core.weights.load import load_fixclip
from fixclip_diffusion.text_encoder import FixClipTextEncoder

OUT = Path("outputs/scenes")
BUILTIN = Path("fixclip_diffusion/builtin/scenes")
PARTS = {
    "base": OUT / "base",
    "clip": OUT / "clip" / "model",
    "encoder": OUT / "encoder_diffusers",
    "adapter": OUT / "adapter" / "adapter",
    "overlap_adapter": OUT / "adapter_overlap_text" / "adapter",
}
NAME = "builtin:scenes"

app = typer.Typer(add_completion=False)


@app.command()
def base(
    unet: Annotated[Path, typer.Option(help="Pipeline of the stage unet.")] = OUT / "unet" / "model",
    output: Path = OUT / "base",
) -> None:
    """Write the base as published, in half precision: everything that follows is trained on what users get."""
    pipe = StableDiffusionPipeline.from_pretrained(unet).to(torch.float16)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    index = partial / "model_index.json"  # the web page shows the checker's verdicts for such a model
    index.write_text(json.dumps({**json.loads(index.read_text()), "_scenes_world": True}, indent=2) + "\n")
    load_in_full_precision(partial / "text_encoder")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    typer.echo(output)


@app.command()
def stretched(clip: Path = OUT / "clip" / "model", output: Path = OUT / "rivals" / "stretched") -> None:
    """Write the base CLIP with stretched positions, as every training begins: nothing is trained."""
    load_fixclip(clip, **FINE_TUNE).save_pretrained(output)
    typer.echo(output)


def load_in_full_precision(folder: Path) -> None:
    """Have transformers load half-precision weights as diffusers loads its own: in float32 unless told otherwise.

    It would follow the configuration, and a text encoder in half precision beside a UNet in full precision fails.
    """
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")


def shorten(folder: Path, dtype: torch.dtype) -> None:
    """Write the folder's float32 weights in 16 bits; what loads them makes them float32 again."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}  # an adapter's configuration among others
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        if any(tensor.dtype == torch.float32 for tensor in state.values()):
            state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
            save_file(state, path, metadata)


def name_base(folder: Path) -> None:
    """Have the encoder take the base's weights for short prompts from the base, which is in the package already."""
    encoder = FixClipTextEncoder.from_pretrained(folder)
    encoder.name_short_weights(f"{NAME}/base")
    encoder.save_pretrained(folder)


@app.command()
def install(output: Path = BUILTIN) -> None:
    """Copy all parts into the package; what is there of others goes. Where a part is missing, nothing changes."""
    missing = [str(source) for source in PARTS.values() if not source.is_dir()]
    if missing:
        raise SystemExit(f"Error: there is no {', '.join(missing)}: run the stages that write them first")
    for name, source in PARTS.items():
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("README.md", ".*"))
        if name == "encoder":
            name_base(partial / "text_encoder")
            load_in_full_precision(partial / "text_encoder")
        if name == "clip":
            load_in_full_precision(partial)
        # bfloat16 has 16 bits as well, of which a wheel can compress more.
        shorten(partial, torch.bfloat16 if name.endswith("adapter") else torch.float16)
        shutil.rmtree(output / name, ignore_errors=True)
        partial.rename(output / name)
        size = sum(file.stat().st_size for file in (output / name).rglob("*") if file.is_file())
        typer.echo(f"{output / name}: {size / 1e6:.1f} MB")
    for other in [folder for folder in output.iterdir() if folder.is_dir() and folder.name not in PARTS]:
        shutil.rmtree(other)


@app.command()
def restore(output: Annotated[Path, typer.Option(help="Where stages leave their results.")] = OUT) -> None:
    """Lay the package's parts out where the chain leaves them; what is there already stays.

    The stages behind them count as done, so that `run.py rivals`, say, begins with the published CLIP. Weights are
    those of the package, in 16 bits.
    """
    for name, source in PARTS.items():
        target = output / source.relative_to(OUT)
        if target.exists():
            typer.echo(f"{target}: there already")
            continue
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(BUILTIN / name, partial)
        partial.rename(target)
        typer.echo(f"{target}: as published")


if __name__ == "__main__":
    app()
