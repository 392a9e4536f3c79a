"""Judges: how replies are read, a server on loopback with each fault, local models, and answers that outlive a kill."""

import json
import os
import signal
import time

import pytest
import torch
from benchmark_demo.noisy_judge import NoisyJudge, completion, serving
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from fixclip_core import scenes
from fixclip_diffusion.evaluation.answers import ask, find_work, problems, read_answers
from fixclip_diffusion.evaluation.generate import Picture
from fixclip_diffusion.evaluation.judges import JudgeError, Reply, SceneChecker, instruction, read_reply
from fixclip_diffusion.evaluation.prompts import Prompt, Question, read_prompts
from fixclip_diffusion.evaluation.vision_judges import GIVE_UP_AFTER, NUM_CANDIDATES, LocalModel, VisionServer
from fixclip_diffusion.tiny import train_tokenizer

YES_NO, WORD, SCORE = (
    Question("1", "Is it red?"),
    Question("2", "How many?", "three"),
    Question("3", "Colours: red", ""),
)


# -- replies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "raw", "answer", "right", "problem"),
    [
        (YES_NO, "Yes", "yes", 1.0, ""),
        (YES_NO, "no, it is blue.", "no", 0.0, ""),
        (YES_NO, "**Yes**, clearly", "yes", 1.0, ""),
        (YES_NO, "The horse is red. Answer: No", "no", 0.0, ""),
        (YES_NO, "I looked at it.\nyes", "yes", 1.0, ""),
        (YES_NO, "<think>no star, no...</think> Yes.", "yes", 1.0, ""),
        (YES_NO, "<think>no star, no", None, None, "no answer"),
        (YES_NO, "There is no way to tell, yes and no.", None, None, "no answer"),
        (YES_NO, "", None, None, "no answer"),
        (YES_NO, "I'm sorry, but I can't help with that.", None, None, "refused"),
        (YES_NO, "Nothing of it", None, None, "no answer"),
        (Question("1", "?", "no"), "No.", "no", 1.0, ""),
        (WORD, "Three.", "three", 1.0, ""),
        (WORD, "3", "3", 1.0, ""),
        (WORD, "There are 3 lobsters in the picture", "3", 1.0, ""),
        (WORD, "two or three lobsters", None, None, "no answer"),
        (WORD, "four", "four", 0.0, ""),
        (WORD, "I cannot count them", None, None, "refused"),
        (Question("1", "What?", "Sea lion"), "sea lion", "sea lion", 1.0, ""),
        (SCORE, "5", "5", 1.0, ""),
        (SCORE, "**Score**: 2, the hat is missing", "2", 0.25, ""),
        (SCORE, "3/5", "3", 0.5, ""),
        (SCORE, "10", None, None, "no answer"),
        (SCORE, "very good", None, None, "no answer"),
    ],
)
def test_replies_in_text(question, raw, answer, right, problem):
    reply = read_reply(question, raw)
    assert (reply.answer, reply.right, reply.problem, reply.raw, reply.probability) == (
        answer,
        right,
        problem,
        raw,
        None,
    )


def test_replies_with_probabilities():
    reply = read_reply(YES_NO, "No", {" Yes": 0.5, "yes": 0.1, "No": 0.2, "Maybe": 0.1})
    assert (reply.answer, reply.right) == ("yes", 1.0)
    assert reply.probability == pytest.approx(0.6 / 0.8)
    assert read_reply(Question("1", "?", "no"), "No", {"No": 0.6, "Yes": 0.2}).probability == pytest.approx(0.75)
    unsure = read_reply(YES_NO, "Well, answer: no", {"Well": 0.9, "Yes": 0.05})  # the first token is no answer
    assert (unsure.answer, unsure.probability) == ("no", None)
    count = read_reply(WORD, "Three", {"Three": 0.7, "3": 0.2, "Four": 0.1})
    assert (count.right, count.probability) == (1.0, pytest.approx(0.9))
    thought = read_reply(YES_NO, "<think>no</think>yes", {"No": 0.9})
    assert (thought.answer, thought.probability, thought.token_probability) == ("yes", None, None)


def test_the_probability_among_all_tokens_is_kept_as_it_came():
    """GenEval 2 takes it as it is; it does not make yes and no sum to 1."""
    assert read_reply(YES_NO, "No", {" Yes": 0.5, "yes": 0.1, "No": 0.2}).token_probability == pytest.approx(0.6)
    assert read_reply(Question("1", "?", "no"), "No", {"No": 0.6, "Yes": 0.2}).token_probability == pytest.approx(0.6)
    unsure = read_reply(YES_NO, "Well, answer: no", {"Well": 0.9, "Yes": 0.05})
    assert (unsure.probability, unsure.token_probability) == (None, 0.05)
    assert read_reply(WORD, "Three", {"Three": 0.7, "3": 0.2, "Four": 0.1}).token_probability == pytest.approx(0.9)
    assert read_reply(WORD, "Four", {"Four": 0.9}).token_probability == 0.0
    assert read_reply(YES_NO, "Yes").token_probability is None


@given(st.text(max_size=60), st.sampled_from([YES_NO, WORD, SCORE]))
def test_any_reply_is_an_answer_or_a_problem(raw, question):
    reply = read_reply(question, raw)
    assert (reply.answer is None) == (reply.right is None) == bool(reply.problem)
    assert reply.right is None or 0 <= reply.right <= 1


def test_instructions_ask_for_what_is_read():
    assert instruction(YES_NO) == "Is it red? Answer with yes or no."
    assert instruction(WORD).endswith("Answer with one word.")
    assert "Colours: red" in instruction(SCORE)


# -- a server ------------------------------------------------------------------------------------------------


class Faulty(NoisyJudge):
    """Plays the faults in `script`, one a request, before it answers: a status, a text, "refuse" or "filter"."""

    def __init__(self, *script, forever=None, **options):
        super().__init__(**options)
        self.script, self.forever = list(script), forever

    def answer(self, picture, text, request):
        with self.lock:
            fault = self.script.pop(0) if self.script else self.forever
        if fault is None:
            return super().answer(picture, text, request)
        if fault == "refuse":
            return 200, completion("", refusal="I will not look at this")
        if fault == "filter":
            return 400, {"error": {"message": "content policy violation", "code": "content_filter"}}
        if fault == "no logprobs" and "logprobs" in request:
            return 400, {"error": {"message": "logprobs are not supported by this model"}}
        if fault == "no logprobs":
            return super().answer(picture, text, request)
        if isinstance(fault, int):
            return fault, {"error": {"message": f"fault {fault}"}}
        return 200, completion(fault)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A prompt and its right picture."""
    (prompt,) = read_prompts("scenes:1")
    path = tmp_path_factory.mktemp("scene") / "x.png"
    Image.fromarray(scenes.render(prompt.scene).permute(1, 2, 0).numpy()).save(path)
    return prompt, Picture(path, 0)


def judge_of(server, **options):
    return VisionServer(server.url, "m", **{"retries": 1, "workers": 1, **options})


def asked(judge, scene, folder, known=None):
    prompt, picture = scene
    work, standing = find_work("s", [prompt], [[picture]], read_answers(folder) if known is None else known)
    return standing + ask(judge, work, folder / "0.jsonl")


def test_a_server_without_error_agrees_with_the_checker(scene, tmp_path):
    prompt, picture = scene
    with serving(NoisyJudge()) as server:
        found = asked(judge_of(server, workers=3), scene, tmp_path)
    exact = list(SceneChecker().answers(picture.load(), prompt, prompt.questions))
    by_question = {a.question: a for a in found}
    assert [by_question[q.id].answer for q in prompt.questions] == [reply.answer for reply in exact]
    assert all(a.probability == pytest.approx(0.99) for a in found)
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert {"picture", "question", "answer", "reply", "judge"} <= rows[0].keys()
    assert len(rows) == len(prompt.questions)


def test_a_server_errs_at_the_stated_rate():
    prompts = read_prompts("scenes:20")
    with serving(NoisyJudge(0.2, probabilities=False)) as server:
        judge = judge_of(server)
        wrong, number = 0, 0
        for prompt in prompts:
            image = Image.fromarray(scenes.render(prompt.scene).permute(1, 2, 0).numpy())
            replies = list(judge.answers(image, prompt, prompt.questions[:6]))
            assert all(reply.probability is None for reply in replies)
            wrong += sum(reply.answer == "no" for reply in replies)
            number += len(replies)
    assert 0.09 < wrong / number < 0.31  # 120 questions: 3 standard errors


def test_each_fault_is_named_and_asked_again(scene, tmp_path):
    script = ("refuse", "filter", "who knows", 418, "I'm sorry, I can't", 503)
    with serving(Faulty(*script)) as server:
        found = asked(judge_of(server), scene, tmp_path)  # the 503 is tried again by itself
        assert problems(found) == {"refused": 3, "no answer": 1, "request failed": 1}
        first = [a.problem for a in found[:6]]
        assert first == ["refused", "refused", "no answer", "request failed", "refused", ""]
        before = server.asked
        again = asked(judge_of(server), scene, tmp_path)
        assert server.asked == before + 5
    assert problems(again) == {}
    assert {a.question for a in again} == {a.question for a in found}
    assert all(a.right == 1 for a in read_answers(tmp_path).values())


def test_a_server_that_goes_down_loses_nothing(scene, tmp_path):
    prompt, _ = scene
    kept = r"is down: .*fault 500.*; 7 of 19 questions .* are kept"
    with serving(Faulty(*[None] * 7, forever=500)) as server, pytest.raises(JudgeError, match=kept):
        asked(judge_of(server, retries=0), scene, tmp_path)
    assert len(read_answers(tmp_path)) == 7
    with pytest.raises(JudgeError, match=r"is down: Connection error"):  # nobody listens there any more
        asked(judge_of(server, retries=0), scene, tmp_path)
    with serving(NoisyJudge()) as server:
        found = asked(judge_of(server), scene, tmp_path)
        assert server.asked == len(prompt.questions) - 7
    assert len(found) == len(prompt.questions)


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (401, r"model 'm': .*fault 401", 1),
        (404, r"model 'm': .*fault 404", 1),
        (400, rf"refused all of its first {GIVE_UP_AFTER} requests: .*fault 400", GIVE_UP_AFTER),
    ],
)
def test_what_every_request_would_meet_stops_the_run(scene, tmp_path, fault, message, requests):
    with serving(Faulty(forever=fault)) as server:
        with pytest.raises(JudgeError, match=message):
            asked(judge_of(server), scene, tmp_path)
        assert server.asked == requests


def test_a_server_without_log_probabilities_is_read_by_text(scene, tmp_path):
    with serving(Faulty(forever="no logprobs")) as server:
        judge = judge_of(server)
        found = asked(judge, scene, tmp_path)
        assert server.asked == len(found) + 1
    assert judge.describe()["probabilities"] is False
    assert all(a.right == 1 and a.probability is None for a in found)


def test_missing_and_damaged_pictures_are_listed(scene, tmp_path):
    prompt, _ = scene
    (tmp_path / "bad.png").write_bytes(b"bad")
    pictures = [Picture(None, 0), Picture(tmp_path / "bad.png", 1)]
    work, _ = find_work("s", [prompt], [pictures], {})
    found = ask(SceneChecker(), work, tmp_path / "a" / "0.jsonl")
    number = len(prompt.questions)
    assert problems(found) == {"picture missing": number, "picture unreadable": number}


def test_a_picture_that_changed_is_judged_again(scene, tmp_path):
    prompt, picture = scene
    path = tmp_path / "x.png"
    path.write_bytes(picture.path.read_bytes())
    own = (prompt, Picture(path, 0))
    assert {a.answer for a in asked(SceneChecker(), own, tmp_path / "a")} == {"yes"}
    Image.new("RGB", (72, 72), "black").save(path)
    found = asked(SceneChecker(), own, tmp_path / "a")
    assert [a.answer for a in found].count("no") >= 18
    assert read_answers(tmp_path / "a")["s", prompt.id, 0, prompt.questions[0].id].answer == "no"


def test_the_checker_judges_nothing_but_scenes(scene):
    _prompt, picture = scene
    with pytest.raises(JudgeError, match="the checker judges scenes alone; prompt 'x' has questions about"):
        list(SceneChecker().answers(picture.load(), Prompt("A cat.", id="x", questions=(YES_NO,)), (YES_NO,)))


class Slow(SceneChecker):
    """Answers yes, and falls asleep after five answers."""

    def __init__(self, pipe):
        self.pipe = pipe

    def answers(self, image, prompt, questions):
        for number, _ in enumerate(questions):
            if number == 5:
                os.write(self.pipe, b"five")
                time.sleep(600)
            yield Reply("", "yes", 1.0)


def test_kill_loses_no_answer_and_leaves_no_half_line_behind(scene, tmp_path):
    prompt, _ = scene
    reading, writing = os.pipe()
    child = os.fork()  # it touches no torch
    if child == 0:
        asked(Slow(writing), scene, tmp_path)
        os._exit(1)
    assert os.read(reading, 4) == b"five"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    file = tmp_path / "0.jsonl"
    assert len(read_answers(tmp_path)) == 5
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 40])  # as a full disk leaves it
    found = asked(SceneChecker(), scene, tmp_path)
    assert {a.question for a in found} == {q.id for q in prompt.questions}
    assert len(read_answers(tmp_path)) == len(prompt.questions)


def test_urls_need_a_model():
    with pytest.raises(ValueError, match="name its model with --judge-model"):
        VisionServer("http://127.0.0.1:1/v1", None)


# -- local models --------------------------------------------------------------------------------------------

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = dict(**TEXT, image_size=16, patch_size=8, projection_dim=16)


def bert_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "yes", "no", "is", "it", "red", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt")), len(words)


def blip(folder):
    tokenizer, size = bert_tokenizer(folder)
    special = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = dict(**TEXT, **special, vocab_size=size, encoder_hidden_size=16)
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)


def vilt(folder):
    tokenizer, size = bert_tokenizer(folder)
    config = ViltConfig(
        **TEXT, vocab_size=size, image_size=32, patch_size=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes":
        1}, max_position_embeddings=40,
    )  # fmt: skip
    model = ViltForQuestionAnswering(config)
    torch.nn.init.zeros_(model.classifier[-1].weight)
    model.classifier[-1].bias.data = torch.tensor([0.0, 1.0])
    model.save_pretrained(folder)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}), tokenizer).save_pretrained(folder)


def llava(folder):
    tokenizer = train_tokenizer(["yes no is it red answer with"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, vision_feature_layer=-1, image_seq_length=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    images = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def test_a_local_model_gives_the_probability_of_an_unlikely_answer_too(tmp_path):
    """The vocabulary has far more tokens than the candidates; the expected word is looked up by itself."""
    torch.manual_seed(0)
    llava(tmp_path)
    judge = LocalModel(str(tmp_path), max_tokens=1)
    image, question = Image.new("RGB", (20, 30), "red"), Question("1", "Which letter?", "x")
    _, found = judge._generate(image, question)
    with torch.no_grad():
        inputs = judge._inputs(image, instruction(question))
        share_V = judge.model(**inputs).logits[0, -1].softmax(-1)
    (expected,) = judge.processor.tokenizer.encode("x", add_special_tokens=False)
    assert expected not in share_V.topk(NUM_CANDIDATES).indices  # else the seed shows nothing
    assert found[judge.processor.tokenizer.decode([expected])] == pytest.approx(share_V[expected].item(), rel=1e-4)


@pytest.mark.parametrize("make", [blip, vilt, llava])
def test_local_models_answer_or_are_counted(make, tmp_path):
    """Random weights say anything; what they say is read, and every question has a reply."""
    make(tmp_path)
    judge = LocalModel(str(tmp_path), max_tokens=4)
    image = Image.new("RGB", (20, 30), "red")
    prompt = Prompt("It is red.", id="x", questions=(YES_NO, Question("2", "Is it?")))
    replies = list(judge.answers(image, prompt, prompt.questions))
    assert len(replies) == 2
    assert all((reply.answer is None) == bool(reply.problem) for reply in replies)
    if make is vilt:  # its classes are known: yes has one more than no
        share = torch.tensor([0.0, 1.0]).softmax(-1)[1].item()
        assert [(reply.answer, reply.probability) for reply in replies] == [("yes", pytest.approx(share, abs=1e-4))] * 2
    assert judge.describe()["class"] == type(judge.model).__name__


def test_no_local_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no vision-language model that transformers can load"):
        LocalModel(str(tmp_path))
