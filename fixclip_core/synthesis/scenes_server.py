"""A multimodal model of the scenes world behind an OpenAI-compatible server: reads pictures exactly, errs on purpose.

    python -m fixclip_core.synthesis.scenes_server --port 8900 --mistake left_out=0.1

It sees a scene by the checker (the rendering that comes nearest), words it by the scenes' own grammar, and makes the
mistakes that real models make, so that a newcomer sees filters work and an experiment can price caption noise. An
answer is a function of the image, the prompt and the sampling seed.
"""

import argparse
import base64
import io
import json
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from fixclip_core.scenes import COLOURS, Scene, SceneObject, check, long_caption, short_caption
from fixclip_core.synthesis.prompts import SHORT_PROMPTS, stable_hash

MODEL = "scenes"
_SHORT = frozenset(prompt.text for prompt in SHORT_PROMPTS)
_REFUSAL = "I'm sorry, but I cannot describe the contents of this image."
_SAME = "This picture shows several simple shapes in bright colours, which stand on a plain and even background."
_GERMAN = (
    "Das Bild zeigt {count} einfache Formen vor einem schlichten Hintergrund. Sie sind bunt, unterschiedlich groß und "
    "deutlich voneinander getrennt, und weiter ist darauf nichts zu sehen."
)


@dataclass(frozen=True)
class Mistakes:
    """How often the captioner errs, from 0 to 1.

    `left_out` and `wrong_colour` are shares of the objects; no filter can find these. The others are shares of the
    answers: a sentence `repeated` over and over, an answer `cut_off` in mid-sentence, a `refusal`, an `echo` of the
    prompt, an answer in `german`, and the `same` words for whatever image.
    """

    left_out: float = 0.05
    wrong_colour: float = 0.05
    repeated: float = 0.04
    cut_off: float = 0.04
    refusal: float = 0.02
    echo: float = 0.02
    german: float = 0.02
    same: float = 0.02

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate}: a rate lies between 0 and 1")

    @classmethod
    def none(cls) -> "Mistakes":
        return cls(**{field.name: 0.0 for field in fields(cls)})


class BadRequestError(ValueError):
    """What was sent is no request for a caption."""


def respond(body: Mapping[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """The chat completion to a request with one image and one text; raises BadRequestError."""
    try:
        parts = body["messages"][-1]["content"]
        url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        prompt = next(part["text"] for part in parts if part["type"] == "text")
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (KeyError, IndexError, TypeError, StopIteration, ValueError, OSError) as error:
        raise BadRequestError(f"expected a message with an image (data URL) and a text: {error!r}") from None
    rng = random.Random(stable_hash(data, prompt, body.get("seed")))
    text, finish_reason = _write(_see(image), prompt, mistakes, rng)
    words = len(text.split())
    return {
        "id": f"chatcmpl-{rng.getrandbits(64):016x}",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason},
        ],
        "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": words, "total_tokens": words},
    }


def _see(image: Image.Image) -> Scene:
    """The scene that a picture comes nearest to."""
    side = min(image.size)
    pixels = torch.from_numpy(np.array(image.crop((0, 0, side, side)))).permute(2, 0, 1).contiguous()
    seen = check(pixels, Scene("white", ()))
    return Scene(seen.background, seen.unexpected)


def _write(scene: Scene, prompt: str, mistakes: Mistakes, rng: random.Random) -> tuple[str, str]:
    """(text, finish_reason)."""
    kinds = ("repeated", "cut_off", "refusal", "echo", "german", "same")
    mistake = next((kind for kind in kinds if rng.random() < getattr(mistakes, kind)), None)
    if mistake in ("refusal", "echo", "german", "same"):
        german = _GERMAN.format(count=len(scene.objects))
        return {"refusal": _REFUSAL, "echo": prompt, "german": german, "same": _SAME}[mistake], "stop"
    if not scene.objects:
        return f"Nothing at all can be seen in this picture but a plain {scene.background} background.", "stop"
    described = _misread(scene, mistakes, rng)
    caption = short_caption if prompt in _SHORT else long_caption
    text = caption(described, rng.getrandbits(32)).text
    if mistake == "repeated":
        return f"{text} {' '.join([text.rsplit('. ', 1)[-1]] * 12)}", "stop"
    if mistake == "cut_off":
        return text[: len(text) * 3 // 5], "length"
    return text, "stop"


def _misread(scene: Scene, mistakes: Mistakes, rng: random.Random) -> Scene:
    """The scene with objects left out and others of a wrong colour; one object is always left."""
    objects: list[SceneObject] = []
    for item in scene.objects:
        left_out, wrong = rng.random() < mistakes.left_out, rng.random() < mistakes.wrong_colour
        if wrong:
            item = replace(item, colour=rng.choice([c.name for c in COLOURS if c.name != item.colour]))
        if not left_out:
            objects.append(item)
    return Scene(scene.background, tuple(objects or scene.objects[:1]))


class ScenesServer(ThreadingHTTPServer):
    """Answers on loopback; port 0 takes a free one. `url` is what --server takes."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, mistakes: Mistakes | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.mistakes = Mistakes() if mistakes is None else mistakes
        self.url = f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator["ScenesServer"]:
        """Serve in a thread while the block runs."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """The two endpoints that captioning uses."""

    server: ScenesServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "fixclip"}]})
        else:
            self.send(404, _error(f"no such address: {self.path}"))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self.send(404, _error(f"no such address: {self.path}"))
            return
        try:
            body = json.loads(data)
            if body.get("model") != MODEL:
                self.send(404, _error(f"The model `{body.get('model')}` does not exist."))
                return
            self.answer(body)
        except (ValueError, AttributeError) as error:
            self.send(400, _error(str(error)))

    def answer(self, body: dict[str, Any]) -> None:
        self.send(200, respond(body, self.server.mistakes))

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def read_mistakes(pairs: list[str]) -> Mistakes:
    """`["left_out=0.1"]` to Mistakes; `none` switches all off first.

    Raises:
        ValueError: an unknown name or no rate.
    """
    mistakes = Mistakes.none() if "none" in pairs else Mistakes()
    known = [field.name for field in fields(Mistakes)]
    for pair in pairs:
        name, _, rate = pair.partition("=")
        if pair == "none":
            continue
        try:
            if name not in known:
                raise ValueError
            mistakes = replace(mistakes, **{name: float(rate)})
        except ValueError:
            raise ValueError(f"mistake {pair!r}: give NAME=RATE with a rate of 0 to 1: {', '.join(known)}") from None
    return mistakes


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the captioner of the scenes world.")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--mistake", action="append", default=[], metavar="NAME=RATE", help="repeatable; or none")
    arguments = parser.parse_args()
    try:
        server = ScenesServer(read_mistakes(arguments.mistake), arguments.port)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"model {MODEL} on {server.url}", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
