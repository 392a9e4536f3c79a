"""transformers' own suites for models and tokenizers, run on our classes and on the stock ones that they stand for.

The suites come with the source distribution of the installed version, which pip fetches. What a stock class fails is no
matter of ours; what ours fails beside it is listed here with the reason. The sources of diffusers come without the
suites of its pipelines and LoRAs, and those of compel without what its tests import: `test_compatibility`,
`test_habits` and `test_saved_loras` test the same behaviour.
"""

import unittest

import pytest
import torch
from tiny import clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from upstream import fetch_tests, import_suite, outcomes

from fixclip_diffusion import FixClipTextConfig, FixClipTextEncoder, FixClipTextEncoderWithProjection, FixClipTokenizer

# A text encoder loads as a whole or not at all, where transformers fills what is missing with random values.
KNOWN_OF_MODELS = {
    "test_cannot_load_with_meta_device_context_manager": "a LoadError, where transformers raises a RuntimeError",
    "test_correct_missing_keys": "weights that are not in the file are an error, not a warning",
    "test_model_weights_reload_no_missing_tied_weights": "the same",
}
LONGER = "a text that is longer than a pass is no mistake, so there is no warning of it: pipelines read it in several"
KNOWN_OF_TOKENIZERS = {
    "test_maximum_encoding_length_pair_input": LONGER,
    "test_maximum_encoding_length_single_input": LONGER,
}


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = fetch_tests("transformers", tmp_path_factory.mktemp("transformers"))
    (folder / "fixtures").mkdir(exist_ok=True)
    (folder / "fixtures" / "sample_text.txt").write_text("A red boat lies on the shore.\n\nA dog looks at it.\n")
    return folder


def model_case(suites, pytestconfig, model_class, config_class, **config):
    """A case of transformers' `ModelTesterMixin` for a text encoder."""
    missing = {"exporters.test_export": ("ExportTesterMixin",), "generation.test_utils": ("GenerationTesterMixin",)}
    common = import_suite(suites, "test_modeling_common", missing, pytestconfig)

    class Tester:
        """What the mixin asks for sizes and inputs."""

        batch_size, seq_length, is_training = 3, 7, False
        hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

        def get_config(self):
            sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
            ids = {"vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1}
            return config_class(**sizes, **ids, projection_dim=32, **config)

        def prepare_config_and_inputs_for_common(self):
            ids_BT = common.ids_tensor([self.batch_size, self.seq_length], 97)
            ids_BT[:, -1] = 98
            return self.get_config(), {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)

        def setUp(self):
            self.model_tester = Tester()

    return Case


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(FixClipTextEncoder, CLIPTextModel), (FixClipTextEncoderWithProjection, CLIPTextModelWithProjection)],
)
def test_text_encoders_pass_transformers_suite(suites, pytestconfig, ours, stock):
    num_stock, failed_stock = outcomes(
        model_case(suites, pytestconfig, stock, CLIPTextConfig, max_position_embeddings=77)
    )
    long = {"max_position_embeddings": 248, "short_position_embeddings": 77, "padding": "mask"}
    num, failed = outcomes(model_case(suites, pytestconfig, ours, FixClipTextConfig, **long))
    assert min(num, num_stock) > 80
    assert {name: line for name, line in failed.items() if name not in {**failed_stock, **KNOWN_OF_MODELS}} == {}


def tokenizer_case(suites, pytestconfig, tokenizer_class, folder):
    """A case of transformers' `TokenizerTesterMixin` for the tokenizer in a folder."""
    common = import_suite(suites, "test_tokenization_common", {}, pytestconfig)

    class Case(common.TokenizerTesterMixin, unittest.TestCase):
        from_pretrained_id = str(folder)
        test_sentencepiece = False

    Case.tokenizer_class = Case.rust_tokenizer_class = tokenizer_class
    return Case


def test_the_tokenizer_passes_transformers_suite(suites, pytestconfig, tmp_path):
    stock = clip_tokenizer()
    stock.save_pretrained(tmp_path / "stock")
    FixClipTokenizer.from_stock(stock).save_pretrained(tmp_path / "ours")
    num_stock, failed_stock = outcomes(tokenizer_case(suites, pytestconfig, CLIPTokenizer, tmp_path / "stock"))
    num, failed = outcomes(tokenizer_case(suites, pytestconfig, FixClipTokenizer, tmp_path / "ours"))
    assert min(num, num_stock) > 40
    assert {name: line for name, line in failed.items() if name not in {**failed_stock, **KNOWN_OF_TOKENIZERS}} == {}
