"""The adapter on the text states."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixclip_diffusion import TextAdapter


@given(
    kind=st.sampled_from(["mlp", "attention"]),
    num_layers=st.integers(1, 3),
    hidden_width=st.sampled_from([0, 1, 24]),
    tokens=st.integers(1, 30),
)
def test_starts_as_the_identity_and_learns(kind, num_layers, hidden_width, tokens):
    adapter = TextAdapter(16, kind, hidden_width, num_layers, num_heads=4, max_tokens=30)
    states = torch.randn(2, tokens, 16)
    assert torch.equal(adapter(states), states)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        (adapter(states) - 1).square().mean().backward()
        optimizer.step()
    assert not torch.equal(adapter(states), states)


def test_mlp_is_token_wise_and_attention_is_not():
    states = torch.randn(1, 6, 16)
    changed = states.clone()
    changed[:, 5] += 1
    for kind, token_wise in (("mlp", True), ("attention", False)):
        adapter = TextAdapter(16, kind, num_heads=4)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        assert torch.equal(adapter(states)[:, :5], adapter(changed)[:, :5]) == token_wise


def plain_block(block, states, text, num_causal, rotary):
    """A block of the attention kind for one text (T, D), head by head and query by query."""
    query, key, value = block.in_proj(block.norm(states)).chunk(3, dim=-1)
    width, heads = states.shape[1] // block.num_heads, []
    for head in range(block.num_heads):
        q, k, v = (part[:, head * width : (head + 1) * width] for part in (query, key, value))
        if rotary:
            q, k = (torch.stack([turned(row, place) for place, row in enumerate(part)]) for part in (q, k))
        mixed = []
        for place in range(len(states)):
            last = place + 1 if head < num_causal else len(states)
            read = [other for other in range(last) if text[other]]
            weights = (k[read] @ q[place] / width**0.5).softmax(0)
            mixed.append(weights @ v[read])
        heads.append(torch.stack(mixed))
    delta = block.out_proj(torch.cat(heads, dim=1))
    return delta + block.feed_forward(states + delta)


def turned(row, place):
    """Number i of the first half and of the second are a complex number, which is turned by place / 10000^(2 i / d)."""
    first, second = row.chunk(2)
    angle = place * 10000.0 ** (-torch.arange(len(first)) * 2 / len(row))
    number = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag])


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("num_causal", [0, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_plain_formula(rotary, num_causal, masked):
    torch.manual_seed(0)
    options = {"mask_padding": masked, "rotary": rotary, "causal_heads": num_causal}
    adapter = TextAdapter(16, "attention", num_heads=4, max_tokens=12, **options)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states, text = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    text[1, 6:] = False
    found = adapter(states, text)
    found[text].square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    wanted = []
    for row, own in zip(states, text, strict=True):
        stream = row + adapter.position_embedding[:9]
        for block in adapter.blocks:
            stream = stream + plain_block(block, stream, own if masked else torch.ones_like(own), num_causal, rotary)
        wanted.append(stream - adapter.position_embedding[:9])
    wanted = torch.stack(wanted)
    torch.testing.assert_close(found[text], wanted[text], rtol=1e-4, atol=1e-5)
    wanted[text].square().mean().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_causal_heads_alone_read_nothing_behind_a_token():
    adapter = TextAdapter(16, "attention", num_heads=4, rotary=True, causal_heads=4)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(1, 6, 16)
    changed = states.clone()
    changed[:, 5] += 1
    torch.testing.assert_close(adapter(states)[:, :5], adapter(changed)[:, :5])
    assert not torch.allclose(adapter(states)[:, 5], adapter(changed)[:, 5])


@pytest.mark.parametrize(
    ("kind", "more"), [("mlp", {}), ("attention", {}), ("attention", {"rotary": True, "causal_heads": 2})]
)
def test_save_and_load(tmp_path, kind, more):
    adapter = TextAdapter(16, kind, num_heads=4, num_layers=3, hidden_width=10, max_tokens=99, **more)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapter.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    again = TextAdapter.from_pretrained(tmp_path)
    assert again.config == adapter.config
    states = torch.randn(2, 7, 16)
    assert torch.equal(again(states), adapter(states))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "conv"}, "adapter kind 'conv': valid are mlp, attention"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"kind": "attention", "num_heads": 3}, "num_heads=3 does not divide the width 16"),
        ({"rotary": True}, "rotary=True, causal_heads=0 with kind='mlp'"),
        ({"kind": "attention", "num_heads": 4, "causal_heads": 5}, "causal_heads=5: valid are 0 to num_heads=4"),
        ({"kind": "attention", "num_heads": 16, "rotary": True}, "16 heads of width 1"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextAdapter(16, **arguments)


def test_an_adapter_of_the_scope_text_reads_a_long_text_in_parts():
    torch.manual_seed(0)
    adapter = TextAdapter(16, "attention", num_heads=4, max_tokens=8, mask_padding=True, scope="text")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    states, text = torch.randn(2, 21, 16), torch.ones(2, 21, dtype=torch.bool)
    text[1, 5:] = False
    found = adapter(states, text)
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        torch.testing.assert_close(found[:, part], adapter(states[:, part], text[:, part]))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "page"}, "scope 'page': valid are window, text"),
        ({"scope": "text"}, "scope 'text' with kind='mlp'"),
        ({"scope": "text", "kind": "attention"}, "mask_padding=False"),
    ],
)
def test_scopes_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextAdapter(16, **arguments)


def test_too_many_tokens_for_the_positions():
    with pytest.raises(ValueError, match="9 text states: this adapter holds positions for 8"):
        TextAdapter(16, "attention", num_heads=4, max_tokens=8)(torch.zeros(1, 9, 16))


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder or hub name with adapter_config\.json"):
        TextAdapter.from_pretrained(tmp_path)
    TextAdapter(16).save_pretrained(tmp_path)
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="adapter"):
        TextAdapter.from_pretrained(tmp_path)
