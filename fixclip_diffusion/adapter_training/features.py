"""What the frozen models make of pictures and captions, computed at every step or once, into a cache.

The cache is a folder of safetensors files of `shard_size` samples each. It holds the mean and log variance of the
latents, so that every step samples them anew, and on demand the text states; what the objectives do not read is left
out. features.json says what it was made with; a cache of other weights, preprocessing, tokenizer or captions is
refused, and so is one that lacks what is read now. A file appears when it is complete,
so an interrupted run goes on where it stopped.

Shape letters: B samples, C latent channels, H, W latent height and width, T text encoders, N passes, P positions of a
pass, S = N P positions of a caption, L rows of its embeds, D width of the embeds, E width of the pooled vector.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from fixclip_core.data.captions import shared_tokens
from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import Batch, Batches, LoadedSample, Picture, plain_wording, stack_pictures
from fixclip_core.data.order import sample_range, sample_seeds
from fixclip_core.data.samples import BadSampleError, Skipped
from fixclip_core.data.sources import Source
from fixclip_core.device import loading_workers
from fixclip_core.files import write_atomically
from fixclip_diffusion.adapter_training.objectives import CaptionStates, Features
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe, FeaturesSection, ObjectivesSection
from fixclip_diffusion.conditioning import (
    CLIP_CONTEXT_LENGTH,
    SPECIAL_TOKENS,
    Break,
    Conditioning,
    Context,
    Layout,
    Overlap,
    PromptTokens,
    Stock,
)
from fixclip_diffusion.families import STABLE_DIFFUSION, Family, TextEncoding
from fixclip_diffusion.fingerprint import tokenizer_digest, weights_digest
from fixclip_diffusion.prompt_encoder import PromptEncoder, encode_passes, positions_of_text
from fixclip_diffusion.prompt_tokens import tokenize_prompt
from fixclip_diffusion.tokenizer import FixClipTokenizer

KEY_FILE = "features.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
SHORT_CAPTIONS = {"short_caption", "max_short_sentences", "drop_short_from_long"}
SMALL_LATENTS = 16  # side
WINDOWS = ("windows", "windows_known", "windows_gap")  # fields of `Features`
LATENTS, SHORT, WINDOW_STATES = "latents", "short captions", "window states"  # parts of a cache
WITHOUT = "without"  # in its key: the parts that it leaves out
TEACHERS_READING = Overlap()  # the conditioning that teachers read captions with
_OPEN_SHARDS = 16


@dataclass(frozen=True)
class FrozenModels:
    """What training reads and does not change.

    Attributes:
        vae, unet: of the base.
        encodings: the text encoders to adapt with their tokenizers: one, or two of Stable Diffusion XL.
        teachers: the same of the base's own text encoders.
        scheduler: the noise schedule.
        sampler: the base's own scheduler, for pictures.
        conditioning: how captions are read; None: as the first text encoder says.
        family: of the base.
        zeros_for_empty: whether the UNet reads zeros for no caption, as Stable Diffusion XL's does, and not the hidden
            states of "".
    """

    vae: AutoencoderKL
    encodings: tuple[TextEncoding, ...]
    teachers: tuple[TextEncoding, ...]
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    sampler: Any
    conditioning: str | None = None
    family: Family = STABLE_DIFFUSION
    zeros_for_empty: bool = False

    @property
    def modules(self) -> list[nn.Module]:
        encoders = [encoding.encoder for encoding in (*self.encodings, *self.teachers)]
        return [self.vae, *encoders, self.unet]

    @property
    def tokenizer(self) -> FixClipTokenizer:
        """The first; all of them split a text alike."""
        return self.encodings[0].tokenizer

    @property
    def reads_sizes(self) -> bool:
        """Whether the UNet reads sizes of pictures and a pooled vector."""
        return any(encoding.tower.pooled for encoding in self.encodings)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """Captions are read as the pipeline reads prompts."""
        return PromptEncoder(self.encodings, self.conditioning)

    @property
    def caption_ids(self) -> "CaptionIds":
        """Texts to packed layouts, in the loading processes, which hold no model."""
        encoder = self.prompt_encoder
        readers = tuple((encoding.tokenizer, encoding.context) for encoding in encoder.encodings)
        return CaptionIds(readers, encoder.conditioning)


def write_attention_out(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Attention without torch's fused kernel where that is slow: on CPUs, at small heads, backwards and in bfloat16.

    Written out it holds (tokens)^2 numbers, so only UNets of small latents are changed.
    """
    if device.type == "cpu" and int(cast(Any, unet.config).sample_size) <= SMALL_LATENTS:
        unet.set_attn_processor(AttnProcessor())


# -- encoding ------------------------------------------------------------------------------------------------


def picture_transform(
    resolution: int, random_crop: bool = False, flip: bool = False, sizes: bool = False
) -> Callable[[Any], Any]:
    """RGB picture -> (3, resolution, resolution) from -1 to 1, as the VAE reads it.

    With `sizes` each picture comes with its time ids (6,) for Stable Diffusion XL's UNet: see `SizedPicture`.
    """
    steps: list[Any] = [v2.Resize(resolution, v2.InterpolationMode.BICUBIC)]
    steps.append(v2.RandomCrop(resolution) if random_crop else v2.CenterCrop(resolution))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    transform = v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    return SizedPicture(transform) if sizes else transform


@dataclass(frozen=True)
class SizedPicture:
    """RGB picture -> (3, H, W), and (6,): height and width of the file's picture, top and left of the crop in the
    resized (and mirrored) one, height and width of the crop.

    These are the micro-conditionings that Stable Diffusion XL was trained with (Podell et al. 2023, section 2.2). For
    example 1920 x 1080 pixels brought to 1024 x 1024 are (1080, 1920, 0, 398, 1024, 1024).
    """

    transform: Callable[..., Any]

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        width, height = picture.size
        # A box around all of it goes the picture's way; behind the crop its corner says where that begins.
        corners = [[0.0, 0.0, float(width), float(height)]]
        options: Any = {"format": "XYXY", "canvas_size": (height, width), "clamping_mode": None}
        image_CHW, box_14 = self.transform(picture, tv_tensors.BoundingBoxes(corners, **options))
        left, top = (-round(corner) for corner in box_14[0, :2].tolist())
        original_width, original_height = picture.info.get("original_size", picture.size)
        return image_CHW, torch.tensor([original_height, original_width, top, left, *image_CHW.shape[1:]]).float()


@dataclass(frozen=True)
class CaptionIds:
    """Texts -> (B, 4 T, S) int64: their layouts for T text encoders, so packed that they travel through a `Batch`; see
    `pack_layouts`."""

    readers: tuple[tuple[FixClipTokenizer, Context], ...]
    conditioning: Conditioning

    def __call__(self, texts: list[str]) -> Tensor:
        packed = []
        for tokenizer, context in self.readers:
            layouts = [self.conditioning.lay_out(tokenize_prompt(tokenizer, text), context) for text in texts]
            packed.append(pack_layouts(layouts))
        return torch.cat(packed, dim=1)


def pack_layouts(layouts: Sequence[Layout]) -> Tensor:
    """B layouts -> (B, 4, S) int64, filled up with -1: ids and token numbers of the N * P positions, the position that
    each row of the embeds comes from, and the pass length P at every position.

    S is the largest number of positions of a caption, which is never below its number of rows.
    """
    rows = []
    for layout in layouts:
        ids_S = layout.ids_NP.flatten()
        source_S = torch.nn.functional.pad(layout.source_L, (0, len(ids_S) - len(layout)), value=-1)
        size_S = torch.full_like(ids_S, layout.ids_NP.shape[1])
        rows.append(torch.stack([ids_S, layout.token_NP.flatten(), source_S, size_S], dim=1))
    return pad_sequence(rows, batch_first=True, padding_value=-1).transpose(1, 2).contiguous()


def unpack_layouts(packed_B4S: Tensor) -> list[Layout]:
    """The layouts that `pack_layouts` packed; all weights are 1."""
    layouts = []
    for ids_S, token_S, source_S, size_S in packed_B4S.cpu().unbind():
        size = int(size_S[0])
        ids_NP, token_NP = (part[size_S >= 0].unflatten(0, (-1, size)) for part in (ids_S, token_S))
        layouts.append(Layout(ids_NP, token_NP, source_S[source_S >= 0], torch.ones(ids_NP.shape)))
    return layouts


def layouts_of(encodings: Sequence[TextEncoding], packed_BRS: Tensor) -> list[tuple[TextEncoding, list[Layout]]]:
    """Each text encoder with its layouts of B captions, which `CaptionIds` packed (R = 4 T)."""
    parts = packed_BRS.chunk(len(encodings), dim=1)
    return [(encoding, unpack_layouts(part)) for encoding, part in zip(encodings, parts, strict=True)]


def tokens_of(layout: Layout) -> PromptTokens:
    """The tokens that a layout reads, each once, for another encoder to read them."""
    read_NP = layout.token_NP >= 0
    ids = torch.zeros(layout.num_read, dtype=torch.long)
    ids[layout.token_NP[read_NP]] = layout.ids_NP[read_NP]
    count = len(ids)
    levels = (int(Break.WORD),) * count
    return PromptTokens("", tuple(ids.tolist()), ((0, 0),) * count, levels, (1.0,) * count)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures to mean and log variance of their latents, float32 (B, C, H, W) each."""
    latents = vae.encode(image_BCHW.to(vae.device, vae.dtype)).latent_dist
    return latents.mean.float(), latents.logvar.float()


@torch.no_grad()
def encode_captions(frozen: FrozenModels, packed_BRS: Tensor) -> CaptionStates:
    """Captions, as `frozen.caption_ids` packs them, to the hidden states of their passes, without adapter."""
    found: list[Tensor] = []
    pooled_BE = None
    for encoding, layouts in layouts_of(frozen.encodings, packed_BRS):
        states, pooled = encode_passes(_on_its_device(encoding), layouts, encoding.context)
        found.append(pad_sequence([part.flatten(0, 1) for part in states], batch_first=True))
        pooled_BE = torch.stack(pooled) if pooled else pooled_BE
    # All text encoders read the same tokens at the same places (`check_encodings`); the last one's layouts serve all.
    device, ends = found[0].device, encoding.context.end_id
    text = [positions_of_text(layout.ids_NP, ends).flatten() for layout in layouts]
    return CaptionStates(
        states=torch.cat(found, dim=-1),
        text=pad_sequence(text, batch_first=True, padding_value=-1).to(device),
        source=pad_sequence([layout.source_L for layout in layouts], batch_first=True, padding_value=-1).to(device),
        size=torch.tensor([layout.ids_NP.shape[1] for layout in layouts], device=device),
        pooled=pooled_BE,
    )


def _on_its_device(encoding: TextEncoding) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    return lambda ids_NP: encoding(ids_NP.to(encoding.encoder.device))


@torch.no_grad()
def encode_for_teacher(frozen: FrozenModels, packed_BRS: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Hidden states (B, 77, D) of the base's own encoder, its pooled vectors (B, E) or None, and whether (B,) it reads
    all of each caption."""
    found, pooled_BE = [], None
    for teacher, layouts in layouts_of(frozen.teachers, packed_BRS):
        # A base without its original positions cannot teach (`check_frozen`), but its states are recorded all the same.
        context = replace(teacher.context, short_length=teacher.context.short_length or CLIP_CONTEXT_LENGTH)
        tokens = [tokens_of(layout) for layout in layouts]
        ids = torch.cat([Stock().lay_out(part, context).ids_NP for part in tokens])
        states, pooled = _on_its_device(teacher)(ids)
        found.append(states)
        pooled_BE = pooled if pooled is not None else pooled_BE
    fits = [len(part) + SPECIAL_TOKENS <= context.short_length for part in tokens]
    return torch.cat(found, dim=-1), pooled_BE, torch.tensor(fits, device=found[0].device)


@torch.no_grad()
def encode_windows_for_teacher(
    frozen: FrozenModels, packed_BRS: Tensor, plain_BRS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row of the captions' embeds would be if the base's own encoder read them in overlapping windows.

    The teacher reads a caption's plain wording where there is one (`Sample.plain`).

    Returns:
        (B, L, D): the hidden state of the same token, start or end; 0 for padding behind a text of more than 77 tokens.
        The base's own padding is part of what it gives for a text that fits.
        (B, L): False for tokens that the plain wording lacks: nothing is taught there.
        (B, L): mean squared difference of these hidden states to those of the caption as it stands, read in the same
        windows; 0 where there is nothing to teach.
    """
    layouts = [part for _, part in layouts_of(frozen.teachers, packed_BRS)]
    wordings = layouts if plain_BRS is None else [part for _, part in layouts_of(frozen.teachers, plain_BRS)]
    rows, known = _window_rows(frozen, layouts, wordings)
    gap = [row_LD.new_zeros(len(row_LD), dtype=torch.float32) for row_LD in rows]
    pairs = enumerate(zip(layouts[0], wordings[0], strict=True))
    if others := [number for number, (own, plain) in pairs if tokens_of(own).ids != tokens_of(plain).ids]:
        reworded = [[part[number] for number in others] for part in layouts]
        literal, _ = _window_rows(frozen, reworded, reworded)
        for number, own_LD in zip(others, literal, strict=True):
            gap[number] = (rows[number] - own_LD).float().square().mean(-1) * known[number]
    return (
        pad_sequence(rows, batch_first=True),
        pad_sequence(known, batch_first=True),
        pad_sequence(gap, batch_first=True),
    )


def _window_rows(
    frozen: FrozenModels, layouts: Sequence[Sequence[Layout]], wordings: Sequence[Sequence[Layout]]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each row of `layouts` the teachers' hidden states of the same token of another wording, (L, D), and whether
    (L,) there is one. Layouts are given for each teacher; all of them have the same tokens at the same places."""
    columns: list[list[Tensor]] = []
    for teacher, own, plain in zip(frozen.teachers, layouts, wordings, strict=True):
        taught = [TEACHERS_READING.lay_out(tokens_of(layout), teacher.context) for layout in plain]
        states, _ = encode_passes(_on_its_device(teacher), taught, teacher.context)
        rows, known = [], []
        for layout, other, part in zip(own, taught, states, strict=True):
            wanted_LD = torch.cat([other.join(part), part.new_zeros(1, part.shape[-1])])
            row_L = row_of_same_token(layout, other, teacher.context.end_id).to(part.device)
            rows.append(wanted_LD[row_L.clamp(min=0)])
            known.append(row_L >= 0)
        columns.append(rows)
    return [torch.cat(parts, dim=-1) for parts in zip(*columns, strict=True)], known


def row_of_same_token(layout: Layout, other: Layout, end_id: int) -> Tensor:
    """(L,) for each row of `layout`, the row of `other` that holds the same token; len(other) for padding that `other`
    has not, and -1 for a token that it lacks, being another wording of the caption.

    `other` has a row for every token: start, tokens, end, and perhaps padding.
    """
    none, place_L = len(other), layout.source_L % layout.ids_NP.shape[1]
    is_text_L = positions_of_text(layout.ids_NP, end_id).flatten()[layout.source_L].bool()
    own, others = shared_tokens(tokens_of(layout).ids, tokens_of(other).ids)
    row_of = {token: row + 1 for token, row in zip(own, others, strict=True)}
    token_row_L = torch.tensor([row_of.get(token, -1) for token in layout.token_L.tolist()])
    row_L = torch.where(layout.token_L >= 0, token_row_L, torch.where(place_L == 0, 0, other.num_read + 1))
    # A text that fits into 77 tokens has the base's own padding behind it, at the same places.
    fits = len(layout.ids_NP) == 1 and len(other) > layout.num_read + SPECIAL_TOKENS
    padding_L = torch.where(place_L < none, place_L, none) if fits else torch.full_like(place_L, none)
    return torch.where(is_text_L, row_L, padding_L)


def encode_batch(frozen: FrozenModels, batch: Batch, objectives: ObjectivesSection) -> Features:
    """A batch of pictures, or of cached latents (`CachedLatents`), and captions -> features.

    Latents, short captions and teacher states that the objectives do not read are not computed; other tensors stand
    there, or None.
    """
    if not objectives.reads_noise:
        mean = logvar = no_latents(frozen, len(batch)).to(batch.image.device)
    elif batch.image.shape[1] == 2 * cast(Any, frozen.vae.config).latent_channels:
        mean, logvar = batch.image.chunk(2, dim=1)
    else:
        mean, logvar = encode_pictures(frozen.vae, batch.image)
    long = short = encode_captions(frozen, batch.long_ids)
    if objectives.reads_short:
        short = encode_captions(frozen, batch.short_ids)
    fits = torch.zeros(len(batch), dtype=torch.bool, device=short.states.device)
    teacher, pooled = short.states[:, :1], short.pooled
    if objectives.is_taught:
        teacher, pooled, fits = encode_for_teacher(frozen, batch.short_ids)
    windows: dict[str, Tensor] = {}
    if objectives.reads_windows:
        found = encode_windows_for_teacher(frozen, batch.long_ids, batch.plain_ids)
        windows = dict(zip(WINDOWS, found, strict=True))
    return Features(
        mean=mean,
        logvar=logvar,
        long=long,
        short=short,
        teacher=teacher,
        teacher_fits=fits,
        seeds=batch.seeds,
        keys=batch.keys,
        skipped=batch.skipped,
        teacher_pooled=pooled,
        time_ids=batch.sizes,
        **windows,
    )


def no_latents(frozen: FrozenModels, count: int) -> Tensor:
    """(B, C, 1, 1) of zeros in place of latents that nothing reads."""
    return torch.zeros(count, cast(Any, frozen.vae.config).latent_channels, 1, 1)


def empty_states(frozen: FrozenModels) -> tuple[CaptionStates, Tensor, Tensor | None]:
    """What the UNet reads for no caption: the encoder's states, and (1, 77, D) and (1, E) or None of the base's own.

    A base of `zeros_for_empty` has 77 rows of zeros there and a pooled vector of zeros, which no adapter changes.
    """
    packed = frozen.caption_ids([""])
    empty, (teacher, pooled, _) = encode_captions(frozen, packed), encode_for_teacher(frozen, packed)
    if not frozen.zeros_for_empty:
        return empty, teacher, pooled
    rows_1L = torch.arange(teacher.shape[1], device=teacher.device)[None]
    zeros = torch.zeros_like(teacher)
    no_pooled = None if pooled is None else torch.zeros_like(pooled)
    nothing = CaptionStates(zeros, torch.full_like(rows_1L, -1), rows_1L, torch.tensor([len(rows_1L[0])]), no_pooled)
    return nothing.map(lambda tensor: tensor.to(teacher.device)), zeros, no_pooled


# -- what a cache was made with ------------------------------------------------------------------------------


def cache_key(recipe: AdapterRecipe, frozen: FrozenModels, resolution: int) -> dict[str, Any]:
    """All that a cached feature depends on but the sample itself."""
    section = recipe.features
    key: dict[str, Any] = {
        "vae": weights_digest(frozen.vae),
        "resolution": resolution,
        "draft": recipe.data.draft,
        "dtype": section.dtype,
        "precision": recipe.train.precision,
        "shard_size": section.shard_size,
        "source": recipe.data.source,
        "start": recipe.data.start,
        "text": section.text,
        "caption filters": recipe.captions.model_dump(mode="json", exclude=SHORT_CAPTIONS),
        "given short captions": recipe.captions.short_caption == "given",
    }
    if frozen.reads_sizes:
        key["sizes of pictures"] = True
    if section.text:
        for encoding, teacher in zip(frozen.encodings, frozen.teachers, strict=True):
            key |= {
                encoding.tower.encoder: weights_digest(encoding.encoder),
                f"base {encoding.tower.encoder}": weights_digest(teacher.encoder),
                encoding.tower.tokenizer: tokenizer_digest(encoding.tokenizer),
            }
        key["captions"] = recipe.captions.model_dump(mode="json")
        conditioning = {"name": frozen.prompt_encoder.conditioning.name}
        key["conditioning"] = asdict(frozen.encodings[0].context) | conditioning
        if recipe.objectives.reads_windows:
            key[WINDOW_STATES] = True
        read = {LATENTS: recipe.objectives.reads_noise, SHORT: recipe.objectives.reads_short}
        if unread := [part for part, is_read in read.items() if not is_read]:
            key[WITHOUT] = unread
    return key


def parts_of(key: dict[str, Any]) -> set[str]:
    """What a cache of this key holds beside long captions."""
    parts = {LATENTS, SHORT} if key["text"] else {LATENTS}
    return (parts | ({WINDOW_STATES} if key.get(WINDOW_STATES) else set())) - set(key.get(WITHOUT, []))


# -- the cache -----------------------------------------------------------------------------------------------


class FeatureCache:
    """A complete or growing cache; see the top of this file.

    Args:
        folder: where it is or will be.
        key: see `cache_key`.
        source: the samples; their fingerprints (captions, file sizes and times) belong to each file's key.
        config: which of the samples.
        section: sizes and precision.

    Raises:
        ValueError: the folder holds a cache that was made with something else, named in the message, or one of
            samples that have changed since.
    """

    def __init__(self, folder: Path, key: dict[str, Any], source: Source, config: DataConfig, section: FeaturesSection):
        self.folder, self.section, self.source = folder, section, source
        self.indices = sample_range(source.sizes, config)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.own_key, self.read_parts = key, parts_of(key)
        self.look()

    def look(self) -> None:
        """See what the folder holds and lacks by now.

        Raises:
            ValueError: see the class.
        """
        self.key = self._agreed_key(self.own_key)
        self.parts = parts_of(self.key)
        self._sample_keys = [self._key_of(self._range(number)) for number in range(len(self))]
        self.missing = [number for number in range(len(self)) if not self._is_done(number)]

    def __len__(self) -> int:
        """Files."""
        return -(-len(self.indices) // self.section.shard_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _range(self, number: int) -> range:
        size = self.section.shard_size
        return self.indices[number * size : (number + 1) * size]

    def _key_of(self, samples: range) -> str:
        return _digest([self.key, [self.source.fingerprint(index) for index in samples]])

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _agreed_key(self, key: dict[str, Any]) -> dict[str, Any]:
        """That of the folder, which may hold more than is read now; `key` of a new one."""
        path = self.folder / KEY_FILE
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return key
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        names = [name for name in {**key, **found} if name not in (WITHOUT, WINDOW_STATES)]
        other = [name for name in names if key.get(name) != found.get(name)]
        if "text" in other:  # and all that belongs to it
            other = ["text"]
        if other:
            raise ValueError(
                f"features.folder={str(self.folder)!r}: this cache was made with another "
                f"{', another '.join(_with_values(name, found.get(name), key.get(name)) for name in other)}; delete it "
                "or choose another folder"
            )
        if lacking := parts_of(key) - parts_of(found):
            raise ValueError(
                f"features.folder={str(self.folder)!r}: this cache has no {' and no '.join(sorted(lacking))}, which "
                "nothing read when it was made; delete it or choose another folder"
            )
        return dict(found)

    def _is_done(self, number: int) -> bool:
        path = self._path(number)
        if not path.exists():
            return False
        samples = self._range(number)
        try:
            with safe_open(path, framework="pt") as file:
                found, (count,) = file.metadata()["key"], file.get_slice("row").get_shape()
        except Exception as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, and it will be made again") from None
        if count < len(samples):  # the last file, of a smaller `data.stop`
            return False
        try:
            key = self._key_of_file(number, count)
        except IndexError:
            raise ValueError(
                f"{path}: holds samples up to {samples.start + count - 1}, which {self.key['source']} has no more, so "
                f"whether they have changed cannot be told; choose another features.folder than "
                f"{str(self.folder)!r}, or delete the file, and it will be made again up to data.stop={samples.stop}"
            ) from None
        if found != key:
            raise ValueError(
                f"{path}: stale: captions or pictures among samples {samples.start} to {samples.stop - 1} of "
                f"{self.key['source']} have changed since; delete it, and it will be made again"
            )
        return True

    def _key_of_file(self, number: int, count: int) -> str:
        """Of a file's `count` samples; of one that was made for a larger `data.stop`, the first are read.

        Raises:
            IndexError: the source has fewer.
        """
        samples = self._range(number)
        if count == len(samples):
            return self._sample_keys[number]
        return self._key_of(range(samples.start, samples.start + count))

    @property
    def missing_samples(self) -> list[int]:
        return [index for number in self.missing for index in self._range(number)]

    def missing_bytes(self, reader: Batches, frozen: FrozenModels) -> int:
        """About what `build` will write, by the first samples that are missing."""
        indices = self.missing_samples
        samples = self._samples(reader, indices[: self.section.batch_size])
        found = [samples[position] for position in range(len(samples))]
        rows = [row for row in found if not isinstance(row, Skipped)]
        if not rows:
            return 0
        size = sum(t.numel() * t.element_size() for t in self._encode(rows, reader, frozen).values())
        return len(indices) * size // len(rows)

    def build(self, reader: Batches, frozen: FrozenModels) -> None:
        """Make the files that are missing; processes that build together make every n-th of them each.

        Args:
            reader: reads and transforms the samples; it says which process this one is.
            frozen: encodes them.
        """
        if not self.missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if reader.rank == 0:
            write_atomically(self.folder / KEY_FILE, json.dumps(self.key, indent=1).encode())
        mine = self.missing[reader.rank :: reader.world_size]
        loader = DataLoader(
            self._samples(reader, [index for number in mine for index in self._range(number)]),
            batch_size=None,
            num_workers=loading_workers(reader.config.workers),
            generator=torch.Generator().manual_seed(0),  # leaves the global one alone
        )
        with tqdm(loader, "caching", unit="sample", disable=reader.rank != 0 or not mine) as bar:
            samples = iter(bar)
            for number in mine:
                self._write(number, samples, reader, frozen)
        self.missing = []

    def _samples(self, reader: Batches, indices: Sequence[int]) -> "_Samples":
        return _Samples(reader, indices, pictures=LATENTS in self.parts)

    def _write(
        self, number: int, samples: Iterator[LoadedSample | Skipped], reader: Batches, frozen: FrozenModels
    ) -> None:
        """Encode one file's samples as they come; only `batch_size` pictures are in memory at a time."""
        parts: list[dict[str, Tensor]] = []
        pending: list[LoadedSample] = []
        row_of: list[int] = []
        keys: list[str] = []
        skipped: dict[str, Any] = {}
        for local in range(len(self._range(number))):
            row = next(samples)
            row_of.append(-1 if isinstance(row, Skipped) else len(keys))
            if isinstance(row, Skipped):
                skipped[str(local)] = asdict(row)
                continue
            keys.append(row[4])
            pending.append(row)
            if len(pending) == self.section.batch_size:
                parts.append(self._encode(pending, reader, frozen))
                pending = []
        if pending:
            parts.append(self._encode(pending, reader, frozen))
        tensors = {"row": torch.tensor(row_of)}
        for name in parts[0] if parts else ():
            tensors[name] = _stacked([row for part in parts for row in part[name]]).contiguous()
        metadata = {"key": self._sample_keys[number], "skipped": json.dumps(skipped), "keys": json.dumps(keys)}
        try:
            write_atomically(self._path(number), save(tensors, metadata))
        except OSError as error:
            raise OSError(
                f"features.folder={str(self.folder)!r}: {error}. The files before it are whole: the same command "
                "goes on from them"
            ) from error

    def _encode(self, rows: Sequence[LoadedSample], reader: Batches, frozen: FrozenModels) -> dict[str, Tensor]:
        pictures, longs, shorts = ([row[i] for row in rows] for i in range(3))
        sizes, mean = None, no_latents(frozen, len(rows))
        tensors = {"mean": mean, "logvar": mean.clone()}
        if LATENTS in self.parts:
            images, sizes = stack_pictures(cast(list[Picture], pictures))
            tensors["mean"], tensors["logvar"] = encode_pictures(frozen.vae, images)
        if self.section.text:
            long_ids = reader.tokenizer(cast(list[str], longs))
            tensors |= encode_captions(frozen, long_ids).tensors("long")
        if SHORT in self.parts:
            short_ids = reader.tokenizer(cast(list[str], shorts))
            tensors |= encode_captions(frozen, short_ids).tensors("short")
            tensors["teacher"], pooled, tensors["teacher_fits"] = encode_for_teacher(frozen, short_ids)
            tensors |= {} if pooled is None else {"teacher_pooled": pooled}
        if WINDOW_STATES in self.parts:
            plain_ids = reader.tokenizer([row[5] for row in rows])
            windows = encode_windows_for_teacher(frozen, long_ids, plain_ids)
            tensors |= dict(zip(WINDOWS, windows, strict=True))
        dtype = DTYPES[self.section.dtype]
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        tensors |= {} if sizes is None else {"time_ids": sizes}  # whole pixels, which fp16 rounds from 2048 on
        return {name: t.cpu() for name, t in tensors.items()}

    def _is_read(self, name: str) -> bool:
        """Whether a tensor of a file belongs to what is read."""
        part = WINDOW_STATES if name in WINDOWS else SHORT if name.startswith(("short.", "teacher")) else None
        return part is None or part in self.read_parts

    def read(self, index: int) -> tuple[dict[str, Tensor], str]:
        """One sample's tensors, floats in float32, and its key.

        Raises:
            BadSampleError: it could not be used when the cache was made.
            ValueError: its file is another one by now.
        """
        number, local = divmod(index - self.indices.start, self.section.shard_size)
        if number not in self._open:
            self._open[number] = self._opened(number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        file = self._open[number]
        row = int(file.get_slice("row")[local : local + 1])
        if row < 0:
            found = Skipped(**json.loads(file.metadata()["skipped"])[str(local)])
            raise BadSampleError(found.reason, found.file, found.key, found.detail)
        names = [name for name in file.keys() if name != "row" and self._is_read(name)]  # noqa: SIM118
        tensors = {name: file.get_slice(name)[row : row + 1][0] for name in names}
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        return floats, json.loads(file.metadata()["keys"])[row]

    def _opened(self, number: int) -> Any:
        path = self._path(number)
        file = safe_open(path, framework="pt")
        with suppress(IndexError):
            (count,) = file.get_slice("row").get_shape()
            if file.metadata()["key"] == self._key_of_file(number, count):
                return file
        raise ValueError(
            f"{path}: made anew since this training began, with other models, captions, pictures or settings; start it "
            "again with another features.folder"
        )


def _with_values(name: str, then: Any, now: Any) -> str:
    """A part of a cache's key with what it was and is, where that is not a digest or all of a section."""
    short = not any(isinstance(value, dict) or len(str(value)) == 64 for value in (then, now))
    return f"{name} ({then}, now {now})" if short else name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows of a batch; captions as long as the longest among them, filled up with 0 or False, or -1 for positions."""
    fill = 0 if rows[0].is_floating_point() or rows[0].dtype == torch.bool else -1
    return pad_sequence(rows, batch_first=True, padding_value=fill) if rows[0].ndim else torch.stack(rows)


class _Samples(Dataset):
    """Samples by their number, loaded and transformed as in the first epoch; without pictures None in their place."""

    def __init__(self, reader: Batches, indices: Sequence[int], *, pictures: bool):
        self.reader, self.indices, self.pictures = reader, indices, pictures

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> LoadedSample | Skipped:
        index = self.indices[position]
        try:
            if self.pictures:
                return self.reader.load(0, index)
            sample, long, short = self.reader.captions(0, index)
            return cast(Picture, None), long, short, 0, sample.key, plain_wording(sample, long), ""
        except BadSampleError as error:
            return error.skipped


class CachedBatches(Batches):
    """The samples of `reader` in the same order, read from a cache that is complete by then."""

    def __init__(self, reader: Batches, cache: FeatureCache):
        self.cache = cache
        super().__init__(
            reader.source,
            reader.config,
            reader.transform,
            reader.tokenizer,
            reader.rank,
            reader.world_size,
            reader.draft_size,
        )

    def sample_bytes(self) -> int:
        """Of the first sample that can be used; 0 while the cache is not complete."""
        for index in () if self.cache.missing else self.cache.indices:
            with suppress(BadSampleError):
                return sum(tensor.nbytes for tensor in self.cache.read(index)[0].values())
        return 0


class CachedLatents(CachedBatches):
    """Batches whose `image` holds a cache's mean and log variance (B, 2 C, H, W); captions come from the source."""

    def load(self, epoch: int, index: int) -> LoadedSample:
        tensors, key = self.cache.read(index)
        sample, long, short = self.captions(epoch, index)
        seed = sample_seeds(self.config.seed, epoch, index)[2]
        moments = torch.cat([tensors["mean"], tensors["logvar"]])
        picture = (moments, tensors["time_ids"]) if "time_ids" in tensors else moments
        return picture, long, short, seed, key, plain_wording(sample, long), ""


class CachedFeatures(CachedBatches):
    """Batches of features that a cache holds completely: `Features` instead of `Batch`."""

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, number = item
        skipped: list[Skipped] = []
        positions, taken = self.positions(number, epoch)
        rows: list[Any] = [self._usable_sample(epoch, position, taken, skipped) for position in positions]
        if any(row is None for row in rows):
            return skipped
        tensors, keys, seeds = zip(*rows, strict=True)
        joined: dict[str, Any] = {name: _stacked([row[name] for row in tensors]) for name in tensors[0]}
        long = short = CaptionStates.from_tensors("long", joined)
        if SHORT in self.cache.read_parts:
            short = CaptionStates.from_tensors("short", joined)
        else:  # as in `encode_batch`
            joined |= {"teacher": short.states[:, :1], "teacher_fits": torch.zeros(len(rows), dtype=torch.bool)}
            joined |= {} if short.pooled is None else {"teacher_pooled": short.pooled}
        joined = {name: value for name, value in joined.items() if "." not in name}
        return Features(**joined, long=long, short=short, seeds=torch.tensor(seeds), keys=list(keys), skipped=skipped)

    def load(self, epoch: int, index: int) -> Any:
        tensors, key = self.cache.read(index)
        return tensors, key, sample_seeds(self.config.seed, epoch, index)[2]
