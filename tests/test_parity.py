"""TransAgg preset against the reference implementation: features, query, logits, loss, gradients, training."""

import json

import pytest
import torch
from reference import FIXTURES, TOLERANCES, reference_inputs, reference_io, reference_model

from pvlf_hf import PVLFModel
from pvlf_hf.checkpoints.weight_names import to_pvlf

BACKBONES = ["blip", "clip"]


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


def close(ours, theirs, quantity):
    torch.testing.assert_close(ours, theirs, atol=TOLERANCES[quantity], rtol=0)


@torch.no_grad()
def test_backbone_features_equal_the_reference(backbone):
    model, io, inputs = reference_model(backbone), reference_io(backbone), reference_inputs(backbone)
    image = model.get_image_features(inputs["pixel_values"])
    close(image.last_hidden_state, io["image_tokens_ref"], "image_tokens")
    close(image.pooler_output, torch.nn.functional.normalize(io["image_cls_ref"], dim=-1), "image_tokens")
    target = model.get_image_features(inputs["target_pixel_values"]).last_hidden_state[:, 0]
    close(target, io["image_cls_tgt"], "image_tokens")
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    close(text.last_hidden_state, io["text_tokens"], "text_tokens")
    close(text.pooler_output, torch.nn.functional.normalize(io["text_pooled"], dim=-1), "text_tokens")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("text_padding", "path"), [("transagg", "slow"), ("masked", "bool")])
@torch.no_grad()
def test_query_logits_and_loss_equal_the_reference(backbone, text_padding, path, attention):
    model, io = reference_model(backbone, text_padding), reference_io(backbone)
    model.set_attn_implementation({"": attention})
    output = model(**reference_inputs(backbone))
    close(output.query_embeds, io[f"query_{path}"], "query")
    close(output.aggregation_weights, io[f"mix_weights_{path}"][:, [2, 1, 0]], "mix_weights")
    close(output.similarity, io[f"logits_{path}"] / 100, "similarity")
    close(output.loss, io[f"loss_{path}"][0], "loss")


@torch.no_grad()
def test_fusion_output_equals_the_reference(backbone):
    model, io, inputs = reference_model(backbone), reference_io(backbone), reference_inputs(backbone)
    inputs.pop("target_pixel_values")
    states = model.get_query_features(**inputs, output_hidden_states=True).hidden_states
    close(states[-1], io["fusion_out_slow"], "fusion")


@pytest.mark.parametrize(("text_padding", "prefix"), [("transagg", "grad."), ("masked", "grad_bool.")])
def test_gradients_equal_the_reference(backbone, text_padding, prefix):
    model = reference_model(backbone, text_padding)
    model(**reference_inputs(backbone)).loss.backward()
    theirs = {k.removeprefix(prefix): v for k, v in reference_io(backbone).items() if k.startswith(prefix)}
    ours = dict(model.named_parameters())
    assert len(theirs) >= 4
    for name, gradient in to_pvlf(theirs, backbone).items():
        relative = (ours[name].grad - gradient).norm() / gradient.norm()
        assert relative < TOLERANCES["gradient"], (name, float(relative))


@pytest.mark.parametrize("encoder", ["neither", "text", "both"])
def test_six_training_steps_equal_the_reference(backbone, encoder, tmp_path):
    """Compare optimiser groups, schedule and clipping with the reference's trace (without dropout in both)."""
    from pvlf_hf import PVLFTrainer, PVLFTrainingArguments

    trace = json.loads((FIXTURES / f"transagg_{backbone}_train.json").read_text())
    steps = trace["modes"][encoder]["steps"]
    model = reference_model(backbone)
    args = PVLFTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, finetuning={"neither": "frozen"}.get(encoder, encoder)
    )
    trainer = PVLFTrainer(model, args, processing_class=object(), data_collator=lambda rows: rows)
    trainer.create_optimizer_and_scheduler(num_training_steps=300)
    inputs = reference_inputs(backbone)
    for number, step in enumerate(steps):
        loss = model(**inputs).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        assert loss.item() == pytest.approx(step["loss"], abs=TOLERANCES["training_loss"])
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=TOLERANCES["training_norm"])
        trainer.optimizer.step()
        # the reference's schedule is stepped to "epoch + index / iterations", so the first rate is used twice
        if number:
            trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()


def test_reference_checkpoint_survives_saving(backbone, tmp_path):
    model = reference_model(backbone, "masked")
    model.save_pretrained(tmp_path)
    again = PVLFModel.from_pretrained(tmp_path)
    with torch.no_grad():
        close(again(**reference_inputs(backbone)).query_embeds, reference_io(backbone)["query_bool"], "query")
