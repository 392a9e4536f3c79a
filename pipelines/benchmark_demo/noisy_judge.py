"""A judge on loopback that errs at a stated rate: an OpenAI-compatible server that knows scenes, and lies at times.

It answers what `prompts.scene_questions` asks ("Is there a star in the centre?", "Is the star in the centre red?", "Is
the background white?") and nothing else. Which answers are wrong depends on picture and question alone, so a run
repeats.
"""

import base64
import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from fixclip_core import scenes
from fixclip_diffusion.evaluation.judges import as_tensor

WHERE = r"(?:in the (?P<centre>centre)|at the (?P<place>[a-z ]+?))"
QUESTIONS = {
    "shape": re.compile(rf"Is there a (?P<shape>\w+) {WHERE}\?"),
    "colour": re.compile(rf"Is the (?P<shape>\w+) {WHERE} (?P<colour>\w+)\?"),
    "background": re.compile(r"Is the background (?P<background>\w+)\?"),
}


def truth(image: Image.Image, text: str) -> bool:
    """The right answer to one question about a picture.

    Raises:
        ValueError: a question about something else.
    """
    for what, pattern in QUESTIONS.items():
        match = pattern.match(text)
        if match is None:
            continue
        if what == "background":
            return scenes.check(as_tensor(image), scenes.Scene(match["background"], ())).background_right
        # The colour or shape that was not asked about does not matter, nor does the background.
        colour = match["colour"] if what == "colour" else scenes.COLOURS[0].name
        item = scenes.SceneObject(match["centre"] or match["place"], match["shape"], colour, scenes.SIZES[0].name)
        (verdict,) = scenes.check(as_tensor(image), scenes.Scene(scenes.BACKGROUNDS[0].name, (item,))).objects
        return verdict.shape_right if what == "shape" else verdict.colour_right
    raise ValueError(f"{text!r}: no question about a scene")


class NoisyJudge(ThreadingHTTPServer):
    """Serves /v1/chat/completions for one picture and one question.

    Args:
        error_rate: share of wrong answers.
        probabilities: give log-probabilities of "Yes" and "No" where a request asks for them.
    """

    daemon_threads = True

    def __init__(self, error_rate: float = 0.0, probabilities: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.error_rate, self.probabilities = error_rate, probabilities
        self.asked = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, picture: bytes, text: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of one request."""
        yes = truth(Image.open(io.BytesIO(picture)).convert("RGB"), text)
        draw = int.from_bytes(hashlib.blake2b(picture + text.encode(), digest_size=8).digest()) / 2**64
        if draw < self.error_rate:
            yes = not yes
        return 200, completion("Yes" if yes else "No", self._probabilities(yes) if request.get("logprobs") else None)

    def _probabilities(self, yes: bool) -> dict[str, float] | None:
        sure = max(self.error_rate, 0.01)
        return {"Yes": 1 - sure if yes else sure, "No": sure if yes else 1 - sure} if self.probabilities else None


def completion(text: str, probabilities: dict[str, float] | None = None, **message: Any) -> dict[str, Any]:
    """A chat completion with one choice of one token."""
    logprobs: dict[str, Any] | None = None
    if probabilities is not None:
        by_rank = sorted(probabilities.items(), key=lambda item: -item[1])
        top: list[dict[str, Any]] = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in by_rank]
        logprobs = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, "refusal": None, **message},
        "logprobs": logprobs,
    }
    return {"id": "0", "object": "chat.completion", "created": 0, "model": "noisy", "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: NoisyJudge
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = {part["type"]: part for part in request["messages"][0]["content"]}
        picture = base64.b64decode(parts["image_url"]["image_url"]["url"].partition(",")[2])
        with self.server.lock:
            self.server.asked += 1
        status, body = self.server.answer(picture, parts["text"]["text"], request)
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(judge: NoisyJudge) -> Iterator[NoisyJudge]:
    """The judge answers as long as the context lasts."""
    thread = threading.Thread(target=judge.serve_forever, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.shutdown()
        judge.server_close()
        thread.join()
