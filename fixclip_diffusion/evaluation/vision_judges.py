"""Models as judges: any server that speaks OpenAI's chat completions, or a model of transformers on this machine."""

import base64
import functools
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from fixclip_diffusion.evaluation.judges import (
    FAILED,
    REFUSED,
    JudgeError,
    Reply,
    expected_words,
    instruction,
    read_reply,
)
from fixclip_diffusion.evaluation.prompts import Prompt, Question

NUM_CANDIDATES = 20  # tokens whose probability is asked for
GIVE_UP_AFTER = 10  # requests refused one after the other, from the first on


class VisionServer:
    """A vision model behind an OpenAI-compatible URL: vLLM, SGLang, llama.cpp, Ollama, LM Studio, or a paid service.

    The key is read from the environment variable OPENAI_API_KEY. Where the server gives log-probabilities of tokens the
    answer is read from them, else from the text.

    Args:
        url: up to and with the version, like http://127.0.0.1:8000/v1.
        model: its name there.
        max_tokens: of a reply; a model that thinks before it answers needs hundreds.
        workers: requests at a time.
        retries: of a request that fails by itself (no connection, a time-out, 429, 5xx), with growing pauses.
        timeout: seconds of one request.

    Raises:
        ValueError: the package `openai` is missing, or no model is named.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        max_tokens: int = 64,
        workers: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
    ):
        try:
            import openai
        except ModuleNotFoundError:
            raise ValueError("a judge behind a URL needs the package openai: pip install 'fixclip[judge]'") from None
        if not model:
            raise ValueError(f"judge {url}: name its model with --judge-model")
        self.url, self.model, self.max_tokens, self.workers = url, model, max_tokens, workers
        self.name = re.sub(r"[^\w.-]", "_", model)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)
        self.errors = openai
        self.gives_probabilities = True
        self.answered = self.refused = 0

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "OpenAI-compatible",
            "url": self.url,
            "model": self.model,
            "probabilities": self.gives_probabilities,
        }

    def answers(self, image: Image.Image, prompt: Prompt, questions: Sequence[Question]) -> Iterator[Reply]:
        """See `Judge`.

        Raises:
            JudgeError: no connection after all retries, a wrong key or model, or nothing but refused requests.
        """
        picture = _as_url(image)
        for question in questions:
            yield self._ask(picture, question)

    def _ask(self, picture: str, question: Question) -> Reply:
        errors = self.errors
        try:
            choice = self._request(picture, question).choices[0]
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotFoundError) as error:
            raise JudgeError(f"judge {self.url}, model {self.model!r}: {_message(error)}") from error
        except (errors.APIConnectionError, errors.RateLimitError, errors.InternalServerError) as error:
            raise JudgeError(f"judge {self.url} is down: {_message(error)}") from error
        except errors.APIStatusError as error:  # this request alone: a content filter, a picture it cannot read
            self.refused += 1
            if not self.answered and self.refused >= GIVE_UP_AFTER:
                raise JudgeError(
                    f"judge {self.url} refused all of its first {self.refused} requests: {_message(error)}"
                ) from error
            filtered = "content" in str(error).lower()
            return Reply(_message(error), problem=REFUSED if filtered else FAILED)
        self.answered += 1
        raw = choice.message.content or choice.message.refusal or ""
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            return Reply(raw, problem=REFUSED)
        return read_reply(question, raw, _first_token(choice))

    def _request(self, picture: str, question: Question) -> Any:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": instruction(question)},
        ]
        options: dict[str, Any] = {}
        if self.gives_probabilities and question.kind != "score":
            options = {"logprobs": True, "top_logprobs": NUM_CANDIDATES}

        def create(**more: Any) -> Any:
            messages: Any = [{"role": "user", "content": content}]
            return self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=self.max_tokens, temperature=0.0, **more
            )

        try:
            return create(**options)
        except self.errors.BadRequestError as error:
            if not options or "logprob" not in str(error).lower():
                raise
            self.gives_probabilities = False  # it knows no log-probabilities; every answer is read from text
            return create()


def _message(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", None) or error).split())[:300]


def _as_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _first_token(choice: Any) -> dict[str, float] | None:
    """Probabilities of the first token that is more than white space."""
    for token in (choice.logprobs.content if choice.logprobs else None) or ():
        if token.token.strip():
            return {candidate.token: math.exp(candidate.logprob) for candidate in token.top_logprobs} or None
    return None


class LocalModel:
    """A vision-language model of transformers: one that chats (LLaVA, Qwen-VL, ...) or one for questions (BLIP, ViLT).

    The answer's probability is that of the first token, or of the class for models with a fixed set of answers.

    Args:
        source: folder or hub name.
        device, dtype: where and in what precision it runs.
        max_tokens: of a reply.

    Raises:
        ValueError: transformers knows no such model.
    """

    workers = 1

    def __init__(
        self,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 64,
    ):
        from transformers import AutoConfig, AutoProcessor

        self.source, self.device, self.dtype, self.max_tokens = source, device, dtype, max_tokens
        self.name = re.sub(r"[^\w.-]", "_", source.rstrip("/").rsplit("/", 1)[-1])
        try:
            self.architecture = (AutoConfig.from_pretrained(source).architectures or [""])[0]
            self.processor: Any = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise self._cannot_load(error) from error

    def _cannot_load(self, error: Exception) -> ValueError:
        first = str(error).strip().split("\n")[0]
        return ValueError(f"judge {self.source!r}: no vision-language model that transformers can load: {first}")

    @functools.cached_property
    def model(self) -> Any:
        """Loaded when the first question comes, after the systems that draw have left the GPU."""
        from transformers import AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering

        is_for_questions = self.architecture.endswith("ForQuestionAnswering")
        factory: Any = AutoModelForVisualQuestionAnswering if is_for_questions else AutoModelForImageTextToText
        try:
            return factory.from_pretrained(self.source, dtype=self.dtype).to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise self._cannot_load(error) from error

    def describe(self) -> dict[str, Any]:
        return {"kind": "transformers", "source": self.source, "class": self.architecture}

    @torch.no_grad()
    def answers(self, image: Image.Image, prompt: Prompt, questions: Sequence[Question]) -> Iterator[Reply]:
        """See `Judge`."""
        for question in questions:
            ask = self._classify if hasattr(self.model, "classifier") else self._generate
            yield read_reply(question, *ask(image, question))

    def _inputs(self, image: Image.Image, text: str) -> Any:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = self.processor(images=image, text=text, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, image: Image.Image, question: Question) -> tuple[str, Mapping[str, float]]:
        asked = instruction(question) if getattr(self.processor, "chat_template", None) else question.text
        output = self.model.generate(
            **self._inputs(image, asked),
            max_new_tokens=self.max_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokenizer = self.processor.tokenizer
        new_tokens = output.sequences[0, -len(output.scores) :]
        shares = output.scores[0][0].float().softmax(-1)
        probability, index = shares.topk(min(NUM_CANDIDATES, len(shares)))
        # An unlikely answer is looked up by itself: a geometric mean depends on how unlikely it is.
        for first in self._first_tokens(question) - set(index.tolist()):
            index = torch.cat([index, index.new_tensor([first])])
            probability = torch.cat([probability, shares[first : first + 1]])
        found: dict[str, float] = {}
        for token, share in zip(index.tolist(), probability.tolist(), strict=True):
            text = tokenizer.decode([token])
            found[text] = found.get(text, 0.0) + share
        return tokenizer.decode(new_tokens, skip_special_tokens=True), found

    def _first_tokens(self, question: Question) -> set[int]:
        """The first token of the expected answer, however it is written: "three", " Three", "3"."""
        tokenizer = self.processor.tokenizer
        spellings = {spell(word) for word in expected_words(question) for spell in (str, str.capitalize)}
        texts = [space + word for word in spellings if word for space in ("", " ")]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return {own[0] for own in ids if own and own[0] != tokenizer.unk_token_id}

    def _classify(self, image: Image.Image, question: Question) -> tuple[str, Mapping[str, float]]:
        logits = self.model(**self._inputs(image, question.text)).logits[0].float()
        names = self.model.config.id2label
        probability = logits.softmax(-1)
        return names[int(logits.argmax())], {names[i]: share for i, share in enumerate(probability.tolist())}
