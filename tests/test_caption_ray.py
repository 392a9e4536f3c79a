"""Ray on one machine: the other drivers' bytes, killed and resumed too; and `data pack` on the same engine."""

import json
import os
import subprocess
import sys

import pytest
from caption_server import CaptionServer, describe
from PIL import Image
from test_caption_server import COUNT, ROOT, files, job, options, wait_for

ray = pytest.importorskip("ray")

from fixclip_core.data.config import DataConfig  # noqa: E402
from fixclip_core.data.pack import PackOptions, pack  # noqa: E402
from fixclip_core.synthesis.drivers.ray import answer_row, caption_by_engine, caption_by_servers, vllm_row  # noqa: E402
from fixclip_core.synthesis.drivers.server import ServerError, caption  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a busy machine
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)  # workers import the engine below
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        Image.new("RGB", (24 + number, 24), (number * 9, 0, 0)).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"<html>404</html>")
    return folder


@pytest.fixture(scope="module")
def captioned(images, tmp_path_factory):
    """What the local driver writes."""
    out = tmp_path_factory.mktemp("captioned") / "out"
    with CaptionServer().running() as server:
        caption(job(images, out), options(server))
    return out


SCRIPT = ROOT / "pipelines" / "captions" / "ray_caption.py"


def test_tasks_that_ask_a_server_killed_and_resumed(images, captioned, tmp_path):
    out = tmp_path / "out"
    with CaptionServer(pause=0.3).running() as server:
        command = [SCRIPT, images, out, "--server", server.url, "--model", "scenes", "--set", "shard_size=10"]
        cluster = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=cluster, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: sum(server.answered.values()) >= 3 or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
        server.pause = 0
        made = caption_by_servers(job(images, out), options(server))
    assert made["written"] == COUNT - 1
    assert files(out) == files(captioned)


def test_an_error_is_one_line(images, tmp_path):
    with CaptionServer(fault=lambda number: "404").running() as server:
        with pytest.raises(ValueError, match=r"shard-00000\d.tar: .*no model 'scenes' there") as caught:
            caption_by_servers(job(images, tmp_path / "out"), options(server))
        assert "\n" not in str(caught.value)
    with pytest.raises(ServerError, match="no server answers"):
        caption_by_servers(job(images, tmp_path / "out"), options(server))


def test_rows_through_an_engine(images, captioned, tmp_path):
    """The engine here answers as the server does, in the columns of ray.data.llm's; vLLM itself needs a GPU."""

    def answer(row):
        completion = describe({"messages": vllm_row(row)["messages"]})
        text = completion["choices"][0]["message"]["content"]
        return answer_row({**row, "generated_text": text, "num_generated_tokens": len(text.split())})

    def engine(questions):
        return questions.map(answer)

    made = caption_by_engine(job(images, tmp_path / "out"), engine)
    assert made["written"] == COUNT - 1
    assert files(tmp_path / "out") == files(captioned)
    again = caption_by_engine(job(images, tmp_path / "out"), engine)
    assert again == made


def test_packing_gives_the_same_bytes(captioned, tmp_path):
    config = DataConfig(source=str(captioned))
    pack(config, tmp_path / "local", PackOptions(shard_size=9))
    report = pack(config, tmp_path / "ray", PackOptions(shard_size=9), ray=True)
    assert report.written == COUNT - 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_a_question_as_vllm_reads_it():
    body = {"model": "m", "messages": [{"role": "user", "content": []}], "max_tokens": 9, "temperature": 0.5, "seed": 3}
    row = vllm_row({"task": "long-0-000000001.sober", "body": json.dumps(body)})
    assert row["messages"] == body["messages"]
    assert row["sampling_params"] == {"max_tokens": 9, "temperature": 0.5, "seed": 3}
