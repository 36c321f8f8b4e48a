"""Captions encoded in groups of similar length: the same embeddings and gradients, with less padding."""

import pytest
import torch
from error_bounds import assert_within, rounding
from tiny import make_inputs, make_model

from pvlf_hf.training import text_groups
from pvlf_hf.training.text_groups import encode_captions

BATCH = 11
TEXT_PROMPTS = {"prompt_location": "text", "num_prompts": 2, "prompt_depth": 1}


@pytest.fixture(autouse=True)
def two_groups(monkeypatch):
    """Let a batch of eleven captions be two groups."""
    monkeypatch.setattr(text_groups, "GROUP_SIZE", 4)


def query_and_gradients(encode):
    """Return a function that composes queries of encoded captions, and takes the gradients of the text encoder."""

    def compute(model, inputs):
        text = encode(model, inputs["input_ids"], inputs["attention_mask"])
        query = model.compose(inputs["image_tokens"], *text, inputs["attention_mask"]).pooler_output
        model.zero_grad()
        (query * inputs["direction"]).sum().backward()
        weights = [p.grad for module in model.text_side.values() for p in module.parameters() if p.grad is not None]
        return {"query": query.detach(), "gradients": torch.cat([grad.flatten() for grad in weights])}

    return compute


def inputs_of(model, backbone):
    inputs = make_inputs(backbone, batch=BATCH)
    with torch.no_grad():
        inputs["image_tokens"] = model.get_image_features(inputs.pop("pixel_values")).last_hidden_state
    inputs["direction"] = torch.randn(inputs["image_tokens"][:, 0].shape, generator=torch.Generator().manual_seed(2))
    return inputs


@pytest.mark.parametrize(("backbone", "settings"), [("blip", {}), ("clip", {}), ("blip", TEXT_PROMPTS)])
def test_groups_give_the_queries_and_gradients_of_one_batch(backbone, settings):
    model = make_model(backbone, **settings)
    inputs = inputs_of(model, backbone)
    grouped = query_and_gradients(encode_captions)(model, inputs)
    together = query_and_gradients(lambda model, *texts: model.encode_text_tokens(*texts))
    assert_within(grouped, together(model, inputs), lambda: rounding(together, model, inputs))


def encoded_shapes(model, backbone, **changes):
    """Return the shapes of the token ids that the text encoder is given for one batch."""
    inputs = make_inputs(backbone, batch=BATCH) | changes
    shapes = []
    encode = model.encode_text_tokens
    model.encode_text_tokens = lambda ids, mask: shapes.append(tuple(ids.shape)) or encode(ids, mask)
    encode_captions(model, inputs["input_ids"], inputs["attention_mask"])
    return shapes


def test_each_group_is_padded_to_its_own_longest_caption():
    # Three captions have 4 tokens, four have 6, four have 8.
    assert encoded_shapes(make_model(), "blip") == [(6, 6), (5, 8)]


def test_a_model_that_attends_to_padding_encodes_one_batch():
    assert encoded_shapes(make_model(text_padding="transagg"), "blip") == [(BATCH, 8)]


def test_captions_without_a_mask_are_one_batch():
    assert encoded_shapes(make_model(), "blip", attention_mask=None) == [(BATCH, 8)]
