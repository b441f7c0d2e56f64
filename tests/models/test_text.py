"""The text tower against CLIP's transformer in plain torch: SD 2.1's penultimate layer and SD 1.5's quick GELU."""

from dataclasses import replace

import pytest
import torch
from reference import text as reference
from reference import upstream

from mvdream_fast.checkpoints.layouts import OPEN_CLIP, released
from mvdream_fast.models.config import SD15, SD21, TextConfig
from mvdream_fast.models.text import TextEncoder

ROWS = 300
SIZE = replace(upstream.NARROW21, context=128, vocabulary=ROWS)
CONFIG = TextConfig(width=128, n_layers=3, n_heads=2, mlp_width=128, skip_last=1, vocabulary_size=ROWS)


@pytest.fixture(scope="module")
def state() -> dict:
    return upstream.random(upstream.open_clip(SIZE))


def tower(state: dict, config: TextConfig) -> TextEncoder:
    encoder = TextEncoder(config)
    slots = released("text", replace(SD21, text=config), ()).slots
    tensors = {}
    for name, slot in slots.items():
        x = state[slot.name.removeprefix(OPEN_CLIP)]
        tensors[name] = x if slot.piece is None else x.chunk(3)[slot.piece]
    encoder.model.load_state_dict(tensors)
    return encoder.requires_grad_(False).eval()


def ids(batch: int, length: int = 77) -> torch.Tensor:
    return torch.randint(0, ROWS, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("skip_last", "activation", "n_layers"), [(1, "gelu", 2), (0, "gelu", 3), (0, "quick_gelu", 3)]
)
@pytest.mark.parametrize("length", [77, 24])
def test_states_equal_open_clip(state, skip_last, activation, n_layers, length):
    encoder = tower(state, replace(CONFIG, skip_last=skip_last, activation=activation))
    tokens = ids(2, length)
    expected = reference.encode(state, tokens, 2, n_layers, quick_gelu=activation == "quick_gelu")
    assert expected.std() > 0.5
    torch.testing.assert_close(encoder(tokens), expected, rtol=1e-4, atol=2e-5)


def test_exact_and_quick_gelu_differ_by_more_than_the_tolerance(state):
    results = [tower(state, replace(CONFIG, activation=kind))(ids(1)) for kind in ("gelu", "quick_gelu")]
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_known_configurations():
    assert (SD21.text.activation, SD21.text.n_layers - SD21.text.skip_last) == ("gelu", 23)
    assert (SD15.text.activation, SD15.text.n_layers - SD15.text.skip_last) == ("quick_gelu", 12)


def test_causal_and_batch_independent(state):
    encoder, tokens = tower(state, CONFIG), ids(3)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % ROWS
    torch.testing.assert_close(encoder(tokens)[:, :40], encoder(changed)[:, :40], rtol=0, atol=1e-5)
    assert not torch.allclose(encoder(tokens)[:, 40:], encoder(changed)[:, 40:], atol=1e-2)
    torch.testing.assert_close(encoder(tokens)[1:2], encoder(tokens[1:2]), rtol=0, atol=1e-5)


def test_gradient_of_an_embedding_equals_open_clip(state):
    cotangent = torch.randn(1, 77, 128, generator=torch.Generator().manual_seed(4))
    encoder = tower(state, CONFIG).requires_grad_(True)
    (encoder(ids(1)) * cotangent).sum().backward()
    leaf = state | {"token_embedding.weight": state["token_embedding.weight"].clone().requires_grad_()}
    (reference.encode(leaf, ids(1), 2, 2) * cotangent).sum().backward()
    expected = leaf["token_embedding.weight"].grad
    torch.testing.assert_close(encoder.model.embeddings.token_embedding.weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_added_row_is_the_mean_and_changes_nothing_else(state):
    encoder = tower(state, CONFIG)
    grown = encoder.with_token(torch.tensor([5, 9]))
    weight = grown.model.embeddings.token_embedding.weight
    assert grown.config.vocabulary_size == ROWS + 1
    torch.testing.assert_close(weight[ROWS], state["token_embedding.weight"][[5, 9]].mean(0))
    assert torch.equal(grown(ids(1)), encoder(ids(1)))
    assert encoder.model.embeddings.token_embedding.weight.shape[0] == ROWS
    with torch.no_grad():
        weight[0] += 1
    assert torch.equal(encoder.model.embeddings.token_embedding.weight[0], state["token_embedding.weight"][0])


def test_moves_between_devices_and_dtypes_after_meta_construction(state):
    with torch.device("meta"):
        encoder = TextEncoder(CONFIG)
    encoder.model.load_state_dict(tower(state, CONFIG).model.state_dict(), assign=True)
    half = encoder.to(torch.bfloat16)
    assert half(ids(1)).dtype == torch.bfloat16
    assert not any(buffer.is_meta for buffer in half.buffers())


@pytest.mark.parametrize("shape", [(77,), (1, 78), (1, 0), (1, 1, 77)])
def test_wrong_shapes(state, shape):
    with pytest.raises(ValueError, match=r"TextEncoder: ids must be \[B, L\] with L from 1 to 77, got"):
        tower(state, CONFIG)(torch.zeros(shape, dtype=torch.int64))


def test_the_first_layers_of_a_tower(state):
    """A tower of two layers is the one that a skipped last layer leaves; its weights are the other's."""
    whole, lower = tower(state, replace(CONFIG, skip_last=0)), tower(state, CONFIG)
    cut = whole.with_layers(2)
    assert cut.config == replace(CONFIG, skip_last=0, n_layers=2)
    assert torch.equal(cut(ids(2)), lower(ids(2)))
    name = "encoder.layers.0.mlp.fc1.weight"
    assert cut.model.state_dict()[name].data_ptr() == whole.model.state_dict()[name].data_ptr()
