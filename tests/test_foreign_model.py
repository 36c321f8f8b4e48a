"""Trainer, evaluation, gallery and exports accept a model that shares nothing with PVLF but the interface."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from error_bounds import rounding
from foreign import ColourModel, make_foreign
from hub_server import serving
from PIL import Image as PILImage
from squares import square_triplets
from test_hub import TOKENS, run
from tiny import make_model, make_processor
from transformers import AutoModel, AutoProcessor, pipeline

from pvlf_hf import (
    CIRBenchmark,
    EmbeddingStore,
    Gallery,
    PVLFTrainer,
    PVLFTrainingArguments,
    encode_by_openvino,
    evaluate,
)
from pvlf_hf.checkpoints.golden import check_golden, write_golden
from pvlf_hf.embeddings.embedding_store import made_by
from pvlf_hf.embeddings.encoding import QUERY_METHODS
from pvlf_hf.embeddings.fingerprints import image_settings, sequence_digest, text_settings
from pvlf_hf.export import export_program

COLOURS = {"red": "red", "green": "green", "blue": "blue", "black": "dark", "white": "bright", "yellow": "hat"}


@pytest.fixture
def squares(tmp_path):
    return square_triplets(tmp_path, list(COLOURS), lambda _, target: f"make it {COLOURS[target]}")


@pytest.fixture
def benchmark(squares, tmp_path):
    references = [a for a in COLOURS for b in COLOURS if a != b]
    files = [str(tmp_path / f"{colour}.png") for colour in COLOURS]
    gallery = Dataset.from_dict({"image": files, "image_id": list(COLOURS)}).cast_column("image", Image())
    return CIRBenchmark("squares", squares.add_column("reference_id", references).remove_columns("target"), gallery)


def train(model, processor, squares, folder, **settings):
    args = PVLFTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", max_steps=60, save_steps=60, **settings
    )
    trainer = PVLFTrainer(model, args, squares, processing_class=processor)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("finetuning", ["frozen", "text", "both"])
def test_foreign_model_is_trained_and_evaluated(squares, benchmark, tmp_path, finetuning):
    model, processor = make_foreign()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = evaluate(model, processor, benchmark, progress=False).metrics["recall@1"]
    if finetuning == "frozen":
        with pytest.raises(
            ValueError, match="nothing trains: ColourModel has no weights beside its encoders.*'text' or"
        ):
            train(model, processor, squares, tmp_path / "run", finetuning=finetuning, per_device_train_batch_size=5)
        return
    settings = {"finetuning": finetuning, "encoder_learning_rate": 0.1, "per_device_train_batch_size": 15}
    trainer = train(model, processor, squares, tmp_path / "run", **settings)
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == ({"tokens"} if finetuning == "text" else {"tokens", "colours"})
    assert evaluate(model, processor, benchmark, progress=False).metrics["recall@1"] > max(start, 0.5)
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-60")) is ColourModel
    assert trainer.state.log_history[-1]["step"] == 60


def test_foreign_embeddings_are_stored_and_reused(benchmark, tmp_path):
    model, processor = make_foreign()
    for method in QUERY_METHODS:
        kept = evaluate(model, processor, benchmark, method, store=EmbeddingStore(tmp_path / "kept"), progress=False)
        again = evaluate(None, None, benchmark, method, store=EmbeddingStore(tmp_path / "kept"), progress=False)
        assert kept.metrics == again.metrics
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model"), AutoProcessor.from_pretrained(tmp_path / "model")
    assert made_by(*again) == made_by(model, processor)
    other, _ = make_foreign(seed=1)
    with pytest.raises(ValueError, match="embeddings of another model"):
        EmbeddingStore(tmp_path / "kept").claim(other, processor)
    model.config.hidden_size = 9
    assert made_by(model, processor) != made_by(*again)


def test_foreign_model_indexes_and_searches(squares, tmp_path):
    model, processor = make_foreign()
    gallery = Gallery.from_folder(tmp_path, model, processor, path=tmp_path / "index", progress=False)
    image = PILImage.open(tmp_path / "red.png")
    query = processor.process_queries(image, "make it blue")
    with torch.no_grad():
        scores = model.get_query_features(**query).pooler_output @ gallery.embeds.T
    loaded = Gallery.load(tmp_path / "index", model, processor)
    result = loaded.search(image, "make it blue", k=3)
    assert result.ids == [loaded.ids[row] for row in scores[0].topk(3).indices]
    # this model does not return the image and text features of a query
    for weights in ((1, 0, 0), (0, 0, 1), (0.5, 1, -0.2)):
        assert loaded.search(query=result.query, weights=weights).ids
    assert result.refine("make it green").ids and loaded.search(image).ids and loaded.search(text="green").ids
    with pytest.raises(ValueError, match="explain=True: this model returns no aggregation weights"):
        loaded.search(image, "make it blue", explain=True)
    pipe = pipeline(
        "composed-image-retrieval", model=model, processor=processor, gallery=list(map(image_of, loaded.paths))
    )
    found = pipe({"image": image, "text": "make it blue"}, top_k=3)
    assert [loaded.ids[one["index"]] for one in found] == result.ids


def query_error(model, inputs):
    """Return how far apart two computations of the same queries may be."""
    return rounding(lambda model, inputs: {"query": model.get_query_features(**inputs).pooler_output}, model, inputs)[
        "query"
    ]


def image_of(path):
    return PILImage.open(path).convert("RGB")


def test_foreign_model_supports_golden_files_and_sentence_transformers(tmp_path):
    from pvlf_hf.sentence_transformer import PVLFSentenceModule

    model, processor = make_foreign()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_golden(tmp_path)
    assert max(check_golden(tmp_path).values()) == 0
    module = PVLFSentenceModule.load(str(tmp_path))
    image = PILImage.new("RGB", (16, 16), "red")
    with torch.no_grad():
        embeds = module(module.preprocess([{"image": image, "text": "a hat"}, "a hat", image]))["sentence_embedding"]
        inputs = processor.process_queries(image, "a hat")
        query, error = model.get_query_features(**inputs).pooler_output, query_error(model, dict(inputs))
    torch.testing.assert_close(embeds[:1], query, rtol=0, atol=error)
    assert embeds.shape == (3, module.get_embedding_dimension()) == (3, 8)
    module.max_seq_length = 12
    assert module.max_seq_length == 12


def test_export_and_openvino_reject_foreign_models(tmp_path):
    model, _ = make_foreign()
    with pytest.raises(ValueError, match="ColourModel is not exported: only models on one of"):
        export_program(model, "query")
    with pytest.raises(ValueError, match="OpenVINO encodes by dual encoders, and ColourModel has none"):
        encode_by_openvino(model)


PUBLISH = """
from foreign import make_foreign

model, processor = make_foreign()
model.push_to_hub("you/colours")
processor.push_to_hub("you/colours")
"""

LOAD = """
import sys

from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("you/colours", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("you/colours", trust_remote_code=True)
inputs = processor.process_queries(__import__("PIL.Image").Image.new("RGB", (16, 16), "red"), "a hat")
print(model.get_query_features(**inputs).pooler_output.tolist(), file=open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_foreign_model_is_pushed_and_loaded_with_its_class(tmp_path):
    with serving(TOKENS) as hub:
        run(PUBLISH, hub, tmp_path, HF_TOKEN="hf_owner")
        files = hub.repositories["you/colours"].commits[hub.repositories["you/colours"].branches["main"]].files
        assert json.loads(files["config.json"].content)["auto_map"]["AutoModel"] == "foreign.ColourModel"
        run(LOAD, hub, tmp_path, tmp_path / "embeds.json")
    model, processor = make_foreign()
    inputs = processor.process_queries(PILImage.new("RGB", (16, 16), "red"), "a hat")
    theirs = json.loads((tmp_path / "embeds.json").read_text())
    with torch.no_grad():
        ours, error = model.get_query_features(**inputs).pooler_output, query_error(model, dict(inputs))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=error)


# --- the fingerprint of PVLF ----------------------------------------------------------------------------------------

# The settings that the first fingerprints listed, in their order.
SETTINGS = """num_prompts prompt_depth prompt_init_std fusion_layers fusion_heads fusion_ffn_size dropout
layer_norm_eps residual aggregation_mlp_input aggregation_sum_input text_padding alpha gamma temperature""".split()


def first_fingerprint(model, processor):
    """Return the fingerprint that 0.1.0 stored with PVLF's embeddings, on a CPU without autocast."""
    settings = image_settings(processor) + text_settings(processor)
    settings += json.dumps([getattr(model.config, name) for name in SETTINGS])
    config = json.loads(model.config.vl_config.to_json_string(use_diff=False))
    for part in (config, config["vision_config"], config["text_config"]):
        for name in ("dtype", "transformers_version", "_name_or_path"):
            part.pop(name, None)
    parts = [json.dumps(config, sort_keys=True), "None", settings]
    for name, tensor in model.state_dict().items():
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor.contiguous().numpy().tobytes()]
    return sequence_digest(*parts)


@pytest.mark.parametrize("backbone", ["blip", "clip"])
def test_embeddings_stored_by_version_01_stay_valid(backbone):
    model, processor = make_model(backbone), make_processor()
    assert made_by(model, processor)["fingerprint"] == first_fingerprint(model, processor)
    model.config.gamma = 1.0
    assert made_by(model, processor)["fingerprint"] == first_fingerprint(model, processor)


def test_fingerprint_of_the_published_checkpoint_is_unchanged():
    import tokenizers
    import transformers

    if (transformers.__version__, tokenizers.__version__) != ("5.23.0", "0.23.3"):
        pytest.skip("libraries of other versions write other configurations")
    folder = "model_cards/pvlf-emoji-tiny"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert made_by(model, processor)["fingerprint"] == "92d6580407962a6f45f8e518844af91f"


def missing(name):
    def raising(self):
        raise AttributeError(name)

    return property(raising)


def test_model_whose_code_is_older_than_compositions_by_scores_ranks_by_cosine(benchmark):
    """The code that came with a checkpoint of version 0.1 knows neither `combine` nor `gallery_prompts`."""

    class Older(ColourModel):
        combine, gallery_prompts, score = map(missing, ("combine", "gallery_prompts", "score"))

    model, processor = make_foreign()
    older = Older(model.config).eval()
    older.load_state_dict(model.state_dict())
    assert not hasattr(older, "combine") and not hasattr(older, "gallery_prompts")
    image = PILImage.new("RGB", (16, 16), "red")
    found = []
    for one in (model, older):
        gallery = Gallery.from_dataset(benchmark.gallery, one, processor, progress=False)
        result = gallery.search(image, "a cat")
        pipe = pipeline("composed-image-retrieval", model=one, processor=processor, gallery=benchmark.gallery["image"])
        answers = [(answer["index"], answer["score"]) for answer in pipe({"image": image, "text": "a cat"})]
        report = evaluate(one, processor, benchmark, progress=False)
        found.append((result.ids, result.scores, answers, report.metrics, gallery.made_by))
    assert found[0] == found[1]
