"""The node pack, loaded as ComfyUI loads it, in a core and on CLIP objects that stand in for ComfyUI's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import stand_in

PACK = Path(__file__).parents[2] / "comfyui"


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


@pytest.fixture(params=["schema V3", "older core"])
def nodes(request, models_folder, monkeypatch):
    """{node id: function of its inputs to the tuple of its outputs}."""
    for name, module in stand_in.core_modules(models_folder, request.param == "schema V3").items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in.node_functions(load_pack())


@pytest.fixture(scope="session")
def encode(models_folder):
    """The module `encode` of the pack, which needs no core."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_in.core_modules(models_folder, False).items():
            patch.setitem(sys.modules, name, module)
        load_pack("fixclip_pack")
        return sys.modules["fixclip_pack.encode"]
