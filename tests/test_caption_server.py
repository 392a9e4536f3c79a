"""`fixclip caption --server` against a real server on loopback that does every fault: nothing lost, nothing twice."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caption_server import SHORT, CaptionServer, asked, completion, describe
from PIL import Image

from fixclip_core.data.captions import CaptionFilters
from fixclip_core.data.check import check_source
from fixclip_core.data.config import DataConfig
from fixclip_core.data.pack import PackOptions, pack
from fixclip_core.data.samples import check_captions
from fixclip_core.data.sources import open_source
from fixclip_core.synthesis.drivers.server import ServerError, ServerOptions, caption
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.journal import Journal, Task
from fixclip_core.synthesis.prompts import LONG_PROMPTS
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.synthesis.shard import Shard

COUNT = 23
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images without captions; one of them is damaged."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        Image.new("RGB", (24 + number, 24), (number * 9, 0, 0)).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"<html>404</html>")
    return folder


def job(images, out, *, model="scenes", start=0, stop=None, **fields):
    recipe = CaptionRecipe.model_validate({"shard_size": 10, **fields})
    return Job(DataConfig(source=str(images), start=start, stop=stop), out, recipe, model)


def options(server, **fields):
    return ServerOptions(server.url, **{"concurrency": 4, "retries": 2, "timeout": 20.0, **fields})


def files(folder):
    """What a job wrote, by name, but for what tells of its history."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def samples(out):
    source = open_source(DataConfig(source=str(out)))
    return [source.read(index) for index in range(sum(source.sizes))]


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def captioned(images, tmp_path_factory):
    """What a run without any fault writes."""
    out = tmp_path_factory.mktemp("captioned") / "out"
    with CaptionServer().running() as server:
        caption(job(images, out), options(server))
    return out


def test_shards_that_training_reads_with_where_each_caption_came_from(images, captioned, tmp_path):
    found = samples(captioned)
    assert len(found) == COUNT - 1
    prompts = {prompt.id for prompt in LONG_PROMPTS}
    for sample in found:
        long, short = check_captions(sample, CaptionFilters())
        assert len(long.split()) > 8
        assert short is None
        assert sample.extra["model"] == "scenes"
        assert sample.extra["finish_reason"] == "stop"
        assert sample.extra["prompt"] in prompts
        assert sample.image == (images / sample.extra["image"]).read_bytes()
    assert len({sample.extra["prompt"] for sample in found}) > 5
    (skipped,) = report(captioned)["skipped"]
    assert (skipped["reason"], skipped["key"], skipped["index"]) == ("not_an_image", "07.png", 7)
    checked = check_source(DataConfig(source=str(captioned)), CaptionFilters())
    assert (checked.samples, checked.skipped, checked.filtered) == (COUNT - 1, [], {})
    packed = pack(DataConfig(source=str(captioned)), tmp_path / "packed", PackOptions())
    assert packed.written == COUNT - 1
    assert samples(tmp_path / "packed")[0].extra == found[0].extra


def test_a_manifest_beside_the_images(images, captioned, tmp_path):
    out = tmp_path / "captions.jsonl"
    with CaptionServer().running() as server:
        made = caption(job(images, out), options(server))
    assert made["written"] == COUNT - 1
    found = samples(out)
    assert [sample.long for sample in found] == [sample.long for sample in samples(captioned)]
    assert found[0].image == (images / "00.png").read_bytes()
    assert {"model", "prompt", "finish_reason"} <= set(found[0].extra)
    assert json.loads((tmp_path / "captions.report.json").read_text())["skipped"][0]["key"] == "07.png"
    with pytest.raises(ValueError, match="are no files of their own; give a folder instead"):
        job("scenes:3", tmp_path / "scenes.jsonl")


def test_nothing_depends_on_how_many_are_asked_at_once(images, captioned, tmp_path):
    with CaptionServer(pause=0.01).running() as server:
        caption(job(images, tmp_path / "out"), options(server, concurrency=1))
        assert server.most_at_once == 1
    assert files(tmp_path / "out") == files(captioned)
    with CaptionServer(pause=0.02).running() as server:
        caption(job(images, tmp_path / "again"), options(server, concurrency=7))
        assert 1 < server.most_at_once <= 7
    assert files(tmp_path / "again") == files(captioned)


def test_faults_that_pass_are_sat_out(images, captioned, tmp_path):
    faults = {1: "500", 4: "half", 6: "500", 9: "half"}
    with CaptionServer(fault=faults.get).running() as server:  # on a slow machine they may all meet one request
        caption(job(images, tmp_path / "out"), options(server, retries=len(faults)))
    assert files(tmp_path / "out") == files(captioned)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == COUNT - 1


def test_retry_after_is_honoured(images, tmp_path):
    with CaptionServer(fault={0: "429"}.get).running() as server:
        caption(job(images, tmp_path / "out", stop=1), options(server))
    first, second = server.times
    assert second - first >= 1


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("400", "refused_request", "400: the image is too large"),
        ("429", "rate_limited", "429: slow down"),
        ("500", "server_error", "500: out of memory"),
        ("half", "no_connection", "RemoteProtocolError"),
        ("no_json", "bad_answer", "no JSON: '<html>504"),
        ("other_json", "bad_answer", "busy"),
        ("hang", "timeout", "no answer within 0.5 s"),
    ],
)
def test_a_request_that_fails_is_reported_and_asked_again_by_the_next_run(
    images, captioned, tmp_path, fault, reason, detail
):
    out = tmp_path / "out"
    with CaptionServer(fault={3: fault}.get).running() as server:
        made = caption(job(images, out), options(server, retries=0, timeout=0.5 if fault == "hang" else 20.0))
        assert made["counts"] == {reason: 1, "not_an_image": 1}
        (failed,) = [skipped for skipped in report(out)["skipped"] if skipped["reason"] == reason]
        assert detail in failed["detail"]
        assert failed["key"].endswith(".png")
    with CaptionServer().running() as server:
        caption(job(images, out), options(server))
        assert sum(server.seen.values()) == 1
    assert files(out) == files(captioned)


def test_a_server_that_is_down(images, tmp_path):
    with CaptionServer().running() as server:
        pass
    with pytest.raises(ServerError, match=rf"{server.url}/v1: no server answers .*vllm serve some/model.*--server"):
        caption(job(images, tmp_path / "out", model="some/model"), options(server))


def test_a_server_that_goes_down_ends_the_run_and_keeps_what_there_is(images, captioned, tmp_path):
    out = tmp_path / "out"
    with CaptionServer(fault=lambda number: "500" if number >= 12 else None).running() as server:
        with pytest.raises(
            ServerError, match=r"5 requests to scenes in a row failed, .*500: out of memory.*run the same"
        ):
            caption(job(images, out), options(server, retries=0, max_failures=5))
        first = server.answered
    assert sum(first.values()) == 12
    with CaptionServer().running() as server:
        caption(job(images, out), options(server))
    assert not set(first) & set(server.answered)
    assert files(out) == files(captioned)


def test_a_wrong_model(images, tmp_path):
    with CaptionServer().running() as server, pytest.raises(ServerError, match=r"no model 'other' there.*: scenes$"):
        caption(job(images, tmp_path / "out", model="other"), options(server))
    with CaptionServer().running() as server:  # nothing was answered, so the name may change
        assert caption(job(images, tmp_path / "out"), options(server))["written"] == COUNT - 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(images, tmp_path, monkeypatch, capfd):
    with CaptionServer(key="sk-right").running() as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(ServerError, match=r"the key is missing .*set OPENAI_API_KEY"):
            caption(job(images, tmp_path / "out"), options(server))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
        with pytest.raises(ServerError, match=r"the key is not accepted \(401: wrong key Bearer \*\*\*\)"):
            caption(job(images, tmp_path / "out"), options(server))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        caption(job(images, tmp_path / "out"), options(server))
    with CaptionServer(fault=lambda number: "401").running() as server, pytest.raises(ServerError, match=r"\*\*\*"):
        caption(job(images, tmp_path / "expired"), options(server))
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-" in content for content in written)
    assert "sk-" not in "".join(capfd.readouterr())
    for url in ("http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ValueError, match="a key does not belong") as caught:
            ServerOptions(url)
        assert "secret" not in str(caught.value)
    for url in ("host:8000", "ftp://host", "http://", "http://host:99999"):
        with pytest.raises(ValueError, match="give an address like"):
            ServerOptions(url)


# -- filters and attempts


def test_a_rejected_answer_gets_one_more_try_with_another_prompt(images, tmp_path):
    def words(body):
        image, _ = asked(body)
        first = sum(1 for other, _ in server.answered if other == image) == 0
        return completion("Too short.") if first else describe(body)

    with CaptionServer(words=words).running() as server:
        made = caption(job(images, tmp_path / "out"), options(server))
    assert made["written"] == COUNT - 1
    assert made["answers"] == {"too_short": COUNT - 1, "accepted": COUNT - 1}
    by_image = {}
    for image, prompt in server.answered:
        by_image.setdefault(image, []).append(prompt)
    assert {len(set(prompts)) for prompts in by_image.values()} == {2}


def test_a_sample_without_a_caption_is_left_out_and_reported_with_each_reason(images, tmp_path):
    replies = iter([completion("Too short."), completion("I'm sorry, I cannot see the image that you speak of here.")])
    with CaptionServer(words=lambda body: next(replies)).running() as server:
        made = caption(job(images, tmp_path / "out", stop=1), options(server))
    assert made["counts"] == {"refusal": 1}
    (skipped,) = report(tmp_path / "out")["skipped"]
    assert (skipped["reason"], skipped["key"]) == ("refusal", "00.png")
    assert skipped["detail"].startswith("too_short: Too short.; refusal: I'm sorry")


SAME = "This picture shows a plain surface of one colour that fills all of the frame from edge to edge."


def test_the_same_caption_for_many_images_is_none(images, tmp_path):
    def words(body):
        image, _ = asked(body)
        return completion(SAME if image % 2 else describe(body)["choices"][0]["message"]["content"])

    with CaptionServer(words=words).running() as server:
        made = caption(job(images, tmp_path / "out", shard_size=100), options(server))
        equal = sum(image % 2 for image in {image for image, _ in server.answered})
        assert equal > 3
        assert made["counts"] == {"same_caption": equal, "not_an_image": 1}
        rare = caption(job(images, tmp_path / "rare", shard_size=100, filters={"max_same": equal}), options(server))
        assert rare["written"] == COUNT - 1


def test_changed_filters_judge_again_and_ask_nothing_twice(images, tmp_path):
    out = tmp_path / "out"
    with CaptionServer().running() as server:
        caption(job(images, out), options(server))
        before = sum(server.seen.values())
        strict = caption(job(images, out, attempts=1, filters={"min_words": 100}), options(server))
        assert sum(server.seen.values()) == before
        assert 0 < strict["counts"]["too_short"] < COUNT
        caption(job(images, out, filters={"min_words": 100}), options(server))
        assert sum(server.seen.values()) == before + strict["counts"]["too_short"]
    assert set(server.seen.values()) == {1}


def test_short_captions_asked_for_or_taken(images, tmp_path):
    with CaptionServer().running() as server:
        caption(job(images, tmp_path / "asked", short="ask"), options(server))
        assert sum(server.seen.values()) == 2 * (COUNT - 1)
        for policy in ("first_sentence", "random_sentence", "none"):
            caption(job(images, tmp_path / "asked", short=policy), options(server))
            for sample in samples(tmp_path / "asked"):
                assert (sample.short is None) if policy == "none" else (sample.short in sample.long)
        caption(job(images, tmp_path / "asked", short="ask"), options(server))
        assert sum(server.seen.values()) == 2 * (COUNT - 1)
    for sample in samples(tmp_path / "asked"):
        assert sample.short
        assert sample.short not in sample.long
        assert sample.extra["short_finish_reason"] == "stop"


def test_where_no_answer_is_a_short_caption_the_long_ones_first_sentence_takes_its_place(images, tmp_path):
    def words(body):
        return completion("No.") if asked(body)[1] in SHORT else describe(body)

    with CaptionServer(words=words).running() as server:
        made = caption(job(images, tmp_path / "out", short="ask"), options(server))
        assert sum(server.seen.values()) == 3 * (COUNT - 1)  # the short one is tried with another prompt, too
    assert made["short_from_long"] == made["written"] == COUNT - 1
    for sample in samples(tmp_path / "out"):
        assert sample.short == sample.long.split(".")[0] + "."
        assert sample.extra["short_prompt"] == "first_sentence"
        assert "short_finish_reason" not in sample.extra


# -- what is refused


def test_what_answers_depend_on_cannot_change_halfway(images, captioned, tmp_path):
    for fields, name in (({"seed": 1}, "seed=0"), ({"model": "other"}, "model='scenes'"), ({"stop": 5}, "stop=23")):
        with pytest.raises(ValueError, match=f"captioned with {name}, not .*choose another output"):
            job(images, captioned, **fields)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not from a captioning job"):
        job(images, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be used: .*[Nn]ot a directory"):
        job(images, tmp_path / "mine.txt" / "out")


def test_images_that_change_are_noticed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 30)).save(folder / "a.png")
    with CaptionServer().running() as server:
        caption(job(folder, tmp_path / "out"), options(server))
        Image.new("RGB", (31, 30)).save(folder / "a.png")
        with pytest.raises(ValueError, match="images changed since they were asked about"):
            caption(job(folder, tmp_path / "out"), options(server))


def test_two_runs_do_not_work_on_one_output(images, tmp_path, monkeypatch):
    monkeypatch.setattr("fixclip_core.synthesis.job._LOCK_SECONDS", 0.1)
    mine, other = job(images, tmp_path / "out"), job(images, tmp_path / "out")
    with CaptionServer().running() as server, mine.locked(), pytest.raises(ValueError, match="another process"):
        caption(other, options(server))


# -- interruptions


RUN = """
import resource, sys
from pathlib import Path
from fixclip_core.data.config import DataConfig
from fixclip_core.synthesis.drivers.server import ServerOptions, caption
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.recipe import CaptionRecipe
images, out, url, limit = sys.argv[1:]
job = Job(DataConfig(source=images), Path(out), CaptionRecipe(shard_size=10), "scenes")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    caption(job, ServerOptions(url, concurrency=3))
except ValueError as error:
    sys.exit(f"error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(images, out, server, limit=0):
    command = [sys.executable, "-c", RUN, str(images), str(out), server.url, str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen within five minutes")


def kept(out):
    """Questions with an answer on the disk."""
    journals = sorted((out / ".caption").glob("shard-*.jsonl"))
    return [row["task"] for path in journals for _, row in Journal(path).read() if "task" in row]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed_is_equal_to_never_killed(images, captioned, tmp_path, how):
    out = tmp_path / "out"
    with CaptionServer(pause=0.2).running() as server:
        process = start(images, out, server)
        wait_for(lambda: sum(server.answered.values()) >= 11)
        process.send_signal(how)
        errors = process.communicate(timeout=240)[1]
        answered = sum(server.answered.values())
        server.pause = 0
        if how == signal.SIGINT:
            assert process.returncode == 130, errors
            assert "waiting for the answers under way" in errors
            assert len(kept(out)) == answered < COUNT - 1  # what was under way was waited for
        else:
            assert answered - 3 <= len(kept(out)) < COUNT - 1  # all but what was under way
        before = len(kept(out))
        caption(job(images, out), options(server))
        again = sum(server.answered.values()) - answered - (COUNT - 1 - before)
        assert again == 0 if how == signal.SIGINT else 0 <= again <= 3  # nothing that was kept is asked again
    assert files(out) == files(captioned)


def test_a_full_disk(images, captioned, tmp_path):
    out = tmp_path / "out"
    with CaptionServer().running() as server:
        process = start(images, out, server, limit=3000)
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 1
        assert "cannot be written" in errors
        assert "every caption so far is kept" in errors
        assert errors.count("\n") == errors[: errors.index("error:")].count("\n") + 1  # no traceback
        before, answered = len(kept(out)), sum(server.answered.values())
        assert 0 < before < COUNT - 1
        caption(job(images, out), options(server))
        assert sum(server.answered.values()) == answered + COUNT - 1 - before
    assert files(out) == files(captioned)


MEMORY = """
import sys, tracemalloc
from pathlib import Path
from fixclip_core.data.config import DataConfig
from fixclip_core.synthesis.drivers.batch import write_batch
from fixclip_core.synthesis.drivers.server import ServerOptions, caption
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.recipe import CaptionRecipe
folder, url = sys.argv[1:]
def peak(driver, count):
    out = Path(folder, f"{driver}{count}")
    job = Job(DataConfig(source=f"{folder}/images", stop=count), out, CaptionRecipe(shard_size=10), "scenes")
    tracemalloc.start()
    if driver == "batch":
        write_batch(job, out.with_suffix(".jsonl"))
    else:
        assert caption(job, ServerOptions(url, concurrency=4))["written"] == count
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest
for driver in ("server", "batch"):
    peak(driver, 20)  # what is loaded once
    print(driver, peak(driver, 40), peak(driver, 400))
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    size = 96
    (tmp_path / "images").mkdir()
    for number in range(400):
        pixels = random.Random(number).randbytes(size * size * 3)  # 28 KB as a PNG, 37 KB in a request
        Image.frombytes("RGB", (size, size), pixels).save(tmp_path / "images" / f"{number:03d}.png")
    with CaptionServer().running() as server:  # in a process of its own, free of what other tests have left
        command = [sys.executable, "-c", MEMORY, str(tmp_path), server.url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        _, few, many = line.split()
        assert int(many) - int(few) < 360 * 18_000, line  # less than half of the requests


def test_half_a_line_in_a_journal_counts_as_not_written(images, captioned, tmp_path):
    out = tmp_path / "out"
    with CaptionServer().running() as server:
        caption(job(images, out, attempts=1, stop=9), options(server))
        before = sum(server.answered.values())
        journal = out / ".caption" / "shard-000000.jsonl"
        journal.write_bytes(journal.read_bytes()[:-30])
        (out / ".caption" / "shard-000000.json").unlink()
        caption(job(images, out, attempts=1, stop=9), options(server))
        assert sum(server.answered.values()) == before + 1
    assert len(kept(out)) == 8
    journal.write_bytes(b"{broken\n" + journal.read_bytes())
    with pytest.raises(ValueError, match=r"shard-000000.jsonl:1: damaged .* delete this line"):
        Shard(job(images, out, attempts=1, stop=9), 0)


def test_a_shard_follows_from_its_answers_in_any_order(images, captioned, tmp_path):
    """Order is what threads, processes, machines and interruptions differ in."""
    rows = [row for _, row in Journal(captioned / ".caption" / "shard-000001.jsonl").read()]
    for seed in range(3):
        out = tmp_path / str(seed)
        here = job(images, out)
        shuffled = rows[:1] + random.Random(seed).sample(rows[1:], len(rows) - 1)
        halves = shuffled[:4], rows[:1] + shuffled[4:] + shuffled[2:6]  # some twice, in two files
        for number, part in enumerate(halves):
            path = here.state / f"shard-000001{'.' * number}{number or ''}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        shard = Shard(here, 1)
        assert shard.pending() == []
        shard.finish()
        assert (out / "shard-000001.tar").read_bytes() == (captioned / "shard-000001.tar").read_bytes()


def test_tasks_have_names():
    task = Task(12, "short", 1)
    assert Task.parse(task.id) == task
    for wrong in ("long-0", "other-0-1", "long-x-1", None, 7):
        with pytest.raises(ValueError):  # noqa: PT011
            Task.parse(wrong)
