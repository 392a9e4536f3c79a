"""What the frozen models make of pictures and captions, computed at every step or once, into a cache.

The cache is a folder of safetensors files of `shard_size` samples each. It holds the mean and log variance of the
latents, so that every step samples them anew, and on demand the text states. features.json says what it was made
with; a cache of other weights, preprocessing, tokenizer or captions is refused. A file appears when it is complete,
so an interrupted run goes on where it stopped.

Shape letters: B samples, C latent channels, H, W latent height and width, T tokens, D width.
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import Batch, Batches, LoadedSample
from fixclip_core.data.order import sample_range, sample_seeds
from fixclip_core.data.samples import BadSampleError, Skipped
from fixclip_core.data.sources import Source
from fixclip_core.files import write_atomically
from fixclip_diffusion.adapter_training.objectives import Features
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe, FeaturesSection, ObjectivesSection
from fixclip_diffusion.conditioning import split_windows
from fixclip_diffusion.text_encoder import (
    CLIP_CONTEXT_LENGTH,
    NO_WINDOW,
    WINDOW_STRIDE,
    FixClipTextEncoder,
    FixClipTokenizer,
    join_overlapping,
    overlapping_windows,
)

logger = logging.getLogger(__name__)

KEY_FILE = "features.json"
MADE_FOR = "made_for.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
SHORT_CAPTIONS = {"short_caption", "max_short_sentences", "drop_short_from_long"}
SMALL_LATENTS = 16  # side
_OPEN_SHARDS = 16


@dataclass(frozen=True)
class FrozenModels:
    """What training reads and does not change.

    `teacher` is the base's own text encoder, `scheduler` the noise schedule, `sampler` the base's own scheduler,
    `long_prompt` how `text_encoder` reads long captions: see `BaseSection`.
    """

    vae: AutoencoderKL
    text_encoder: FixClipTextEncoder
    teacher: FixClipTextEncoder
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    sampler: Any
    tokenizer: FixClipTokenizer
    long_prompt: str = "windows"

    @property
    def modules(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.teacher, self.unet]

    @property
    def in_windows(self) -> bool:
        """Whether captions are read in windows of 77 tokens."""
        return self.long_prompt in ("windows_77", "overlap_77")

    @property
    def overlap(self) -> bool:
        """Whether these windows overlap."""
        return self.long_prompt == "overlap_77"

    @property
    def caption_ids(self) -> "TokenIds | WindowIds":
        """Texts to the ids that the functions below read."""
        return WindowIds(self.tokenizer, self.overlap) if self.in_windows else TokenIds(self.tokenizer)


def write_attention_out(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Attention without torch's fused kernel where that is slow: on CPUs, at small heads, backwards and in bfloat16.

    Written out it holds (tokens)^2 numbers, so only UNets of small latents are changed.
    """
    if device.type == "cpu" and int(cast(Any, unet.config).sample_size) <= SMALL_LATENTS:
        unet.set_attn_processor(AttnProcessor())


# -- encoding ------------------------------------------------------------------------------------------------


def picture_transform(resolution: int, random_crop: bool = False, flip: bool = False) -> Callable[[Any], Tensor]:
    """RGB picture -> (3, resolution, resolution) from -1 to 1, as the VAE reads it."""
    steps: list[Any] = [v2.Resize(resolution, v2.InterpolationMode.BICUBIC)]
    steps.append(v2.RandomCrop(resolution) if random_crop else v2.CenterCrop(resolution))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])


@dataclass(frozen=True)
class TokenIds:
    """Texts -> (B, context_length) ids, padded and cut as the pipeline does it."""

    tokenizer: FixClipTokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        return _padded_ids(self.tokenizer, texts, self.tokenizer.context_length)


@dataclass(frozen=True)
class WindowIds:
    """Texts -> (B, W * 77) ids of W windows of 77 tokens, as many as the longest text has; see `num_windows`.

    Each window is cut and padded as the pipeline with long_prompt="windows_77" does it, or "overlap_77", which reads
    248 tokens here at most. The ids behind a text's last window are NO_WINDOW.
    """

    tokenizer: FixClipTokenizer
    overlap: bool = False

    def __call__(self, texts: list[str]) -> Tensor:
        if self.overlap:
            ids_BT = TokenIds(self.tokenizer)(texts)
            return overlapping_windows(ids_BT, num_tokens(ids_BT, self.tokenizer)).flatten(1)
        clean = [self.tokenizer.clean(text) for text in texts]
        windows = [split_windows(self.tokenizer, text, CLIP_CONTEXT_LENGTH) for text in clean]
        ids = [_padded_ids(self.tokenizer, pieces, CLIP_CONTEXT_LENGTH).flatten() for pieces in windows]
        return pad_sequence(ids, batch_first=True, padding_value=NO_WINDOW)


def _padded_ids(tokenizer: FixClipTokenizer, texts: Sequence[str], length: int) -> Tensor:
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(list(texts), **options, return_tensors="pt").input_ids


def num_windows(ids_BT: Tensor) -> Tensor:
    """(B,) windows of each text, from the ids of `WindowIds`."""
    return (ids_BT[:, ::CLIP_CONTEXT_LENGTH] != NO_WINDOW).sum(1)


def num_tokens_in_windows(ids_BT: Tensor, tokenizer: FixClipTokenizer) -> Tensor:
    """(B,) tokens of each text, start and end included, from the ids of overlapping `WindowIds`."""
    last_B = num_windows(ids_BT) - 1
    last_BT = ids_BT.unflatten(1, (-1, CLIP_CONTEXT_LENGTH))[torch.arange(len(ids_BT), device=ids_BT.device), last_B]
    return WINDOW_STRIDE * last_B + num_tokens(last_BT, tokenizer)


def num_tokens(ids_BT: Tensor, tokenizer: FixClipTokenizer) -> Tensor:
    """(B,) tokens of each text, start and end included."""
    return (ids_BT == tokenizer.eos_token_id).int().argmax(1) + 1


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures to mean and log variance of their latents, float32 (B, C, H, W) each."""
    latents = vae.encode(image_BCHW.to(vae.device, vae.dtype)).latent_dist
    return latents.mean.float(), latents.logvar.float()


@torch.no_grad()
def encode_captions(frozen: FrozenModels, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of `frozen.caption_ids` to states (B, T, D) without adapter and how many (B,) of them; those behind are 0.

    As in the pipeline, a caption that fits into the encoder's original positions is read with them, and so is each
    window of `WindowIds`.
    """
    encoder = frozen.text_encoder
    ids_BT = ids_BT.to(encoder.device)
    if frozen.in_windows:
        return _encode_windows(encoder, ids_BT)
    fits_B = num_tokens(ids_BT, frozen.tokenizer) <= encoder.short_context_length
    length_B = torch.where(fits_B, encoder.short_context_length, encoder.context_length)
    states = torch.zeros((*ids_BT.shape, encoder.config.hidden_size), dtype=encoder.dtype, device=encoder.device)
    for length in sorted(set(length_B.tolist())):
        chosen = (length_B == length).nonzero()[:, 0]
        states[chosen, :length] = encoder(ids_BT[chosen, :length]).last_hidden_state
    return states[:, : int(length_B.max())], length_B


def _encode_windows(encoder: FixClipTextEncoder, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    ids_BWT = ids_BT.unflatten(1, (-1, CLIP_CONTEXT_LENGTH))
    shape = (*ids_BWT.shape, encoder.config.hidden_size)
    states_BWTD = torch.zeros(shape, dtype=encoder.dtype, device=encoder.device)
    read_BW = ids_BWT[..., 0] != NO_WINDOW
    states_BWTD[read_BW] = encoder(ids_BWT[read_BW]).last_hidden_state
    length_B = CLIP_CONTEXT_LENGTH * num_windows(ids_BT)
    return states_BWTD.flatten(1, 2)[:, : int(length_B.max())], length_B


@torch.no_grad()
def encode_for_teacher(frozen: FrozenModels, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, S, D) of the base's own encoder, and whether (B,) each caption fits into its positions.

    Args:
        frozen: its teacher reads them.
        ids_BT: of `frozen.caption_ids`.
    """
    teacher = frozen.teacher
    ids_BT, length = ids_BT.to(teacher.device), teacher.short_context_length or CLIP_CONTEXT_LENGTH
    fits_B = num_windows(ids_BT) == 1 if frozen.in_windows else num_tokens(ids_BT, frozen.tokenizer) <= length
    return teacher(ids_BT[:, :length]).last_hidden_state, fits_B


@torch.no_grad()
def encode_windows_for_teacher(frozen: FrozenModels, ids_BT: Tensor) -> Tensor:
    """States (B, T, D) of the base's own encoder, which reads each caption in windows of 77, every token at its place.

    The windows overlap, see `join_overlapping`, unless the encoder's own are read one behind the other.

    Args:
        frozen: its teacher reads them.
        ids_BT: of `frozen.caption_ids`.
    """
    ids_BT = ids_BT.to(frozen.teacher.device)
    if frozen.in_windows and not frozen.overlap:
        return _encode_windows(frozen.teacher, ids_BT)[0]
    if frozen.overlap:
        tokens_B = num_tokens_in_windows(ids_BT, frozen.tokenizer)
    else:
        tokens_B = num_tokens(ids_BT, frozen.tokenizer)
        ids_BT = overlapping_windows(ids_BT, tokens_B).flatten(1)
    states_BSD, _ = _encode_windows(frozen.teacher, ids_BT)
    states_BWTD = states_BSD.unflatten(1, (-1, CLIP_CONTEXT_LENGTH))
    return join_overlapping(states_BWTD, tokens_B, frozen.tokenizer.context_length)


def encode_batch(frozen: FrozenModels, batch: Batch, objectives: ObjectivesSection) -> Features:
    """A batch of pictures, or of cached latents (`CachedLatents`), and captions -> features.

    Latents, short captions and teacher states that the objectives do not read are not computed; other tensors stand
    there, or None.
    """
    if not objectives.reads_noise:
        mean = logvar = batch.image.new_zeros(len(batch), cast(Any, frozen.vae.config).latent_channels, 1, 1)
    elif batch.image.shape[1] == 2 * cast(Any, frozen.vae.config).latent_channels:
        mean, logvar = batch.image.chunk(2, dim=1)
    else:
        mean, logvar = encode_pictures(frozen.vae, batch.image)
    long, long_length = short, short_length = encode_captions(frozen, batch.long_ids)
    if objectives.reads_short:
        short, short_length = encode_captions(frozen, batch.short_ids)
    teacher, fits = short, torch.zeros_like(short_length, dtype=torch.bool)
    if objectives.is_taught:
        teacher, fits = encode_for_teacher(frozen, batch.short_ids)
    windows = None
    if objectives.reads_windows:
        windows = encode_windows_for_teacher(frozen, batch.long_ids)[:, : long.shape[1]]
    tokens = {}
    if frozen.overlap:
        tokens["long_tokens"] = num_tokens_in_windows(batch.long_ids, frozen.tokenizer)
        tokens["short_tokens"] = num_tokens_in_windows(batch.short_ids, frozen.tokenizer)
    states = (long, short, long_length, short_length, teacher, fits)
    return Features(mean, logvar, *states, batch.seeds, batch.keys, batch.skipped, windows, **tokens)


def empty_states(frozen: FrozenModels) -> tuple[dict[int, Tensor], Tensor]:
    """States of the empty caption: {tokens a pass: (1, T, D)} of the encoder, and (1, S, D) of the base's own.

    In windows there is one kind of pass only.
    """
    encoder = frozen.text_encoder
    ids_1T = frozen.caption_ids([""]).to(encoder.device)
    lengths = {encoder.short_context_length, encoder.context_length} - {0}
    if frozen.in_windows:
        lengths = {CLIP_CONTEXT_LENGTH}
    with torch.no_grad():
        states = {length: encoder(ids_1T[:, :length]).last_hidden_state for length in sorted(lengths)}
    return states, encode_for_teacher(frozen, ids_1T)[0]


# -- what a cache was made with ------------------------------------------------------------------------------


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights as float32, names included; an encoder's adapter does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith("adapter."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: FixClipTokenizer) -> str:
    """SHA-256 of all that decides a tokenizer's ids."""
    backend = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    backend.no_truncation()  # a tokenizer keeps both from the last call
    backend.no_padding()
    settings = [backend.to_str(), tokenizer.context_length, tokenizer.clean_text, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def fingerprint(encoder: FixClipTextEncoder, tokenizer: FixClipTokenizer) -> dict[str, str]:
    """What an adapter belongs to: digests of the encoder's weights (in float32) and of its tokenizer."""
    return {"text encoder": weights_digest(encoder), "tokenizer": tokenizer_digest(tokenizer)}


def check_made_for(folder: Path, made_for: dict[str, str]) -> None:
    """Compare with what an adapter's or a run's folder says; one that says nothing passes with a warning.

    Raises:
        ValueError: the encoder or the tokenizer is another one.
    """
    try:
        found = json.loads((folder / MADE_FOR).read_text())
    except FileNotFoundError:
        logger.warning("%s has no %s, so it is not known which text encoder it belongs to", folder, MADE_FOR)
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / MADE_FOR}: cannot be read: {error}") from None
    other = [name for name, digest in made_for.items() if found.get(name) != digest]
    if other:
        raise ValueError(f"{folder}: it was made with another {' and another '.join(other)} than the one given now")


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
    if section.text:
        key |= {
            "text_encoder": weights_digest(frozen.text_encoder),
            "base text_encoder": weights_digest(frozen.teacher),
            "tokenizer": tokenizer_digest(frozen.tokenizer),
            "captions": recipe.captions.model_dump(mode="json"),
        }
        # Said only then, so that caches from before there was a choice stay good.
        if frozen.in_windows:
            key["long_prompt"] = frozen.long_prompt
        if recipe.objectives.reads_windows:
            key["window states"] = True
    return key


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
        self._refuse_other_key(key)
        self.key = key
        self._sample_keys = [
            _digest([key, [source.fingerprint(index) for index in self._range(number)]]) for number in range(len(self))
        ]
        self.missing = [number for number in range(len(self)) if not self._is_done(number)]

    def __len__(self) -> int:
        """Files."""
        return -(-len(self.indices) // self.section.shard_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _range(self, number: int) -> range:
        size = self.section.shard_size
        return self.indices[number * size : (number + 1) * size]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _refuse_other_key(self, key: dict[str, Any]) -> None:
        path = self.folder / KEY_FILE
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        other = sorted(name for name in key.keys() | found.keys() if key.get(name) != found.get(name))
        if other:
            raise ValueError(
                f"features.folder={str(self.folder)!r}: this cache was made with another {', another '.join(other)}; "
                "delete it or choose another folder"
            )

    def _is_done(self, number: int) -> bool:
        path = self._path(number)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata()["key"]
        except Exception as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, and it will be made again") from None
        if found != self._sample_keys[number]:
            samples = self._range(number)
            raise ValueError(
                f"{path}: stale: captions or pictures among samples {samples.start} to {samples.stop - 1} of "
                f"{self.key['source']} have changed since; delete it, and it will be made again"
            )
        return True

    def build(
        self,
        batches: Batches,
        frozen: FrozenModels,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        """Make the files that are missing, every `world_size`-th of them.

        Args:
            batches: reads and transforms the samples.
            frozen: encodes them.
            rank, world_size: this process among those that build together.
            workers: loading processes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_atomically(self.folder / KEY_FILE, json.dumps(self.key, indent=1).encode())
        mine = self.missing[rank::world_size]
        loader = DataLoader(
            _Samples(batches, [index for number in mine for index in self._range(number)]),
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),  # leaves the global one alone
        )
        samples = iter(tqdm(loader, "caching", unit="sample", disable=rank != 0 or not mine))
        for number in mine:
            self._write(number, samples, batches, frozen)

    def _write(
        self, number: int, samples: Iterator[LoadedSample | Skipped], batches: Batches, frozen: FrozenModels
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
                parts.append(self._encode(pending, batches, frozen))
                pending = []
        if pending:
            parts.append(self._encode(pending, batches, frozen))
        tensors = {"row": torch.tensor(row_of)}
        for name in parts[0] if parts else ():
            tensors[name] = _stacked([row for part in parts for row in part[name]]).contiguous()
        metadata = {"key": self._sample_keys[number], "skipped": json.dumps(skipped), "keys": json.dumps(keys)}
        write_atomically(self._path(number), save(tensors, metadata))

    def _encode(self, rows: Sequence[LoadedSample], batches: Batches, frozen: FrozenModels) -> dict[str, Tensor]:
        images, longs, shorts = ([row[i] for row in rows] for i in range(3))
        mean, logvar = encode_pictures(frozen.vae, torch.stack(cast(list[Tensor], images)))
        tensors = {"mean": mean, "logvar": logvar}
        if self.section.text:
            ids_BT = batches.tokenizer(cast(list[str], longs + shorts))
            long, tensors["long_length"] = encode_captions(frozen, ids_BT[: len(rows)])
            short, tensors["short_length"] = encode_captions(frozen, ids_BT[len(rows) :])
            teacher, tensors["teacher_fits"] = encode_for_teacher(frozen, ids_BT[len(rows) :])
            tensors |= {"long": long, "short": short, "teacher": teacher}
            if frozen.overlap:
                tokens = num_tokens_in_windows(ids_BT, frozen.tokenizer)
                tensors |= {"long_tokens": tokens[: len(rows)], "short_tokens": tokens[len(rows) :]}
            if self.key.get("window states"):
                windows = encode_windows_for_teacher(frozen, ids_BT[: len(rows)])
                tensors["windows"] = windows[:, : long.shape[1]]
        dtype = DTYPES[self.section.dtype]
        return {name: (t.to(dtype) if t.is_floating_point() else t).cpu() for name, t in tensors.items()}

    def read(self, index: int) -> tuple[dict[str, Tensor], str]:
        """One sample's tensors, floats in float32, and its key.

        Raises:
            BadSampleError: it could not be used when the cache was made.
        """
        number, local = divmod(index - self.indices.start, self.section.shard_size)
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        file = self._open[number]
        row = int(file.get_slice("row")[local : local + 1])
        if row < 0:
            found = Skipped(**json.loads(file.metadata()["skipped"])[str(local)])
            raise BadSampleError(found.reason, found.file, found.key, found.detail)
        tensors = {name: file.get_slice(name)[row : row + 1][0] for name in file.keys() if name != "row"}  # noqa: SIM118
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        return floats, json.loads(file.metadata()["keys"])[row]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows of a batch; text states as long as the longest among them."""
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)


class _Samples(Dataset):
    """Samples by their number, loaded and transformed as in the first epoch."""

    def __init__(self, batches: Batches, indices: Sequence[int]):
        self.batches, self.indices = batches, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> LoadedSample | Skipped:
        index = self.indices[position]
        try:
            return self.batches.load(0, index)
        except BadSampleError as error:
            return error.skipped


class CachedLatents(Batches):
    """Batches whose `image` holds a cache's mean and log variance (B, 2 C, H, W); captions come from the source."""

    cache: FeatureCache

    def load(self, epoch: int, index: int) -> LoadedSample:
        tensors, key = self.cache.read(index)
        _, long, short = self.captions(epoch, index)
        seed = sample_seeds(self.config.seed, epoch, index)[2]
        return torch.cat([tensors["mean"], tensors["logvar"]]), long, short, seed, key


class CachedFeatures(Batches):
    """Batches of features that a cache holds completely: `Features` instead of `Batch`."""

    cache: FeatureCache

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, number = item
        skipped: list[Skipped] = []
        positions, taken = self.positions(number)
        rows: list[Any] = [self._usable_sample(epoch, position, taken, skipped) for position in positions]
        if any(row is None for row in rows):
            return skipped
        tensors, keys, seeds = zip(*rows, strict=True)
        joined = {name: _stacked([row[name] for row in tensors]) for name in tensors[0]}
        return Features(**joined, seeds=torch.tensor(seeds), keys=list(keys), skipped=skipped)

    def load(self, epoch: int, index: int) -> Any:
        tensors, key = self.cache.read(index)
        return tensors, key, sample_seeds(self.config.seed, epoch, index)[2]
