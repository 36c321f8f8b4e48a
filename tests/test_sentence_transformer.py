"""PVLF in `sentence-transformers`: one `encode` for queries, images and texts, equal to the model's outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from error_bounds import dot_error, embedding_error, squares_error, unit_error
from forked import run_python
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from squares import draw
from transformers import AutoModel, AutoProcessor

from pvlf_hf.sentence_transformer import PVLFSentenceModule

CARD = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"

# Every type of input, sorted neither by type nor by length.
INPUTS = [
    {"text": "blue dog"},
    {"image": draw(0), "text": "the same but red with glasses"},
    draw(1),
    {"image": draw(2)},
    "dark",
    {"text": "red", "image": draw(3)},
    {"image": np.asarray(draw(4)), "text": "two hat"},
]


@pytest.fixture
def encoder(tiny_model, tiny_processor):
    return SentenceTransformer(modules=[PVLFSentenceModule(tiny_model, tiny_processor)], device="cpu")


def expected_embeddings(model, processor):
    """Return the expected embeddings: each input alone, by the model's method for its type."""
    embeds = []
    for one in INPUTS:
        one = one if isinstance(one, dict) else {"text": one} if isinstance(one, str) else {"image": one}
        inputs = processor(images=one.get("image"), text=one.get("text"))
        function = {1: model.get_image_features, 2: model.get_text_features, 3: model.get_query_features}[len(inputs)]
        with torch.no_grad():
            embeds.append(function(**inputs).pooler_output)
    return torch.cat(embeds)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_encode_mixes_queries_images_and_texts(encoder, tiny_model, tiny_processor, batch_size):
    expected = expected_embeddings(tiny_model, tiny_processor)
    embeds = encoder.encode(INPUTS, batch_size=batch_size, convert_to_tensor=True)
    error = squares_error()
    worst = max(error[name] for name in ("query_embeds", "image_embeds", "text_embeds"))
    torch.testing.assert_close(embeds, expected, atol=worst, rtol=0)
    assert np.array_equal(encoder.encode(INPUTS[1]), encoder.encode(INPUTS[1:2])[0])
    # sentence-transformers normalises again
    worst = max(error[name] for name in error if "similarity" in name) + 2 * unit_error(32)
    torch.testing.assert_close(encoder.similarity(embeds, embeds), expected @ expected.T, atol=worst, rtol=0)


def test_sentence_transformers_attributes_are_answered(encoder, tiny_model, tiny_processor):
    assert (encoder.get_embedding_dimension(), encoder.max_seq_length) == (32, 35)
    assert encoder.tokenizer is tiny_processor.tokenizer
    assert encoder.supports("image") and encoder.supports(("image", "text")) and not encoder.supports("audio")
    prompted = encoder.encode([{"image": draw(0), "text": "red"}, "red"], prompt="the same but ")
    whole = encoder.encode([{"image": draw(0), "text": "the same but red"}, "the same but red"])
    assert np.array_equal(prompted, whole)


def test_gradients_reach_every_part(encoder, tiny_model):
    encoder(encoder.preprocess(INPUTS))["sentence_embedding"][:, 0].sum().backward()
    reached = {name.split(".")[0] for name, p in tiny_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"backbone", "fusion", "aggregation"}


@pytest.mark.slow
def test_saved_encoder_is_a_pvlf_checkpoint(encoder, tiny_model, tiny_processor, tmp_path):
    expected = encoder.encode(INPUTS)
    encoder.save(str(tmp_path))
    again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    error = squares_error()
    worst = max(error[name] for name in ("query_embeds", "image_embeds", "text_embeds"))
    torch.testing.assert_close(expected_embeddings(*again), torch.from_numpy(expected), atol=worst, rtol=0)
    draw(0).save(tmp_path / "image.png")
    fresh = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer

folder = sys.argv[1]
encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
query = {"image": f"{folder}/image.png", "text": "the same but red with glasses"}
np.save(f"{folder}/found.npy", encoder.encode([query]))
"""
    done = run_python(["-c", fresh, tmp_path])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy")[0], expected[1], rtol=0, atol=error["query_embeds"])


@pytest.mark.slow
def test_saved_folder_loads_in_both_libraries():
    encoder = SentenceTransformer(str(CARD), trust_remote_code=True, device="cpu")
    model, processor = AutoModel.from_pretrained(CARD), AutoProcessor.from_pretrained(CARD)
    expected = expected_embeddings(model, processor)
    queries = [one for one in INPUTS if isinstance(one, dict) and len(one) == 2]
    images, texts = ([one[kind] for one in queries] for kind in ("image", "text"))
    error = embedding_error(model, dict(processor(images=images, text=texts)))
    worst = max(error[name] for name in ("query_embeds", "image_embeds", "text_embeds"))
    torch.testing.assert_close(encoder.encode(INPUTS, convert_to_tensor=True), expected, atol=worst, rtol=0)


def test_loading_forwards_settings():
    module = PVLFSentenceModule.load(
        str(CARD), model_kwargs={"dtype": torch.bfloat16}, processor_kwargs={"max_text_length": 9}
    )
    assert (module.model.dtype, module.max_seq_length) == (torch.bfloat16, 9)
    encoder = SentenceTransformer(modules=[module], device="cpu")
    assert encoder.encode(INPUTS).dtype == np.float32
    assert PVLFSentenceModule.load(str(CARD.parent), subfolder=CARD.name).max_seq_length == 35


@pytest.mark.reliability(
    9,
    "A string that looks like the path of an image and is none is refused, not embedded as words; and so are "
    "other inputs that cannot be meant",
    broken=("src/pvlf_hf/sentence_transformer.py", "isinstance(one, str) and _looks_like_image_path(one)", "False"),
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"role": "user", "content": "red"}], r"an input is \[\{'role': 'user'"),
        (["red", ("red", "blue")], r"an input is \('red', 'blue'\): pass an image, a text or"),
        (["red", {"image": draw(0), "text": " "}], "caption . is empty"),
        ([{"image": "gone.png", "text": "red"}], "cannot read image 'gone.png'"),
        (
            ["red", "photos/2024/dress.jpg"],
            "'photos/2024/dress.jpg' looks like the path of an image, but there is no s",
        ),
        (["my photos\\\\dress 1.JPG"], "looks like the path of an image"),
        (["IMG_0001.HEIC"], "looks like the path of an image"),
        ([{"video": "film.mp4"}], "Modality 'video' is not supported"),
    ],
)
def test_invalid_inputs_raise(encoder, bad, message, figure):
    with pytest.raises(ValueError, match=message):
        encoder.encode(bad)
    figure(f"{bad[-1]!r:.40}")


def test_texts_naming_files_are_encoded_as_text(encoder):
    texts = ["the same but red.", "a dog, not as in dress.jpg", "red/blue"]
    expected = encoder.encode([{"text": text} for text in texts])
    assert np.array_equal(encoder.encode(texts), expected)
    assert encoder.encode([{"text": "photos/dress.jpg"}]).shape == (1, 32)


def test_cached_losses_split_mixed_batches(encoder):
    """Train by a cached loss: the library splits features by row, so every feature needs a row for every input."""
    features = [encoder.preprocess(rows) for rows in (INPUTS[:4], INPUTS[3:7])]
    assert {len(tensor) for batch in features for tensor in batch.values()} == {4}
    encoder.eval()  # without dropout: the two losses embed in batches of different sizes
    plain = losses.MultipleNegativesRankingLoss(encoder)([dict(batch) for batch in features], None)
    # Logits are 20 cosines of rows that are normalised again; the loss follows their largest error at most twice, and
    # rounds a logarithm of four terms and a mean.
    cosines = max(error for name, error in squares_error().items() if "similarity" in name) + 2 * unit_error(32)
    error = 2 * 20 * cosines + dot_error(16) * (20 + plain.item())
    for size in (1, 2, 3):
        cached = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=size)
        torch.testing.assert_close(cached([dict(batch) for batch in features], None), plain, rtol=0, atol=error)


def test_text_length_is_set_by_call_or_module(encoder):
    long = {"text": "the same but red with glasses and hat"}
    whole = encoder.preprocess([long])["input_ids"].shape[1]
    cut = encoder.preprocess([long], processing_kwargs={"text": {"max_length": 5}})["input_ids"].shape[1]
    assert (whole, cut) == (10, 5)
    encoder.max_seq_length = 6
    assert encoder.preprocess([long])["input_ids"].shape[1] == encoder.max_seq_length == 6
    with pytest.raises(ValueError, match="the text encoder takes up to"):
        encoder.max_seq_length = 10_000
    with pytest.raises(ValueError, match="it takes 'text', 'image' and 'common'"):
        encoder.preprocess([long], processing_kwargs={"audio": {}})
