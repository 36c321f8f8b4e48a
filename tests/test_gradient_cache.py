"""`training/gradient_cache.py`: exact gradients with the memory of one chunk."""

import weakref
from itertools import product

import pytest
import torch
from error_bounds import rounding
from tiny import BACKBONES, make_inputs, make_model

from pvlf_hf.training.gradient_cache import embed_in_chunks

FINETUNING = ("frozen", "text", "both")


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


def chunks_of(inputs, chunk_size):
    rows = len(inputs["input_ids"])
    return [{k: v[i : i + chunk_size] for k, v in inputs.items()} for i in range(0, rows, chunk_size)]


def kept_until_backward(model, inputs, chunk_size):
    """Embed the same chunks once each and keep all activations (the plain version)."""
    outputs = [model(**chunk, return_loss=False) for chunk in chunks_of(inputs, chunk_size)]
    return {name: torch.cat([output[name] for output in outputs]) for name in ("query_embeds", "target_embeds")}


def inputs_of(model):
    return make_inputs(model.config.vl_config.model_type, batch=5)


def gradients(model, embed, inputs=None):
    """Return loss and gradients of a batch of five; dropout draws the same mask in every call."""
    torch.manual_seed(0)
    model.zero_grad()
    output = embed(model, inputs or inputs_of(model))
    loss = model.loss(output["query_embeds"], output["target_embeds"])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def gradient_error(model, dtype=torch.float32):
    """Return how far apart two computations of the same `gradients` may be, by name."""
    return rounding(lambda model, inputs: gradients(model, in_one_piece, inputs), model, inputs_of(model), dtype)


def cached(chunk_size):
    return lambda model, inputs: embed_in_chunks(model, inputs, chunk_size)


def in_one_piece(model, inputs):
    return model(**inputs, return_loss=False)


@pytest.mark.slow
@pytest.mark.parametrize("finetuning", FINETUNING)
def test_gradient_caching_equals_the_whole_batch(backbone, finetuning):
    """Compare gradients by chunks of several sizes with those of the whole, also under activation checkpointing."""
    model = make_model(backbone, temperature=1.0, dropout=0.0)
    model.set_finetuning(finetuning)
    model.train()
    if backbone == "blip":
        for module in model.backbone.modules():  # BERT's own dropout draws in another order
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    whole, error = gradients(model, in_one_piece), gradient_error(model)
    for checkpointing, chunk_size in product((False, True), (1, 2, 5, 9)):
        if checkpointing:
            model.activation_checkpointing_enable()
        chunked = gradients(model, cached(chunk_size))
        assert chunked.keys() == whole.keys()
        for name, wanted in whole.items():
            torch.testing.assert_close(chunked[name], wanted, rtol=0, atol=error[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_caching_repeats_dropout(backbone, autocast):
    model = make_model(backbone, temperature=1.0, dropout=0.5).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chunked = gradients(model, cached(2))
        other = gradients(model, in_one_piece)
        kept = gradients(model, lambda model, inputs: kept_until_backward(model, inputs, 2))
    # Autocast rounds the gradients of its weight copies once for all chunks, or once for each.
    error = gradient_error(model, torch.bfloat16 if autocast else torch.float32)
    for name, wanted in kept.items():
        torch.testing.assert_close(chunked[name], wanted, rtol=0, atol=error[name], msg=name)
    assert not torch.allclose(other["fusion.prompts"], kept["fusion.prompts"], rtol=0.3)  # dropout makes a difference


def test_random_numbers_after_backward_do_not_depend_on_it(tiny_model):
    tiny_model.train()
    torch.manual_seed(0)
    output = embed_in_chunks(tiny_model, make_inputs("blip", batch=5), 2)
    expected = torch.get_rng_state()
    tiny_model.loss(output.query_embeds, output.target_embeds).backward()
    assert torch.equal(torch.get_rng_state(), expected)


def test_gradient_caching_keeps_one_chunk_at_a_time(tiny_model):
    tiny_model.train()
    made, alive = [], []

    def watch(module, inputs, output):
        made.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in made))

    tiny_model.fusion.layers[0].linear1.register_forward_hook(watch)
    gradients(tiny_model, cached(1))
    assert len(alive) == 10 and max(alive) == 1  # five rows, each encoded twice
    made.clear()
    gradients(tiny_model, lambda model, inputs: kept_until_backward(model, inputs, 1))
    assert max(alive) == 5  # the whole batch does exceed a chunk


def test_gradients_are_synchronised_once(tiny_model):
    """Check that gradients are synchronised once, with the last chunk."""
    entered = []

    class NoSync:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            pass

    tiny_model.train()
    output = embed_in_chunks(tiny_model, make_inputs("blip", batch=5), 2, NoSync)
    tiny_model.loss(output.query_embeds, output.target_embeds).backward()
    assert len(entered) == 2 * 2  # forward and backward of two chunks of three


def test_query_without_target_raises(tiny_model):
    inputs = make_inputs("blip")
    inputs["target_pixel_values"] = inputs["target_pixel_values"][:2]
    with pytest.raises(ValueError, match=r"a target for each query, but got \[2, 3\] rows"):
        embed_in_chunks(tiny_model, inputs, 2)
