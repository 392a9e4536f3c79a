"""The adapter: a small residual module on the text states that Stable Diffusion's UNet reads.

Shapes: B batch, T tokens, D width of the text states.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixclip_core.check import (
    LoadError,
    check_finite,
    check_folder_or_hub_name,
    check_layers,
    check_shapes,
    hub_reason,
    loading,
    module_shapes,
    refuse_stand_in,
)
from fixclip_core.files import parse_json, write_atomically
from fixclip_core.model.attention import attend, rotate_by_position, split_heads
from fixclip_core.weights.kinds import what_is_in
from fixclip_diffusion import builtin

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "fixclip_adapter"
KINDS = ("mlp", "attention")
SCOPES = ("window", "text")
XL_ENCODERS = ("text_encoder", "text_encoder_2")


class TextAdapter(nn.Module):
    """Maps text states to text states; the identity until it is trained, because its last layers start at zero.

    Args:
        width: D, the width of the text states.
        kind: `mlp` changes every token by itself; `attention` adds self-attention blocks with positions,
            so that a token may read the ones behind it, which CLIP's causal mask hides from it.
        hidden_width: width of the hidden layers; 0 means 2 D for `mlp` and 4 D for `attention`.
        num_layers: residual blocks.
        num_heads: heads of the self-attention.
        max_tokens: longest sequence of the `attention` kind.
        conditioning: name of the conditioning that the adapter was trained with, which pipelines then use; None: any.
        mask_padding: whether tokens of the `attention` kind attend to the text alone. Adapters of version 0.1 attended
            to the padding behind it too.
        scope: what the `attention` kind sees of a prompt that takes several passes: "window", the hidden states of one
            pass at a time, or "text", those of all passes as they are joined (`conditioning.Layout.join`), `max_tokens`
            at a time. For a prompt in one pass they are the same.
        short_texts: whether it acts on texts that fit into the base's 77 tokens. False where training has shown it
            none but the empty one: such prompts then have the base's own hidden states, to the bit. The empty prompt
            goes through it where it is the negative of a longer one, as in training.
        rotary: whether the `attention` kind turns queries and keys by their positions (RoFormer, section 3.2), too, so
            that what a token attends to can depend on how far away it stands.
        causal_heads: heads of each block that read only what stands before a token, and the token itself; the others
            read on both sides. Such a head can tell how much of something came before.

    Raises:
        ValueError: an unknown kind or scope, a size below 1, heads that do not divide the width, more causal heads than
            heads, the scope "text" of an adapter that sees a token at a time or attends to padding, or rotary positions
            or causal heads of one that sees a token at a time.
    """

    def __init__(
        self,
        width: int,
        kind: Literal["mlp", "attention"] = "mlp",
        hidden_width: int = 0,
        num_layers: int = 2,
        num_heads: int = 8,
        max_tokens: int = 248,
        conditioning: str | None = None,
        mask_padding: bool = False,
        scope: Literal["window", "text"] = "window",
        short_texts: bool = True,
        rotary: bool = False,
        causal_heads: int = 0,
    ):
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"adapter scope {scope!r}: valid are {', '.join(SCOPES)}")
        if scope == "text" and (kind != "attention" or not mask_padding):
            raise ValueError(
                f"adapter scope 'text' with kind={kind!r}, mask_padding={mask_padding}: it needs kind='attention' and "
                "mask_padding=true"
            )
        if kind not in KINDS:
            raise ValueError(f"adapter kind {kind!r}: valid are {', '.join(KINDS)}")
        if min(width, num_layers, num_heads, max_tokens) < 1 or hidden_width < 0:
            raise ValueError(
                f"adapter sizes must be at least 1: width={width}, num_layers={num_layers}, "
                f"num_heads={num_heads}, max_tokens={max_tokens}, hidden_width={hidden_width}"
            )
        if kind == "attention" and width % num_heads:
            raise ValueError(f"adapter num_heads={num_heads} does not divide the width {width}; valid are its divisors")
        if kind == "mlp" and (rotary or causal_heads):
            raise ValueError(
                f"adapter rotary={rotary}, causal_heads={causal_heads} with kind='mlp': only kind='attention' has them"
            )
        if not 0 <= causal_heads <= num_heads:
            raise ValueError(f"adapter causal_heads={causal_heads}: valid are 0 to num_heads={num_heads}")
        if rotary and width // num_heads % 2:
            raise ValueError(
                f"adapter rotary=True with {num_heads} heads of width {width // num_heads}: it turns pairs of numbers, "
                "so that their width must be even"
            )
        self.folder: str | None = None  # that it was loaded from, where it is said what encoder it was made for
        self.config: dict[str, Any] = {
            "width": width,
            "kind": kind,
            "hidden_width": hidden_width or (2 if kind == "mlp" else 4) * width,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "max_tokens": max_tokens,
            "conditioning": conditioning,
            "mask_padding": mask_padding,
            "scope": scope,
            "short_texts": short_texts,
            "rotary": rotary,
            "causal_heads": causal_heads,
        }
        hidden_width = self.config["hidden_width"]
        if kind == "attention":
            self.position_embedding = nn.Parameter(torch.zeros(max_tokens, width))
            self.blocks = nn.ModuleList(
                _AttentionBlock(width, hidden_width, num_heads, causal_heads, rotary) for _ in range(num_layers)
            )
        else:
            self.blocks = nn.ModuleList(_FeedForward(width, hidden_width) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise for training: ordinary hidden layers, output layers of zeros (identity)."""
        if self.config["kind"] == "attention":
            nn.init.normal_(self.position_embedding, std=0.02)
        for block in self.blocks.children():
            block.reset_parameters()  # type: ignore[operator]

    def forward(self, states_BTD: Tensor, text_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of one pass to adapted ones (B, T, D).

        Args:
            states_BTD: what the UNet reads of the text encoder.
            text_BT: True for the text, False for the padding behind it; read with `mask_padding` only.
        """
        if self.config["kind"] == "mlp":
            for block in self.blocks:
                states_BTD = states_BTD + block(states_BTD)
            return states_BTD
        num_tokens, limit = states_BTD.shape[1], self.config["max_tokens"]
        if num_tokens > limit and self.config["scope"] == "text":
            assert text_BT is not None
            parts = zip(states_BTD.split(limit, dim=1), text_BT.split(limit, dim=1), strict=True)
            return torch.cat([self(states, text) for states, text in parts], dim=1)
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} text states: this adapter holds positions for {limit}")
        # The stream of the blocks is kept apart from the states, so that positions do not leak into them.
        stream_BTD = states_BTD + self.position_embedding[:num_tokens]
        change_BTD = torch.zeros_like(states_BTD)
        mask_B11T = None
        if self.config["mask_padding"] and text_BT is not None:
            # Where there is no text at all, as in padding behind a cut at `max_tokens`, attention to none would be NaN.
            mask_B11T = (text_BT | ~text_BT.any(1, keepdim=True))[:, None, None]
        for block in self.blocks:
            delta_BTD = block(stream_BTD, mask_B11T)
            stream_BTD = stream_BTD + delta_BTD
            change_BTD = change_BTD + delta_BTD
        return states_BTD + change_BTD

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter.safetensors and adapter_config.json into `folder`, each replaced in one step.

        adapter.safetensors has the configuration in its metadata too: it can be copied alone, to ComfyUI for example.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {METADATA_KEY: json.dumps(self.config)}
        write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata))
        write_atomically(folder / CONFIG_NAME, (json.dumps(self.config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_kwargs: Any) -> "TextAdapter":
        """Load from a folder that `save_pretrained` wrote, a hub repository of the same layout, or a built-in name.

        Raises:
            LoadError: a file is missing or damaged, the weights do not fit the configuration, or are not finite.
        """
        source = str(builtin.resolve(source))
        what = _what(source)
        with loading(what):
            config_file = _find_file(source, CONFIG_NAME, hub_kwargs)
            weights_file = _find_file(source, WEIGHTS_NAME, hub_kwargs)
            config = parse_json(config_file.read_text(encoding="utf-8"))
            adapter = cls._load(config, config_file, weights_file, what)
            adapter.folder = source
            return adapter

    @classmethod
    def from_file(cls, file: str | Path) -> "TextAdapter":
        """Load from an adapter.safetensors alone, by the configuration in its metadata.

        A file of version 0.1 has none there; it needs its adapter_config.json in the same folder.

        Raises:
            LoadError: as `from_pretrained`.
        """
        what = f"adapter {str(file)!r}: expected an {WEIGHTS_NAME} with its configuration in the metadata"
        with loading(what):
            refuse_stand_in(Path(file))
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(METADATA_KEY)
            if text is not None:
                return cls._load(parse_json(text), file, file, what)
            beside = Path(file).with_name(CONFIG_NAME)
            if not beside.is_file():
                raise LoadError(f"{what}; it has none, and there is no {CONFIG_NAME} beside it")
            return cls._load(parse_json(beside.read_text(encoding="utf-8")), beside, file, what)

    @classmethod
    def _load(cls, config: Any, config_file: str | Path, weights_file: str | Path, what: str) -> "TextAdapter":
        if "num_layers" not in config:
            raise LoadError(f"{what}; {config_file} is no configuration of a TextAdapter")
        refuse_stand_in(Path(weights_file))
        weights = {name: tensor.float() for name, tensor in load_file(weights_file).items()}
        check_layers(config["num_layers"], weights, "blocks", what)
        with torch.device("meta"):  # a wrong size is found before memory is asked for
            adapter = cls(**config)
        check_shapes(module_shapes(adapter), {name: tensor.shape for name, tensor in weights.items()}, what)
        adapter.load_state_dict(weights, assign=True)
        check_finite(adapter, what)
        return adapter


def check_fits(config: dict[str, Any], width: int, context_length: int = 0, what: str = "adapter") -> None:
    """Refuse an adapter for other hidden states than those of a text encoder.

    Args:
        config: of the adapter, see `read_adapter_config`.
        width: of the text encoder's hidden states.
        context_length: tokens that it reads at once, if known.
        what: the adapter, for the error.

    Raises:
        ValueError: the adapter's width is another one, or it reads fewer tokens.
    """
    if config["width"] != width:
        raise ValueError(
            f"{what} of width {config['width']} on a text encoder of width {width}: it was trained for another base"
        )
    if config["kind"] == "attention" and config["max_tokens"] < context_length:
        raise ValueError(f"{what} for {config['max_tokens']} tokens on a text encoder of {context_length}")


def read_adapter_config(source: str | Path, **hub_kwargs: Any) -> dict[str, Any]:
    """The configuration of an adapter, without its weights; `source` as in `TextAdapter.from_pretrained`.

    Raises:
        LoadError: there is none, or it is damaged.
    """
    source = str(builtin.resolve(source))
    with loading(_what(source)):
        file = _find_file(source, CONFIG_NAME, hub_kwargs)
        with torch.device("meta"):
            return TextAdapter(**parse_json(file.read_text(encoding="utf-8"))).config


def adapter_folders(source: str | Path, files: str = "*", **hub_kwargs: Any) -> dict[str, Path]:
    """{text encoder: folder of its adapter} of Stable Diffusion XL, of one text encoder or both.

    Args:
        source: folder or hub name of the folder around both.
        files: pattern of the names of those that are needed, where they have to be fetched.
        **hub_kwargs: token, cache_dir and so on.

    Raises:
        ValueError: there is no such folder or repository, or no adapter in it where one is expected.
    """
    folder = Path(source)
    if not folder.exists():
        check_folder_or_hub_name("adapter", str(source))
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "proxies"}  # which it does not take
        patterns = [f"{name}/{files}" for name in XL_ENCODERS]
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=patterns, **hub_kwargs))
        except Exception as error:
            raise ValueError(f"adapter {str(source)!r}: {hub_reason(error)}") from error
    found = [name for name in XL_ENCODERS if (folder / name).is_dir()]
    if not found:
        is_half = folder.name in XL_ENCODERS
        belongs = "one of a pair: name the folder around it" if is_half else "of Stable Diffusion 1.x or 2.x"
        one = f" it is one adapter, {belongs};" if is_adapter(folder) else ""
        raise ValueError(
            f"adapter {str(source)!r}:{one} expected text_encoder/ or text_encoder_2/ in it, each an adapter"
        )
    return {name: folder / name for name in found}


def is_adapter(source: str | Path) -> bool:
    """Whether a folder, or a built-in name of one, holds an adapter."""
    return (Path(builtin.resolve(source)) / CONFIG_NAME).is_file()


def _what(source: str) -> str:
    return f"adapter {source!r}: expected a folder or hub name with {CONFIG_NAME} and {WEIGHTS_NAME}"


def _find_file(source: str, name: str, hub_kwargs: dict[str, Any]) -> Path:
    """A file of an adapter, in a folder or fetched from the hub.

    Raises:
        LoadError: `source` is neither a folder with an adapter nor a hub name.
    """
    path = Path(source)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return path / name
    if path.exists():
        towers = [part for part in ("text_encoder", "text_encoder_2") if is_adapter(path / part)]
        found = f"; {' and '.join(towers)} there: adapters of Stable Diffusion XL's text encoders" if towers else None
        if is_adapter(path / "adapter"):  # as a training leaves it
            found = f"; did you mean {str(path / 'adapter')!r}?"
        raise LoadError(f"{_what(source)}{found or what_is_in(path)}")
    check_folder_or_hub_name("adapter", source)
    try:
        return Path(hf_hub_download(source, name, **hub_kwargs))
    except Exception as error:
        raise LoadError(f"{_what(source)}; {hub_reason(error)}") from error


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.fc1.reset_parameters()
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, states_BTD: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(states_BTD))))


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, hidden_width: int, num_heads: int, causal_heads: int, rotary: bool):
        super().__init__()
        self.num_heads, self.causal_heads, self.rotary = num_heads, causal_heads, rotary
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.feed_forward = _FeedForward(width, hidden_width)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.in_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        self.feed_forward.reset_parameters()

    def forward(self, states_BTD: Tensor, mask_B11T: Tensor | None = None) -> Tensor:
        """(B, T, D) to what is added to it; the mask has True for the text."""
        qkv = self.in_proj(self.norm(states_BTD)).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in qkv)
        if self.rotary:
            query, key = rotate_by_position(query), rotate_by_position(key)
        causal, both_sides, parts = slice(self.causal_heads), slice(self.causal_heads, None), []
        if self.causal_heads:
            before_TT = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
            mask_B1TT = before_TT if mask_B11T is None else mask_B11T & before_TT
            parts += [attend(query[:, causal], key[:, causal], value[:, causal], attn_mask=mask_B1TT)]
        if self.causal_heads < self.num_heads:
            parts += [attend(query[:, both_sides], key[:, both_sides], value[:, both_sides], attn_mask=mask_B11T)]
        mixed = torch.cat(parts, dim=1)
        delta_BTD = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return delta_BTD + self.feed_forward(states_BTD + delta_BTD)
