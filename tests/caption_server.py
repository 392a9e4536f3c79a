"""An OpenAI-compatible server on loopback that answers at once, keeps a log, and does whatever fault it is told to."""

import json
import threading
import time
from collections import Counter

from fixclip_core.scenes import long_caption, sample_scene, short_caption
from fixclip_core.synthesis.prompts import SHORT_PROMPTS, stable_hash
from fixclip_core.synthesis.scenes_server import MODEL, Handler, ScenesServer

SHORT = {prompt.text for prompt in SHORT_PROMPTS}


def asked(body):
    """(image, prompt) of a request, to tell requests apart."""
    image, text = body["messages"][0]["content"]
    return stable_hash(image["image_url"]["url"]), text["text"]


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    usage = {"completion_tokens": len(text.split())}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return {"object": "chat.completion", "model": MODEL, "choices": choices, "usage": usage}


def describe(body):
    """A right answer: some scene's caption, the same for the same image and prompt."""
    image, prompt = asked(body)
    caption = short_caption if prompt in SHORT else long_caption
    return completion(caption(sample_scene(image), stable_hash(image, prompt)).text)


class CaptionServer(ScenesServer):
    """Describes any image, small ones too, as some scene.

    Attributes:
        fault: number of the request (from 0) -> a fault, or None to answer.
        words: request body -> chat completion.
        seen: how often each question was asked, faults included.
        answered: how often each question was answered.
        times: when each request came.
        most_at_once: most requests under way at the same time.
    """

    def __init__(self, fault=lambda number: None, words=None, key=None, pause=0.0):
        super().__init__()
        self.RequestHandlerClass = FaultyHandler
        self.fault, self.words, self.key, self.pause = fault, words or describe, key, pause
        self.seen, self.answered, self.times = Counter(), Counter(), []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.ending = threading.Event()

    def server_close(self):
        self.ending.set()
        super().server_close()


class FaultyHandler(Handler):
    server: CaptionServer

    def do_GET(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
        else:
            super().do_GET()

    def answer(self, body):
        server = self.server
        with server.lock:
            number = sum(server.seen.values())
            server.seen[asked(body)] += 1
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.pause)
            fault = server.fault(number)
            if fault is None:
                response = server.words(body)
                with server.lock:
                    server.answered[asked(body)] += 1
                self.send(200, response)
            else:
                getattr(self, f"fault_{fault}")(body)
        finally:
            with server.lock:
                server.at_once -= 1

    def fault_401(self, body):
        self.send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})

    def fault_404(self, body):
        self.send(404, {"error": {"message": "The model does not exist."}})

    def fault_400(self, body):
        self.send(400, {"error": {"message": "the image is too large"}})

    def fault_429(self, body):
        self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})

    def fault_500(self, body):
        self.send(500, {"error": {"message": "out of memory"}}, {"retry-after-ms": "20"})

    def fault_hang(self, body):
        self.server.ending.wait(30)

    def fault_half(self, body):
        data = json.dumps(self.server.words(body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True

    def fault_no_json(self, body):
        data = b"<html>504 Gateway Timeout</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fault_other_json(self, body):
        self.send(200, {"object": "error", "message": "busy"})
