"""The node pack, loaded as ComfyUI loads it, in a core and on CLIP objects that stand in for ComfyUI's.

`pytest tests/comfyui --comfyui PATH` takes those of a real ComfyUI.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import stand_in
from real_core import RealCore

PACK = Path(__file__).parents[2] / "comfyui"


def pytest_addoption(parser):
    parser.addoption("--comfyui", type=Path, metavar="PATH", help="a checkout of ComfyUI for tests/comfyui")


def load_pack(name="fixclip_nodes"):
    """As ComfyUI loads a folder of custom_nodes."""
    for other in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[other]
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "fixclip").mkdir()
    return folder


@pytest.fixture(scope="session")
def core(request, tmp_path_factory):
    """What CLIP objects and the modules of a core come from."""
    path = request.config.getoption("--comfyui", None)
    return RealCore(path, tmp_path_factory.mktemp("embeddings")) if path else stand_in.StandIn()


@pytest.fixture
def real_core(core):
    if not isinstance(core, RealCore):
        pytest.skip("needs --comfyui PATH")
    return core


@pytest.fixture(params=["schema V3", "older core"])
def nodes(request, core, models_folder, monkeypatch):
    """{node id: function of its inputs to the tuple of its outputs}."""
    for name, module in core.modules(models_folder, request.param == "schema V3").items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in.node_functions(load_pack())


@pytest.fixture
def packs(core, models_folder, monkeypatch):
    """The classes {node id: class} that a core of today finds, and those that an older one finds."""
    found = []
    for schema in (True, False):
        for name, module in core.modules(models_folder, schema).items():
            monkeypatch.setitem(sys.modules, name, module)
        found.append(stand_in.node_classes(load_pack()))
        monkeypatch.undo()
    return found


@pytest.fixture(scope="session")
def encode(core, models_folder):
    """The module `encode` of the pack, which needs no schema."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in core.modules(models_folder, False).items():
            patch.setitem(sys.modules, name, module)
        load_pack("fixclip_pack")
        return sys.modules["fixclip_pack.encode"]
