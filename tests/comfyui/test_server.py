"""The example for Stable Diffusion 1.5 in the server of a real ComfyUI, on a checkpoint of random weights.

pytest tests/comfyui --comfyui PATH
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfyui"
WIDGETS = {
    "CheckpointLoaderSimple": ["ckpt_name"],
    "EmptyLatentImage": ["width", "height", "batch_size"],
    "KSampler": ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "SaveImage": ["filename_prefix"],
    "FixClipEncodeLongPrompt": ["text", "conditioning"],
    "FixClipTokenReport": ["text", "conditioning"],
}
# A UNet of one level with the widths by which ComfyUI recognises 1.5, its CLIP, and a tiny autoencoder.
WRITE_CHECKPOINT = """
import sys
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from comfy.sd1_clip import SD1ClipModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
unet = UNetModel(
    image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[1], channel_mult=(1,),
    transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=768, num_heads=8,
    use_spatial_transformer=True, legacy=False, dtype=torch.float32, operations=disable_weight_init,
)
clip = SD1ClipModel(dtype=torch.float32, model_options={"custom_operations": disable_weight_init})
parts = {
    "model.diffusion_model.": unet,
    "cond_stage_model.transformer.text_model.": clip.clip_l.transformer.text_model,
    "first_stage_model.": TAESD(latent_channels=4),
}
def some(name, value):
    random = 0.02 * torch.randn(value.shape)
    return random.half() if value.ndim > 1 else torch.full_like(value, name.endswith("weight"))
weights = {
    prefix + name: some(name, value)
    for prefix, part in parts.items()
    for name, value in part.state_dict().items()
}
save_file(weights, sys.argv[2])
"""


def ask(url, data=None):
    content = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def wait_for(condition):
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail("it did not happen within five minutes")


def prompt_of(workflow):
    """A saved workflow as the server takes it: {node: class and inputs}."""
    source = {number: [str(node), place] for number, node, place, *_ in workflow["links"]}
    found = {}
    for node in workflow["nodes"]:
        inputs = dict(zip(WIDGETS.get(node["type"], []), node.get("widgets_values", []), strict=True))
        inputs |= {slot["name"]: source[slot["link"]] for slot in node.get("inputs", []) if slot.get("link")}
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


@pytest.fixture
def server(real_core, request, tmp_path):
    """(address, folder) of a ComfyUI with the pack and a checkpoint."""
    path = request.config.getoption("--comfyui").resolve()
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "user"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "custom_nodes" / "fixclip").symlink_to(PACK)
    checkpoint = tmp_path / "models" / "checkpoints" / "v1-5-pruned-emaonly.safetensors"
    subprocess.run([sys.executable, "-c", WRITE_CHECKPOINT, str(path), str(checkpoint)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(path / "main.py"), "--cpu", "--port", str(port), "--base-directory", str(tmp_path)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def answers():
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        try:
            return ask(f"http://127.0.0.1:{port}/object_info/FixClipEncodeLongPrompt")
        except OSError:
            return None

    try:
        wait_for(answers)
        yield f"http://127.0.0.1:{port}", tmp_path
    finally:
        process.kill()
        process.wait()
        log.close()


def test_the_example_draws_and_reports(server):
    url, folder = server
    prompt = prompt_of(json.loads((PACK / "example_workflows" / "long_prompt_sd15.json").read_text(encoding="utf-8")))
    for node in prompt.values():  # small and short
        changes = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}}
        node["inputs"] |= changes.get(node["class_type"], {})
    number = ask(f"{url}/prompt", {"prompt": prompt})["prompt_id"]
    done = wait_for(lambda: ask(f"{url}/history/{number}").get(number))
    assert done["status"]["status_str"] == "success", done["status"]
    drawn, reported = (done["outputs"][node]["images"][0]["filename"] for node in ("7", "9"))
    assert Image.open(folder / "output" / drawn).size == (64, 64)
    assert Image.open(folder / "temp" / reported).width == 960
