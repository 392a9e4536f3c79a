"""FixClipTextEncoder against the stock CLIP text models, layer by layer."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.model.positional import stretch_positions
from fixclip_diffusion import FixClipTextConfig, FixClipTextEncoder, TextAdapter
from fixclip_diffusion.text_encoder import text_lengths
from fixclip_diffusion.tiny import clip_text_config

KINDS = {
    "sd1": {"hidden_act": "quick_gelu", "eos_token_id": 2, "vocab_size": 1000},
    "sd2": {"hidden_act": "gelu", "eos_token_id": 999, "vocab_size": 1000},
}


@pytest.fixture(params=list(KINDS))
def stock(request):
    return CLIPTextModelWithProjection(clip_text_config(**KINDS[request.param])).eval()


def random_ids(length, batch=2, eos=999):
    ids = torch.randint(0, 998, (batch, length))
    ids[:, length // 2 :] = eos
    return ids


def trained_adapter(width=32, **kwargs):
    adapter = TextAdapter(width, **kwargs)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return adapter


@pytest.mark.parametrize("length", [1, 5, 20, 21, 76, 77])
def test_short_sequences_are_bit_identical_in_every_layer(stock, length):
    encoder = FixClipTextEncoder.from_clip(stock)
    ids = random_ids(length)
    expected = stock.text_model(ids, output_hidden_states=True)
    actual = encoder(ids, output_hidden_states=True)
    assert list(actual) == list(expected)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("length", [78, 150, 248])
def test_long_sequences_equal_a_stock_model_with_the_stretched_table(stock, length):
    encoder = FixClipTextEncoder.from_clip(stock)
    config = copy.deepcopy(stock.config)
    config.max_position_embeddings = 248
    reference = CLIPTextModel(config).eval()
    state = dict(stock.text_model.state_dict())
    name = "embeddings.position_embedding.weight"
    state[name] = stretch_positions(state[name])
    reference.load_state_dict(state)
    encoder.config.padding = "keep"
    ids = random_ids(length)
    expected, actual = reference(ids, output_hidden_states=True), encoder(ids, output_hidden_states=True)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(actual[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mlp", "attention", None])
def test_masked_padding(stock, kind):
    """0 behind a text; one that fits into 77 tokens has the states of a pass of 77, whatever stands beside it."""
    encoder = FixClipTextEncoder.from_clip(stock)
    if kind is not None:
        encoder.set_adapter_module(trained_adapter(kind=kind, num_heads=4, mask_padding=True))
    end = encoder.config.eos_token_id
    ids = torch.full((3, 248), end)
    for row, length in enumerate((20, 77, 150)):
        ids[row, : length - 1] = torch.arange(1, length) % (end - 1)
    states = encoder(ids).last_hidden_state
    torch.testing.assert_close(states[:2, :77], encoder(ids[:2, :77]).last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[2:, :150], encoder(ids[2:, :150]).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not states[:2, 77:].any()
    assert not states[2:, 150:].any()
    assert states[:2, :77].any(-1).all()
    encoder.config.padding = "keep"
    assert encoder(ids).last_hidden_state.any(-1).all()


def test_more_than_248_tokens_is_an_error(stock):
    with pytest.raises(ValueError, match="249"):
        FixClipTextEncoder.from_clip(stock)(random_ids(249))


def test_pooling_is_not_hijacked_by_added_tokens():
    stock = CLIPTextModel(clip_text_config(**KINDS["sd1"])).eval()
    encoder = FixClipTextEncoder.from_clip(stock)
    encoder.resize_token_embeddings(1005)
    ids = torch.tensor([[998, 5, 1004, 7, 999, 999]])
    out = encoder(ids)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 4])


def test_keep_and_ratio_are_configurable():
    stock = CLIPTextModel(clip_text_config(**KINDS["sd1"]))
    encoder = FixClipTextEncoder.from_clip(stock, keep=30, ratio=3)
    assert encoder.context_length == 30 + 47 * 3
    assert encoder.short_context_length == 77


def test_penultimate_layer_of_a_whole_vit_h(tmp_path):
    """Stable Diffusion 2 was trained on the states of layer 23 of 24, behind the final LayerNorm."""
    whole = CLIPTextModel(clip_text_config(**KINDS["sd2"], num_hidden_layers=4)).eval()
    whole.save_pretrained(tmp_path)
    encoder = FixClipTextEncoder.from_pretrained(tmp_path, num_hidden_layers=3).eval()
    ids = random_ids(77)
    states = whole(ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder(ids)[0], whole.final_layer_norm(states))


@pytest.mark.parametrize("adapter", [None, {"kind": "mlp"}, {"kind": "attention", "num_heads": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load_gives_equal_weights_and_states(stock, tmp_path, adapter, dtype):
    encoder = FixClipTextEncoder.from_clip(stock)
    if adapter is not None:
        encoder.set_adapter_module(trained_adapter(**adapter))
    encoder = encoder.to(dtype)
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = FixClipTextEncoder.from_pretrained(tmp_path, dtype=dtype).eval()
    assert again.dtype == dtype
    state, state_again = encoder.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    for length in (77, 248):
        ids = random_ids(length)
        assert torch.equal(again(ids)[0], encoder(ids)[0])
        assert torch.isfinite(again(ids)[0]).all()


@pytest.mark.parametrize("positions", [77, 248])
@pytest.mark.parametrize("source", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
def test_made_from_every_kind_of_folder(tmp_path, positions, source):
    config = clip_text_config(**KINDS["sd2"], max_position_embeddings=positions)
    if source == "CLIPModel":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision |= {"image_size": 32, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=config.to_dict(), vision_config=vision, projection_dim=32))
        text_model = model.text_model
    else:
        model = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[source](
            config
        )
        text_model = getattr(model, "text_model", model)
    model.eval().save_pretrained(tmp_path)
    encoder = FixClipTextEncoder.from_pretrained(tmp_path).eval()
    assert encoder.context_length == 248
    assert encoder.short_context_length == (77 if positions == 77 else 0)
    for length in (77, positions):
        ids = random_ids(length)
        expected = text_model(ids, output_hidden_states=True)
        actual = encoder(ids, output_hidden_states=True)
        for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(actual[0], expected[0])


def test_saved_folder_is_read_by_the_stock_class(stock, tmp_path):
    encoder = FixClipTextEncoder.from_clip(stock)
    encoder.config.padding = "keep"  # the stock class does no other
    encoder.save_pretrained(tmp_path)
    plain = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = random_ids(248)
    assert torch.equal(plain(ids)[0], encoder(ids)[0])


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_adapter_acts_on_last_state_and_clip_skip_alike(stock, kind):
    plain = FixClipTextEncoder.from_clip(stock)
    adapted = FixClipTextEncoder.from_clip(stock)
    plain.config.padding = adapted.config.padding = "keep"
    adapted.set_adapter_module(TextAdapter(32, kind=kind, num_heads=4))
    ids = random_ids(248)
    before, at_start = plain(ids, output_hidden_states=True), adapted(ids, output_hidden_states=True)
    assert torch.equal(at_start[0], before[0]), "identity until it is trained"
    adapted.set_adapter_module(trained_adapter(kind=kind, num_heads=4))
    out = adapted(ids, output_hidden_states=True)
    assert not torch.allclose(out[0], before[0])
    assert torch.equal(out[0], adapted.adapter(before[0]))
    # What diffusers does for clip_skip=1.
    skipped = adapted.text_model.final_layer_norm(out.hidden_states[-2])
    assert torch.equal(skipped, adapted.adapter(plain.text_model.final_layer_norm(before.hidden_states[-2])))


def test_adapter_can_be_taken_away_and_copied(stock):
    encoder = FixClipTextEncoder.from_clip(stock)
    ids = random_ids(100)
    before = encoder(ids)[0]
    encoder.set_adapter_module(trained_adapter())
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(ids)[0], encoder(ids)[0])
    encoder.set_adapter_module(None)
    assert torch.equal(encoder(ids)[0], before)
    assert not torch.equal(twin(ids)[0], before), "the copy's hook belongs to the copy"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"width": 16}, "adapter of width 16 on a text encoder of width 32"),
        ({"width": 32, "kind": "attention", "max_tokens": 77}, "adapter for 77 tokens on a text encoder of 248"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(stock, adapter, message):
    with pytest.raises(ValueError, match=message):
        FixClipTextEncoder.from_clip(stock).set_adapter_module(TextAdapter(**adapter))


def test_gradients_reach_stretched_positions_and_adapter(stock):
    encoder = FixClipTextEncoder.from_clip(stock)
    encoder.set_adapter_module(trained_adapter())
    encoder.config.padding = "keep"
    encoder(random_ids(248))[0].square().mean().backward()
    positions = encoder.text_model.embeddings.position_embedding.weight.grad
    assert (positions.abs().sum(1) > 0).all()
    assert all(p.grad is not None for p in encoder.adapter.parameters())


def test_damaged_and_foreign_folders_are_named(stock, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*neither a folder nor a hub name"):
        FixClipTextEncoder.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model_type is 'bert'; valid are fixclip_text_model, clip_text_model"):
        FixClipTextEncoder.from_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"clip": {}, "preprocess": {}}))
    with pytest.raises(ValueError, match=r"a FixClip of two towers; fixclip export \S+bert FOLDER --format diffusers"):
        FixClipTextEncoder.from_pretrained(tmp_path / "bert")
    stock.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut"):
        FixClipTextEncoder.from_pretrained(tmp_path / "cut")


def test_missing_weights_are_an_error_and_not_random(stock, tmp_path):
    FixClipTextEncoder.from_clip(stock).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["text_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing.*layers\.1\.mlp\.fc1\.weight"):
        FixClipTextEncoder.from_pretrained(tmp_path)


def test_more_layers_than_there_are(stock):
    with pytest.raises(ValueError, match="num_hidden_layers=9: the text encoder has 3"):
        FixClipTextEncoder.from_clip(stock, num_hidden_layers=9)


def test_config_round_trip(tmp_path):
    config = FixClipTextConfig(hidden_size=32, short_position_embeddings=77, adapter={"width": 32})
    config.save_pretrained(tmp_path)
    again = FixClipTextConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


@given(
    text=st.lists(st.sampled_from([1, 5, 9]), max_size=6),
    pad=st.sampled_from([0, 9]),
    filled=st.integers(0, 4),
)
def test_a_text_ends_at_the_end_token_behind_it(text, pad, filled):
    """9 is end-of-text, which may stand in a text, too; what a text ends in cannot be told from padding."""
    while text and text[-1] == 9:
        text = text[:-1]
    row = [7, *text, 9, *[pad] * filled]
    assert text_lengths(torch.tensor([row]), 9).tolist() == [len(text) + 2]
    assert text_lengths(torch.tensor([[7, 1, 5]]), 9).tolist() == [3]
