"""Backbones: each family's embeddings equal the library's, and PVLF can be built on any of them."""

import copy
import inspect
import shutil
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, Image
from dual_encoders import FAMILIES, VARIANTS, save_dual_encoder, tokenizer_of
from error_bounds import dot_error, embedding_error, rounding, unit_error
from numpy.random import default_rng
from PIL import Image as PILImage
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.utils import is_sentencepiece_available

from pvlf_hf import PVLFModel, PVLFProcessor, TrainingFreeModel, cache_features
from pvlf_hf.export import export_program
from pvlf_hf.models import backbones_pvlf
from pvlf_hf.models.backbones_pvlf import DUAL_ENCODERS, MetaClip2DualEncoder, SiglipDualEncoder
from pvlf_hf.models.configuration_pvlf import BACKBONES, joint_width
from pvlf_hf.training.batches import PVLFCollator
from pvlf_hf.training.feature_cache import accept_cached_features

CAPTIONS = ["the same but Red", "dog", "a face with a hat and no glasses"]


def random_images(count, seed=0):
    pixels = default_rng(seed).integers(0, 256, (count, 40, 56, 3), dtype="uint8")
    return [PILImage.fromarray(p) for p in pixels]


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def pretrained(request, tmp_path_factory):
    """Return a family's name, its checkpoint, and the library's own model."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save_dual_encoder(request.param, folder)


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def published(request, tmp_path_factory):
    """The checkpoint of a family or a variant of it, and the library's own model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_dual_encoder(request.param, folder)


@pytest.fixture
def siglip(tmp_path):
    return save_dual_encoder("siglip", tmp_path), PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4, num_prompts=3)


def test_every_family_is_in_both_tables():
    assert BACKBONES.keys() == DUAL_ENCODERS.keys() == FAMILIES.keys()


def test_backbone_needs_one_table_entry_and_a_short_class():
    assert len(inspect.getsource(MetaClip2DualEncoder).splitlines()) < 40
    sources = [inspect.getsource(inspect.getmodule(kind)) for kind in (PVLFModel, PVLFProcessor, SiglipDualEncoder)]
    for source in (*sources, inspect.getsource(backbones_pvlf)):
        assert "model_type ==" not in source


@pytest.mark.parametrize("kind", [PVLFModel, TrainingFreeModel])
@torch.no_grad()
def test_embeddings_equal_those_of_transformers(published, kind):
    """Compare in float64: only the normalisation of our embeddings rounds to float32, so they agree within 1e-6."""
    folder, original = published
    original, width = copy.deepcopy(original).double(), joint_width(original.config)
    family, settings = original.config.model_type, {"fusion_heads": 4} if kind is PVLFModel else {}
    model = kind.from_vl_pretrained(folder, **settings).double()
    inputs = PVLFProcessor.from_vl_pretrained(folder)(images=random_images(3), text=CAPTIONS)
    pixels, ids, mask = inputs["pixel_values"].double(), inputs["input_ids"], inputs["attention_mask"]
    image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(ids, mask).pooler_output
    assert image.dtype == text.dtype == torch.float32
    if family == "blip":  # it lacks get_*_features, but returns the cosines of images with captions
        theirs = original(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
        close(image.double() @ text.double().T, theirs, 2 * unit_error(width))
        return
    text_inputs = {"input_ids": ids} if family == "siglip" else {"input_ids": ids, "attention_mask": mask}
    theirs = original.get_image_features(pixels), original.get_text_features(**text_inputs)
    for ours, embeds in zip((image, text), theirs, strict=True):
        wanted = F.normalize(embeds.pooler_output, dim=-1)
        error = dot_error(width // 2 + 4) * wanted.abs()  # the square root halves the norm's rounding error
        difference = (ours - wanted).abs()
        assert (difference <= error).all() and difference.max() < 1e-6  # the bound is higher where a value exceeds 0.6
    assert (text[0] - text[1]).norm() > 0.01 and (image[0] - image[1]).norm() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_padding_changes_an_embedding_only_where_the_family_was_trained_with_it(published):
    folder, original = published
    model, processor = PVLFModel.from_vl_pretrained(folder, fusion_heads=4), PVLFProcessor.from_vl_pretrained(folder)
    longest, filled = (processor(text=CAPTIONS, padding=padding) for padding in ("longest", "max_length"))
    by_default = processor(text=CAPTIONS)
    width = filled["input_ids"].shape[1]
    assert longest["input_ids"].shape[1] < width
    if original.config.model_type == "siglip":
        assert width == 64 and torch.equal(by_default["input_ids"], filled["input_ids"])
        with pytest.raises(ValueError, match=r'SigLIP pools at position 63: pad them to 64 with padding="max_length"'):
            model.get_text_features(**longest)
        return
    assert width == {"blip": 35}.get(original.config.model_type, 77)
    assert torch.equal(by_default["input_ids"], longest["input_ids"])
    error = embedding_error(model, {"pixel_values": processor(images=random_images(3))["pixel_values"], **filled})
    close(
        model.get_text_features(**longest).pooler_output,
        model.get_text_features(**filled).pooler_output,
        error["text_embeds"],
    )


@torch.no_grad()
def test_every_token_is_in_the_joint_space_and_row_0_is_the_image(published):
    """PVLF composes tokens of both sides, so that an attention pooling head must map patches one by one."""
    folder, original = published
    model, width = PVLFModel.from_vl_pretrained(folder, fusion_heads=4), joint_width(original.config)
    inputs = PVLFProcessor.from_vl_pretrained(folder)(images=random_images(2), text=CAPTIONS[:2])
    images = model.get_image_features(inputs["pixel_values"])
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert images.last_hidden_state.shape == (2, 1 + 16, width)
    assert texts.last_hidden_state.shape == (*inputs["input_ids"].shape, width)
    assert torch.equal(F.normalize(images.last_hidden_state[:, 0].float(), dim=-1), images.pooler_output)


def test_images_are_normalised_as_the_checkpoint_says(published, tmp_path):
    folder, original = published
    theirs = AutoImageProcessor.from_pretrained(folder)
    ours = PVLFProcessor.from_vl_pretrained(folder).image_processor
    spec = BACKBONES[original.config.model_type]
    for mean, std in ((theirs.image_mean, theirs.image_std), (spec.image_mean, spec.image_std)):
        assert [*ours.image_mean] == [*mean] and [*ours.image_std] == [*std]
    (square,) = random_images(1)
    square = square.resize((32, 32))
    pixels = theirs(square, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    close(ours(square, return_tensors="pt").pixel_values, pixels, 1e-6)
    copied = shutil.copytree(folder, tmp_path / "own")
    theirs.image_mean, theirs.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    theirs.save_pretrained(copied)
    ours = PVLFProcessor.from_vl_pretrained(copied).image_processor
    assert (ours.image_mean, ours.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_siglip_1_needs_no_further_package_for_its_tokenizer(tmp_path):
    save_dual_encoder("siglip-1", tmp_path)
    with pytest.raises(ImportError, match="SentencePiece") if not is_sentencepiece_available() else nullcontext():
        AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = PVLFProcessor.from_vl_pretrained(tmp_path).tokenizer
    assert tokenizer.get_vocab() == tokenizer_of("siglip").get_vocab()


@pytest.mark.slow
def test_pvlf_on_every_family_trains_and_survives_saving(pretrained, tmp_path):
    _, folder, _ = pretrained
    model = PVLFModel.from_vl_pretrained(folder, fusion_heads=4, num_prompts=3)
    processor = PVLFProcessor.from_vl_pretrained(folder)
    inputs = processor(images=random_images(3), text=CAPTIONS, target_images=random_images(3, seed=1))
    model.train()(**inputs).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert again.embedding_width == 32 and type(again) is PVLFModel
    again_inputs = processor(images=random_images(3), text=CAPTIONS, target_images=random_images(3, seed=1))
    with torch.no_grad():
        assert torch.equal(again(**again_inputs).similarity, model(**inputs).similarity)
        # A query alone, with its caption padded to another length, has the embedding that it has in a batch.
        alone = model.get_query_features(**processor.process_queries(random_images(3)[:1], CAPTIONS[:1])).pooler_output
        close(alone, model(**inputs).query_embeds[:1], embedding_error(model, dict(inputs))["query_embeds"])


# --- SigLIP ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_siglip_patch_equals_its_head_attending_to_that_patch_alone(siglip):
    original, model = siglip
    processor = PVLFProcessor.for_backbone(model.config.vl_config, tokenizer_of("siglip"))
    inputs = processor(images=random_images(2), text=CAPTIONS[:2])
    pixels, error = inputs["pixel_values"], embedding_error(model, dict(inputs))["image_tokens"]
    tokens = model.get_image_features(pixels).last_hidden_state
    hidden, head = original.vision_model(pixels).last_hidden_state, original.vision_model.head
    assert tokens.shape == (2, 1 + 16, 32)
    close(tokens[:, 0], head(hidden), error)
    weights = head.attention(head.probe.repeat(2, 1, 1), hidden, hidden)[1]
    assert weights.max() < 0.5  # the pooled output attends to many patches and equals none of them
    for patch in (0, 7, 15):
        # Under this key projection the patch's score is far above all others: the attention weights are one-hot.
        attention = head.attention
        keys = attention.in_proj_weight.detach().clone()
        wanted = torch.linalg.pinv(hidden[0]) @ F.one_hot(torch.tensor(patch), 16).float()  # (d,): hidden @ wanted
        query = attention.in_proj_weight[:32] @ head.probe[0, 0]
        attention.in_proj_weight[32:64] = torch.outer(query, wanted) * 1e6 / query.square().sum()
        weights = attention(head.probe, hidden[:1], hidden[:1], average_attn_weights=False)[1][0, :, 0]  # (heads, m)
        assert torch.equal(weights.argmax(-1), torch.full((4,), patch)) and (weights.max(-1).values == 1).all()
        close(head(hidden[:1])[0], tokens[0, 1 + patch], error)
        attention.in_proj_weight.copy_(keys)


@torch.no_grad()
def test_siglip_fusion_masks_padding_except_the_pooled_position(siglip):
    _, model = siglip
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 17, 32, generator=generator), torch.randn(1, 64, 32, generator=generator)
    mask, last = (torch.arange(64) < 5).long()[None], torch.tensor([63])

    def query(mask, changed=None):
        tokens = text.clone()
        if changed is not None:
            tokens[0, changed] += torch.randn(32, generator=torch.Generator().manual_seed(1))
        return model.compose(image, tokens, last, mask).pooler_output

    before = query(mask)
    assert torch.equal(query(mask, changed=30), before)  # padding
    assert (query(mask, changed=2) - before).norm() > 1e-4
    # the other positions attend to the pooled position, too
    assert torch.equal(before, query(mask.index_fill(1, last, 1)))
    assert (before - query(mask.index_fill(1, torch.tensor([30]), 1))).norm() > 1e-4


def test_siglip_rejects_captions_not_padded_to_its_length(siglip):
    _, model = siglip
    with pytest.raises(ValueError, match=r'captions are 7 tokens long.*pad them to 64 with padding="max_length"'):
        model.get_text_features(torch.ones(1, 7, dtype=torch.long))


@pytest.mark.parametrize(
    ("vision", "text", "advice"),
    [
        ({"vision_use_head": False}, {}, "vision_use_head=false"),
        ({}, {"projection_size": 24}, "image features have width 32, its text features 24"),
    ],
)
def test_siglip_without_a_joint_space_is_refused(vision, text, advice, tmp_path):
    vision = SiglipVisionConfig(**{**FAMILIES["siglip"]["vision_config"], **vision})
    text = SiglipTextConfig(**{**FAMILIES["siglip"]["text_config"], **text})
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=advice):
        PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4)


def test_siglip_2_reads_lower_case_and_all_its_positions(siglip, tmp_path):
    processor = PVLFProcessor.from_vl_pretrained(tmp_path)
    assert type(processor.tokenizer).__name__ == "Siglip2Tokenizer"
    processor.save_pretrained(tmp_path / "saved")
    for loaded in (processor, PVLFProcessor.from_pretrained(tmp_path / "saved")):
        inputs = loaded(text=["Make It RED", "make it red", "a dog"])
        assert inputs["input_ids"].shape == (3, 64)
        assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
        assert inputs["attention_mask"].sum(dim=1).tolist() == [11, 11, 5]
        images = loaded.image_processor
        assert [*images.image_mean, *images.image_std] == [0.5] * 6


@pytest.mark.slow
def test_cached_features_give_the_same_queries(pretrained, tmp_path):
    _, folder, _ = pretrained
    model = PVLFModel.from_vl_pretrained(folder, fusion_heads=4, num_prompts=3)
    model.set_finetuning("frozen")
    processor = PVLFProcessor.from_vl_pretrained(folder)
    paths = []
    for number, image in enumerate(random_images(6)):
        image.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    columns = {"reference": paths[:3], "caption": CAPTIONS, "target": paths[3:], "target_id": ["a", "b", "c"]}
    triplets = Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())
    cached, collator = cache_features(model, processor, triplets, tmp_path / "cache", progress=False)
    accept_cached_features(model)
    with torch.no_grad():
        batch = collator(list(cached))
        from_cache = model(**batch).query_embeds
        batch = tree_map(lambda t: t.float() if t.is_floating_point() else t, batch)
        error = rounding(
            lambda model, inputs: {"query": model(**inputs).query_embeds}, model, batch, stored=torch.float16
        )
        close(from_cache, model(**PVLFCollator(processor)(list(triplets))).query_embeds, error["query"])
        assert error["query"] < 0.01


@pytest.mark.slow
@torch.no_grad()
def test_siglip_is_exported_at_its_only_length(siglip):
    _, model = siglip
    processor = PVLFProcessor.for_backbone(model.config.vl_config, tokenizer_of("siglip"))
    inputs = processor.process_queries(random_images(3), CAPTIONS)
    exported = export_program(model, "query").module()(**inputs)
    close(
        exported,
        model.get_query_features(**inputs).pooler_output,
        embedding_error(model, dict(inputs))["query_embeds"],
    )
