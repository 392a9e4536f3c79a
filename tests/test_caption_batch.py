"""`fixclip caption --write-batch`, `--read-batch`: OpenAI batch files, in any order, in parts, with failures."""

import json
import random

import pytest
from caption_server import CaptionServer, completion, describe
from PIL import Image
from test_caption_server import files, job, options
from typer.testing import CliRunner

from fixclip_cli.main import app
from fixclip_core.synthesis.drivers.batch import BatchLimits, read_batch, write_batch
from fixclip_core.synthesis.drivers.server import caption

COUNT = 13


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        Image.new("RGB", (24 + number, 24), (number * 9, 0, 0)).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"<html>404</html>")
    return folder


def requests(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(line, words=describe):
    """A line as `vllm run-batch` writes it."""
    response = {"status_code": 200, "request_id": "batch-1", "body": words(line["body"])}
    return {"id": "vllm-1", "custom_id": line["custom_id"], "response": response, "error": None}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_batch_makes_what_a_server_makes(images, tmp_path):
    file = tmp_path / "requests.jsonl"
    assert write_batch(job(images, tmp_path / "out", short="ask"), file) == ([file], COUNT - 1)
    lines = requests(file)
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert len({line["custom_id"] for line in lines}) == COUNT - 1
    answers = [answer(line) for line in lines]
    random.Random(0).shuffle(answers)
    half = write(tmp_path / "half.jsonl", answers[:5])
    rest = write(tmp_path / "rest.jsonl", answers[3:])
    reading = read_batch(job(images, tmp_path / "out", short="ask"), [half])
    assert (reading.answers, reading.failed, reading.report) == (5, {}, None)
    reading = read_batch(job(images, tmp_path / "out", short="ask"), [half, rest])
    assert (reading.answers, reading.pending) == (COUNT - 1 - 5, COUNT - 1)  # the short captions come next
    _, number = write_batch(job(images, tmp_path / "out", short="ask"), file)
    assert number == COUNT - 1
    reading = read_batch(job(images, tmp_path / "out", short="ask"), [write(half, map(answer, requests(file)))])
    assert reading.report["written"] == COUNT - 1
    assert reading.report["counts"] == {"not_an_image": 1}
    with CaptionServer().running() as server:
        caption(job(images, tmp_path / "served", short="ask"), options(server))
    assert files(tmp_path / "out") == files(tmp_path / "served")
    assert write_batch(job(images, tmp_path / "out", short="ask"), file) == ([], 0)


def test_failed_and_rejected_requests_are_written_again(images, tmp_path):
    here, file = job(images, tmp_path / "out"), tmp_path / "requests.jsonl"
    write_batch(here, file)
    first, second, third, fourth, *others = requests(file)
    failures = [
        {"custom_id": first["custom_id"], "response": {"status_code": 500, "body": {}}, "error": None},
        {"custom_id": second["custom_id"], "response": None, "error": {"code": "batch_expired"}},
        answer(third, lambda body: {"no": "completion"}),
        answer(fourth, lambda body: completion("Too short.")),
    ]
    reading = read_batch(here, [write(tmp_path / "answers.jsonl", [*failures, *map(answer, others)])])
    assert reading.failed == {"server_error": 1, "refused_request": 1, "bad_answer": 1}
    assert (reading.pending, reading.again) == (4, {"too_short": 1})
    places = [f"{tmp_path / 'answers.jsonl'}:{line} (0{line - 1}.png): " for line in (1, 2, 3)]
    assert [failure[: len(place)] for failure, place in zip(reading.failures, places, strict=True)] == places
    assert reading.failures[0].endswith("500: {}")
    assert "batch_expired" in reading.failures[1]
    assert reading.report is None
    write_batch(here, file)
    again = requests(file)
    assert [line["custom_id"] for line in again[:3]] == [line["custom_id"] for line in (first, second, third)]
    assert again[3]["custom_id"].startswith("long-1-")  # another prompt
    assert again[3]["body"]["messages"] != fourth["body"]["messages"]
    reading = read_batch(here, [write(tmp_path / "more.jsonl", map(answer, again))])
    assert reading.report["written"] == COUNT - 1


def test_only_what_is_to_ask_again_counts_as_failed(images, tmp_path):
    """Not a request that another line answers, nor twice what is there twice, nor what nobody asked."""
    here, file = job(images, tmp_path / "out"), tmp_path / "requests.jsonl"
    write_batch(here, file)
    first, second, *others = requests(file)

    def failed(name, status, **error):
        return {"custom_id": name, "response": status and {"status_code": status, "body": "no"}, **error}

    expired = failed(second["custom_id"], None, error={"code": "batch_expired"})
    prompt = first["custom_id"].partition(".")[2]
    never = [failed(first["custom_id"].replace("long-0", "long-9"), 400), failed(f"long-0-000000007.{prompt}", 400)]
    again = [failed(first["custom_id"], 503), answer(first), expired, expired, *never]
    answers = write(tmp_path / "answers.jsonl", [*again, *map(answer, others)])
    reading = read_batch(here, [answers])
    assert (reading.failed, reading.pending) == ({"refused_request": 1}, 1)
    assert reading.failures == (f'{answers}:4 (01.png): {{"code": "batch_expired"}}',)
    rest = write(tmp_path / "rest.jsonl", [failed(second["custom_id"], "busy"), answer(second)])
    assert read_batch(here, [rest]).pending == 0
    reading = read_batch(here, [answers, rest])  # a finished job
    assert (reading.answers, reading.failed, reading.failures) == (0, {}, ())


@pytest.mark.parametrize("kind", ["long", "short"])
def test_a_request_that_is_always_refused_holds_nobody_back(images, tmp_path, kind):
    """The rest of its shard is written, and the refused request is asked again, also a short caption's."""
    here, file = job(images, tmp_path / "out", short="ask"), tmp_path / "requests.jsonl"

    def round_of(refused):
        write_batch(here, file)
        lines = requests(file)
        rows = [
            {"custom_id": line["custom_id"], "response": {"status_code": 400, "body": {"error": "no picture of this"}}}
            if line["custom_id"].startswith(refused)
            else answer(line)
            for line in lines
        ]
        return lines, read_batch(here, [write(tmp_path / "answers.jsonl", rows)])

    name = f"{kind}-0-000000004."
    _, reading = round_of(name)
    assert reading.failed == ({"refused_request": 1} if kind == "long" else {})
    for number in range(2):
        lines, reading = round_of(name)
        assert len([line for line in lines if line["custom_id"].startswith(name)]) == 1
        assert (reading.failed, reading.pending) == ({"refused_request": 1}, 1)
        assert len(lines) == (1 if number else COUNT - 1)
        assert reading.report["written"] == COUNT - 2 + (kind == "short")
        assert reading.report["failed"] == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    if kind == "long":
        [skipped] = [row for row in report["skipped"] if row["reason"] == "refused_request"]
        assert "400: " in skipped["detail"]
        assert "no picture of this" in skipped["detail"]
    while reading.pending:
        _, reading = round_of("nothing")
    assert reading.report["written"] == COUNT - 1
    assert reading.report["short_from_long"] == reading.report["failed"] == 0
    with CaptionServer().running() as server:
        caption(job(images, tmp_path / "served", short="ask"), options(server))
    assert files(tmp_path / "out") == files(tmp_path / "served")


@pytest.mark.parametrize("change", ["another picture", "one more"])
def test_answers_about_pictures_that_changed_since_are_refused(tmp_path, change):
    """Nothing but its number names a picture in an answer."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ac":
        Image.new("RGB", (32, 32), (0, 0, ord(name))).save(folder / f"{name}.png")
    file = tmp_path / "requests.jsonl"
    write_batch(job(folder, tmp_path / "out", shard_size=1), file)
    answers = write(tmp_path / "answers.jsonl", map(answer, requests(file)))
    Image.new("RGB", (40, 40), (0, 255, 0)).save(folder / ("c.png" if change == "another picture" else "b.png"))
    with pytest.raises(
        ValueError,
        match=r"images changed since they were asked about|had 2 images when .*out was begun, and has 3 now; take away",
    ):
        read_batch(job(folder, tmp_path / "out", shard_size=1), [answers])
    assert not list((tmp_path / "out").glob("*1.tar"))
    result = run(folder, tmp_path / "out", "--model", "scenes", "--read-batch", answers, "--set", "shard_size=1")
    assert result.exit_code == 2
    assert "choose another output" in result.output


@pytest.mark.parametrize("limits", [BatchLimits(requests=5), BatchLimits(bytes=3000)])
def test_large_batches_are_written_in_parts(images, tmp_path, limits):
    parts, number = write_batch(job(images, tmp_path / "out"), tmp_path / "requests.jsonl", limits)
    assert number == COUNT - 1
    assert [part.name for part in parts[:2]] == ["requests-001.jsonl", "requests-002.jsonl"]
    assert sum(len(requests(part)) for part in parts) == COUNT - 1
    for part in parts:
        assert len(requests(part)) <= limits.requests
        assert part.stat().st_size <= limits.bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "is not JSON, or cut off"),
        ("[]", "has custom_id None, which this job has not asked"),
        ('{"custom_id": "request-1"}', "has custom_id 'request-1', which this job has not asked"),
        ('{"custom_id": "long-0-000000099.sober"}', "has custom_id 'long-0-000000099.sober', which"),
        ('{"custom_id": "long-0-000000001.unknown"}', "has custom_id 'long-0-000000001.unknown', which"),
    ],
)
def test_lines_of_something_else_are_skipped_and_named(images, tmp_path, line, message):
    """Among others; a file of nothing else is the wrong file."""
    here, file = job(images, tmp_path / "out"), tmp_path / "requests.jsonl"
    write_batch(here, file)
    first, second = map(answer, requests(file)[:2])
    file.write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(second)}\n")
    reading = read_batch(here, [file])
    assert reading.answers == 2
    assert reading.failed == {}
    assert len(reading.skipped) == 1
    assert f"requests.jsonl:2 {message}" in reading.skipped[0]
    result = run(images, tmp_path / "out", "--model", "scenes", "--read-batch", file, "--set", "shard_size=10")
    assert f"skipped lines: 1; {file}:2 {message}" in result.output
    file.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"requests.jsonl: no batch output of this job; .*requests.jsonl:1 "):
        read_batch(here, [file])
    with pytest.raises(ValueError, match=r"absent.jsonl: cannot be read"):
        read_batch(here, [tmp_path / "absent.jsonl"])


def run(*arguments):
    return CliRunner().invoke(app, ["caption", *map(str, arguments)])


def test_the_command(images, tmp_path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    result = run(images, out, "--model", "scenes", "--write-batch", file)
    assert result.exit_code == 0, result.output
    assert f"{COUNT - 1} requests written" in result.output
    answers = write(tmp_path / "answers.jsonl", map(answer, requests(file)[:-1]))
    result = run(images, out, "--model", "scenes", "--read-batch", answers)
    assert "11 new answers\n1 requests are still to make" in result.output
    with CaptionServer().running() as server:  # the drivers share their work
        result = run(images, out, "--model", "scenes", "--server", server.url)
        assert sum(server.seen.values()) == 1
    assert result.exit_code == 0, result.output
    assert f"{COUNT - 1} of {COUNT} images captioned" in result.output
    assert "not_an_image" in result.output
    assert "requests of" not in result.output, "none failed"
    with CaptionServer(fault=lambda number: "400" if number == 3 else None).running() as server:
        failed = run(images, tmp_path / "failed", "--model", "scenes", "--server", server.url)
    assert "the requests of 1 images failed; the same command makes them again" in failed.output
    result = run(images, out, "--model", "scenes", "--write-batch", file)
    assert "nothing is left to ask" in result.output


def test_the_command_says_which_pictures_have_no_answer_and_why(images, tmp_path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    run(images, out, "--model", "scenes", "--write-batch", file)
    first, second, *others = requests(file)
    refused = {"custom_id": first["custom_id"], "response": {"status_code": 400, "body": {"error": "no such model"}}}
    cut_off = answer(second, lambda body: completion("A red square is on the left and", finish_reason="length"))
    answers = write(tmp_path / "answers.jsonl", [*map(answer, others), refused, cut_off])
    result = run(images, out, "--model", "scenes", "--read-batch", answers)
    assert result.exit_code == 0, result.output
    assert f"""11 new answers; without a usable one: 1 refused_request
  {answers}:11 (00.png): 400: {{"error": "no such model"}}
2 requests are still to make, with another prompt where the answer was rejected: 1 cut_off; --write-batch""" in (
        result.output
    )


def test_the_command_says_what_to_do_where_every_request_was_refused(images, tmp_path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    run(images, out, "--model", "scenes", "--write-batch", file)
    refused = [{"custom_id": line["custom_id"], "response": {"status_code": 400}} for line in requests(file)]
    result = run(images, out, "--model", "scenes", "--read-batch", write(tmp_path / "answers.jsonl", refused))
    assert result.exit_code == 1
    assert f"{COUNT - 1} requests are still to make; --write-batch FILE writes them" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --server URL, --write-batch FILE and --read-batch FILE"),
        (("--server", "http://127.0.0.1:9", "--write-batch", "x"), "give one of --server URL"),
        (("--server", "http://127.0.0.1:9"), "give --model"),
        (("--server", "nonsense", "--model", "m"), "give an address like"),
        (("--server", "builtin:scene"), "the only captioner that comes with the package is builtin:scenes"),
        (
            ("--server", "http://127.0.0.1:9", "--model", "m", "--set", "filters.max_sme=2"),
            "did you mean filters.max_same",
        ),
        (("--server", "http://127.0.0.1:9", "--model", "m", "--short", "given"), "short"),
    ],
)
def test_what_the_command_refuses(images, tmp_path, arguments, message):
    result = run(images, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("error:") == 1


def test_the_scenes_captioner_warns_of_photos(images, tmp_path):
    result = run(images, tmp_path / "out", "--server", "builtin:scenes")
    assert "Warning: builtin:scenes describes any picture as a scene of its world" in result.output


def test_the_scenes_captioner_shows_the_filters_at_work(tmp_path):
    result = run("scenes:12", tmp_path / "out", "--server", "builtin:scenes", "--set", "filters.max_words=60")
    assert "Warning" not in result.output
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["answers"]["too_long"] > 3
    assert 0 < report["written"] < 12
    assert "too_long" in result.output
