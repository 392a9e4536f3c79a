"""Captions from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`, hosted ones.

The openai client sends, retries (connection lost, 408, 409, 429, 5xx) and waits as long as Retry-After says; this
module keeps a bounded number of requests under way, writes each answer down before the next is asked for, and knows
which errors concern one sample and which all of them.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from tqdm import tqdm

from fixclip_core.data.samples import BadSampleError
from fixclip_core.synthesis.accept import MalformedResponseError, read_answer
from fixclip_core.synthesis.job import Job, RequestFailedError
from fixclip_core.synthesis.journal import Task
from fixclip_core.synthesis.prompts import Prompt
from fixclip_core.synthesis.shard import Shard

API_KEY = "OPENAI_API_KEY"
# Of each client: for every request the client looks at all its connections, so many in one cost more than many ones.
_CONNECTIONS = 4


@dataclass(frozen=True)
class ServerOptions:
    """Where the server is and how it is asked; nothing here changes a caption.

    Attributes:
        url: its address, e.g. http://127.0.0.1:8000; /v1 is added where it names no path. The key, if the server
            wants one, is the environment variable OPENAI_API_KEY.
        concurrency: requests under way at the same time.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again.
        max_failures: so many failed requests in a row end the run.
    """

    url: str
    concurrency: int = 64
    timeout: float = 120.0
    retries: int = 4
    max_failures: int = 20

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"--server {self.url!r}: give an address like http://127.0.0.1:8000")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"--server: a key does not belong into the address; put it into the variable {API_KEY}")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0 or self.max_failures < 1:
            raise ValueError(f"{self}: concurrency and max_failures at least 1, timeout above 0, retries at least 0")

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/") if urlsplit(self.url).path.strip("/") else self.url.rstrip("/") + "/v1"


class ServerError(ValueError):
    """The server cannot be used at all; says which one, why and what to do."""


class ServerLostError(ServerError):
    """The server was at work, and gives no usable answers any more."""


class Server:
    """The server, with its errors told apart."""

    def __init__(self, options: ServerOptions, model: str) -> None:
        self.options, self.model = options, model
        self._key = os.environ.get(API_KEY) or ""
        self._clients = [self._new_client() for _ in range(-(-options.concurrency // _CONNECTIONS))]
        self._turns = itertools.cycle(self._clients)

    def _new_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.options.base_url,
            api_key=self._key or "none",  # local servers want none
            timeout=self.options.timeout,
            max_retries=self.options.retries,
        )

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()

    async def check(self) -> None:
        """Find out before the first image is read whether anybody answers.

        Raises:
            ServerError: nobody does, or the key is not accepted.
        """
        try:
            await self._models()
        except openai.APIConnectionError as error:  # a timeout is one too
            raise ServerError(
                f"{self.options.base_url}: no server answers ({_cause(error)}): start one, e.g. "
                f"`vllm serve {self.model} --port 8000`, or correct --server"
            ) from None
        except openai.AuthenticationError as error:
            raise self._wrong_key(error) from None
        except (openai.APIError, MalformedResponseError):
            pass  # a server need not list its models

    async def _models(self) -> list[str]:
        listing = await self._clients[0].with_options(timeout=10, max_retries=1).get("/models", cast_to=str)
        try:
            return [str(entry["id"]) for entry in json.loads(listing)["data"]]
        except (ValueError, KeyError, TypeError):
            raise MalformedResponseError(f"no list of models: {listing[:100]!r}") from None

    async def ask(self, body: bytes) -> Any:
        """The response to a chat completion, parsed.

        Args:
            body: the request as JSON; the client would copy one that is not encoded yet several times.

        Raises:
            RequestFailedError: this request failed.
            ServerError: every request would.
        """
        try:
            headers = {"Content-Type": "application/json"}
            text = await next(self._turns).post(
                "/chat/completions", content=body, options={"headers": headers}, cast_to=str
            )
        except openai.AuthenticationError as error:
            raise self._wrong_key(error) from None
        except openai.NotFoundError as error:
            raise await self._wrong_model(error) from None
        except openai.APIStatusError as error:
            reasons = {429: "rate_limited"} | dict.fromkeys(range(500, 600), "server_error")
            reason = reasons.get(error.status_code, "refused_request")
            raise RequestFailedError(reason, self._said(error)) from None
        except openai.APITimeoutError:
            detail = f"no answer within {self.options.timeout:g} s, {self.options.retries + 1} times"
            raise RequestFailedError("timeout", detail) from None
        except openai.APIConnectionError as error:
            raise RequestFailedError("no_connection", _cause(error)) from None
        try:
            return json.loads(text)
        except ValueError:
            raise RequestFailedError("bad_answer", f"no JSON: {text[:100]!r}") from None

    def _said(self, error: openai.APIStatusError) -> str:
        """The status and the server's own words, but never the key."""
        said = error.body.get("message") if isinstance(error.body, dict) else None
        text = f"{error.status_code}: {said or error.response.text or error.message}"[:300]
        return text.replace(self._key, "***") if self._key else text

    def _wrong_key(self, error: openai.APIStatusError) -> ServerError:
        state = "is not accepted" if self._key else "is missing"
        return ServerError(
            f"{self.options.base_url}: the key {state} ({self._said(error)}); set {API_KEY} to the server's key"
        )

    async def _wrong_model(self, error: openai.APIStatusError) -> ServerError:
        try:
            there = ", ".join(await self._models()) or "none"
            advice = f"--model must be one of its models: {there}"
        except (openai.APIError, MalformedResponseError):
            advice = "correct --model, or the path in --server"
        return ServerError(f"{self.options.base_url}: no model {self.model!r} there ({self._said(error)}); {advice}")


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".rstrip(": ")


class Progress:
    """A bar of samples with images/s and tokens/s of this run, the accepted share and the time left."""

    def __init__(self, total: int, hidden: bool = False) -> None:
        self._hidden = hidden
        self._bar = tqdm(total=total, desc="captioning", unit="image", smoothing=0.1, mininterval=0.5, disable=hidden)
        self._answers = self._accepted = self._tokens = 0
        self._since = time.monotonic()
        self._of_shard: dict[int, int] = {}

    def skip(self, samples: int) -> None:
        """Samples that were finished before."""
        if not self._hidden:
            self._bar.initial += samples
            self._bar.update(samples)

    def settled(self, shard: int, samples: int) -> None:
        """So many samples of a shard are settled by now."""
        self._bar.update(samples - self._of_shard.get(shard, 0))
        self._of_shard[shard] = samples

    def one_settled(self, shard: int) -> None:
        self.settled(shard, self._of_shard.get(shard, 0) + 1)

    def answered(self, accepted: bool, tokens: int) -> None:
        self._answers += 1
        self._accepted += accepted
        self._tokens += tokens
        seconds = max(time.monotonic() - self._since, 1e-3)
        share = f"{self._accepted / self._answers:.1%}"
        self._bar.set_postfix({"tokens/s": f"{self._tokens / seconds:,.0f}", "accepted": share}, refresh=False)

    def note(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Captioning:
    """Asks a server for all that a job's shards need, `concurrency` requests at a time.

    Whatever ends the run early - an error, Ctrl-C - no further request is sent, and the answers under way are waited
    for and kept, as they are paid for.
    """

    def __init__(self, job: Job, server: Server, progress: Progress) -> None:
        self.job, self.server, self.progress = job, server, progress
        self.stopping = False
        self.error: Exception | None = None
        self._slots = asyncio.Semaphore(server.options.concurrency)
        self._failed_in_a_row = 0

    def stop(self, error: Exception | None = None) -> None:
        """Send nothing more; `error` is why, the first one counts."""
        self.stopping = True
        self.error = self.error or error

    async def run(self, numbers: Iterable[int]) -> None:
        """Caption shards, a few at a time, so that the last answers of one do not hold up the next.

        Raises:
            ServerError, OSError, ValueError: what ended the run early.
        """
        shards_at_a_time = asyncio.Semaphore(2 + self.server.options.concurrency // self.job.recipe.shard_size)
        under_way: set[asyncio.Task[None]] = set()
        for number in numbers:
            await shards_at_a_time.acquire()
            if self.stopping:
                break
            task = asyncio.create_task(self._shard(number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            task.add_done_callback(lambda _: shards_at_a_time.release())
        await asyncio.gather(*under_way)
        if self.error is not None:
            raise self.error

    async def _shard(self, number: int) -> None:
        try:
            if await asyncio.to_thread(self.job.finished, number):
                self.progress.skip(len(self.job.indices(number)))
                return
            shard = await asyncio.to_thread(Shard, self.job, number)
            self.progress.settled(number, sum(map(shard.settled, shard.indices)))
            while not self.stopping and (tasks := shard.pending()):
                await asyncio.gather(*(self._answer(shard, task) for task in tasks))
            if self.stopping:
                shard.journal.close()
            else:
                await asyncio.to_thread(shard.finish)
                self.progress.settled(number, len(shard.indices))
        except Exception as error:
            self.stop(error)

    async def _answer(self, shard: Shard, task: Task) -> None:
        async with self._slots:
            if self.stopping:
                return
            try:
                prompt, body = await asyncio.to_thread(self._question, task)
                answer = read_answer(await self.server.ask(body), self.job.model)
                self._failed_in_a_row = 0
                shard.add(task, prompt, answer)
                verdict = shard.verdict(task)
                self.progress.answered(verdict is not None and verdict.caption is not None, answer.tokens)
            except BadSampleError as error:
                shard.leave_out(task.index, error.skipped.reason, error.skipped.detail)
            except MalformedResponseError as error:
                self._failed(shard, task, RequestFailedError("bad_answer", str(error)))
            except RequestFailedError as error:
                self._failed(shard, task, error)
            except Exception as error:
                self.stop(error)
        if shard.settled(task.index):
            self.progress.one_settled(shard.number)

    def _question(self, task: Task) -> tuple[Prompt, bytes]:
        prompt, body = self.job.question(task)
        return prompt, json.dumps(body).encode()

    def _failed(self, shard: Shard, task: Task, error: RequestFailedError) -> None:
        shard.leave_out(task.index, error.reason, error.detail)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.server.options.max_failures:
            base_url, model = self.server.options.base_url, self.job.model
            self.stop(
                ServerLostError(
                    f"{base_url}: {self._failed_in_a_row} requests to {model} in a row failed, the last with {error}; "
                    "every caption so far is kept: see to the server, then run the same command again"
                )
            )


async def _caption(job: Job, options: ServerOptions) -> None:
    async with Server(options, job.model) as server:
        await server.check()
        progress = Progress(len(job.samples))
        captioning = Captioning(job, server, progress)
        try:
            with _interruptible(captioning) as interrupted:
                await captioning.run(range(len(job)))
        finally:
            progress.close()
        if interrupted:
            raise KeyboardInterrupt


@contextmanager
def _interruptible(captioning: Captioning) -> Iterator[list[int]]:
    """Ctrl-C once waits for the answers under way, twice gives them up; the list then holds the signal."""
    loop, main, interrupted = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert main is not None

    def interrupt(number: int) -> None:
        if interrupted:
            main.cancel()
            return
        interrupted.append(number)
        captioning.stop()
        captioning.progress.note("stopping: waiting for the answers under way; Ctrl-C again gives them up")

    in_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()  # others get no signals
    for number in signals:
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield interrupted
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def caption(job: Job, options: ServerOptions) -> dict[str, Any]:
    """Ask a server for every caption that the job lacks, write its output and give its report.

    Raises:
        ValueError: the server cannot be used, or the output cannot be written. What was answered is kept.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    with job.locked():
        try:
            asyncio.run(_caption(job, options))
            return job.report()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except OSError as error:
            raise ValueError(
                f"{job.out}: cannot be written: {error}; every caption so far is kept: make room, then run the same "
                "command again"
            ) from None
