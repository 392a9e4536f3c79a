"""What the nodes need of ComfyUI, written from its interface: a CLIP object on transformers' models, and a core.

`clip.tokenize` puts the text between two weights or textual inversions into windows of 77 (or 248) as one group, older
cores each word; a group of fewer than 8 tokens is never split. "(word:1.3)" is a weight. `clip.encode_from_tokens` runs
the windows of each text encoder, weighs states against those of an empty window, lays the windows end to end and the
encoders side by side, cut to the shorter.
"""

import asyncio
import re
import types
from dataclasses import dataclass
from typing import Any

import torch

GROUP_IN_ONE_WINDOW = 8


@dataclass
class KeyTokenizer:
    """Of one text encoder."""

    tokenizer: Any
    embedding_size: int
    max_length: int
    inversions: dict[str, torch.Tensor]
    by_word: bool  # older cores

    def groups(self, text):
        for part in re.findall(r"\([^()]*:[\d.]+\)|(?:\\[()]|[^()])+", text):
            weighted = re.fullmatch(r"\((.*):([\d.]+)\)", part, re.DOTALL)
            content, weight = (weighted[1], float(weighted[2])) if weighted else (part, 1.0)
            for piece in re.split(r"[ \n]" if self.by_word else r"[ \n](?=embedding:)", content):
                piece = piece.replace("\\(", "(").replace("\\)", ")")
                if piece.startswith("embedding:"):
                    name, _, piece = piece.removeprefix("embedding:").partition(" ")
                    yield [(vector, weight) for vector in self.inversions[name]]
                if piece:
                    yield [(token, weight) for token in self.tokenizer(piece, add_special_tokens=False).input_ids]

    def rows(self, text):
        start, end = (self.tokenizer.bos_token_id, 1.0, 0), (self.tokenizer.eos_token_id, 1.0, 0)
        room, rows = self.max_length - 1, [[start]]
        for number, group in enumerate(self.groups(text), 1):
            items = [(*entry, number) for entry in group]
            while len(rows[-1]) + len(items) > room:
                taken = room - len(rows[-1]) if len(items) >= GROUP_IN_ONE_WINDOW else 0
                rows[-1] += items[:taken]
                items = items[taken:]
                rows.append([start])
            rows[-1] += items
        pad = (self.tokenizer.pad_token_id, 1.0, 0)
        return [[*row, end] + [pad] * (room - len(row)) for row in rows]


class Tokenizers:
    def __init__(self, keys):
        self.__dict__.update({f"clip_{key}": tokenizer for key, tokenizer in keys.items()})
        self.first = next(iter(keys.values())).tokenizer

    def untokenize(self, pairs):
        return [(pair, self.first.convert_ids_to_tokens(pair[0])) for pair in pairs]


class OlderClip:
    """A CLIP object of 2023, which reads texts word by word.

    Args:
        models: {key: (text model, tokenizer)}, keys "l", "h", "g".
        inversions: {name: (number, D) vectors} of the first text encoder's width.
    """

    by_word = True

    def __init__(self, models, inversions=None):
        self.models = {key: model for key, (model, _) in models.items()}
        self.keys = {
            key: KeyTokenizer(
                tokenizer,
                model.config.hidden_size,
                model.config.max_position_embeddings,
                inversions or {},
                self.by_word,
            )
            for key, (model, tokenizer) in models.items()
        }
        self.tokenizer = Tokenizers(self.keys)

    def tokenize(self, text, return_word_ids=False):
        found = {key: tokenizer.rows(text) for key, tokenizer in self.keys.items()}
        if return_word_ids:
            return found
        return {key: [[item[:2] for item in row] for row in rows] for key, rows in found.items()}

    @torch.no_grad()
    def encode_from_tokens(self, tokens, return_pooled=False):
        parts, pooled = [], None
        for key, model in self.models.items():
            states, pooled = self._encode(key, model, tokens[key])
            parts.append(states)
        length = min(part.shape[1] for part in parts)
        cond = torch.cat([part[:, :length] for part in parts], dim=-1)
        return (cond, pooled) if return_pooled else cond

    def _encode(self, key, model, windows):
        assert {len(window) for window in windows} == {self.keys[key].max_length}, "core takes whole windows alone"
        tokenizer = self.keys[key].tokenizer
        weights = torch.tensor([[weight for _, weight in window] for window in windows])
        rows = [[token for token, _ in window] for window in windows]
        pads = [tokenizer.pad_token_id] * (len(rows[0]) - 2)
        rows.append([tokenizer.bos_token_id, tokenizer.eos_token_id, *pads])
        table = model.get_input_embeddings()
        own = table.weight
        ids = [[token if isinstance(token, int) else 0 for token in row] for row in rows]
        given = {(n, p): t for n, row in enumerate(rows) for p, t in enumerate(row) if not isinstance(t, int)}

        def put_in(module, inputs, output):
            for place, vector in given.items():
                output[place] = vector
            return output

        hook = table.register_forward_hook(put_in)
        output = model(torch.tensor(ids), output_hidden_states=True)
        hook.remove()
        assert table.weight is own
        is_xl = len(self.models) > 1
        states = output.hidden_states[-2] if is_xl else output.last_hidden_state
        weights = weights[..., None]
        states = torch.where(weights == 1, states[:-1], states[-1:] + weights * (states[:-1] - states[-1:]))
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return states.flatten(0, 1)[None], pooled[:1]


class ClipOfToday(OlderClip):
    """It passes hooks on with the conditioning."""

    by_word, apply_hooks_to_conds = False, None

    def encode_from_tokens_scheduled(self, tokens):
        cond, pooled = self.encode_from_tokens(tokens, return_pooled=True)
        hooks = {"hooks": self.apply_hooks_to_conds} if self.apply_hooks_to_conds else {}
        return [[cond, {"pooled_output": pooled, **hooks}]]


class StandIn:
    """A core made of this file; see `real_core.RealCore`."""

    def clip(self, models, inversions=None):
        return ClipOfToday(models, inversions)

    def modules(self, folder, schema):
        return core_modules(folder, schema)


def core_modules(folder, schema):
    """{name: module} of a core with its models in `folder`; V3's classes with `schema`."""
    paths: dict[str, list] = {}
    folder_paths = types.ModuleType("folder_paths")
    folder_paths.models_dir = str(folder)
    folder_paths.add_model_folder_path = lambda name, path: paths.setdefault(name, []).append(path)
    folder_paths.get_filename_list = lambda name: sorted(file.name for file in (folder / name).glob("*"))
    folder_paths.get_full_path = lambda name, file: (
        str(folder / name / file) if (folder / name / file).exists() else None
    )
    modules = {"folder_paths": folder_paths, "comfy_api": None, "comfy_api.latest": None}
    if schema:
        latest = types.ModuleType("comfy_api.latest")
        latest.ComfyExtension, latest.io = type("ComfyExtension", (), {}), _io()
        modules |= {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.latest": latest}
    return modules


def _io():
    class NodeOutput:
        def __init__(self, *result):
            self.result = result

    @dataclass
    class Schema:
        node_id: str
        display_name: str
        category: str
        description: str
        inputs: list
        outputs: list

    def custom(io_type):
        def port(*args, **kwargs):
            return types.SimpleNamespace(io_type=io_type, id=args[0] if args else None, **kwargs)

        return types.SimpleNamespace(Input=port, Output=port)

    kinds = {name: custom(name.upper()) for name in ("Clip", "String", "Combo", "Conditioning", "Image")}
    return types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Schema=Schema, NodeOutput=NodeOutput, Custom=custom, **kinds
    )


def node_classes(pack):
    """{node id: class}, as a core finds them: V3 where there is no V1."""
    if hasattr(pack, "NODE_CLASS_MAPPINGS"):
        return pack.NODE_CLASS_MAPPINGS
    return {node.define_schema().node_id: node for node in asyncio.run(_list_of_nodes(pack))}


def node_functions(pack):
    """{node id: function of its inputs to the tuple of its outputs}."""
    classes = node_classes(pack)
    if hasattr(pack, "NODE_CLASS_MAPPINGS"):
        return {name: getattr(node(), node.FUNCTION) for name, node in classes.items()}
    return {name: lambda *args, node=node, **k: node.execute(*args, **k).result for name, node in classes.items()}


async def _list_of_nodes(pack):
    return await (await pack.comfy_entrypoint()).get_node_list()
