"""The product of similarities: it has no query embedding, and every interface gives the same exact ranking."""

import itertools

import pyarrow as pa
import pytest
import torch
from dual_encoders import save_dual_encoder
from error_bounds import rounding, roundoff
from milvus_tables import table_of
from squares import draw, make_benchmark
from test_gallery import index_options
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, pipeline

from pvlf_hf import (
    EmbeddingStore,
    Gallery,
    PVLFProcessor,
    TrainingFreeModel,
    evaluate,
)
from pvlf_hf.embeddings.combined import CombinedQueries, gallery_mean, top_k_of
from pvlf_hf.embeddings.encoding import embed
from pvlf_hf.embeddings.similarity import exact_unit_rows
from pvlf_hf.evaluation.ranking import positive_ranks, subset_ranks, target_ranks
from pvlf_hf.evaluation.submission import cirr_submission
from pvlf_hf.export import export_program
from pvlf_hf.models.compositions_training_free import COMPOSITIONS, product
from pvlf_hf.search.demo_session import Searcher, Session, has_both
from pvlf_hf.search.faiss_index import FaissIndex
from pvlf_hf.search.nearest import nearest
from pvlf_hf.search.vector_index import make_index
from pvlf_hf.sentence_transformer import PVLFSentenceModule

TEXT = "the same but red"


def combine(weight=0.5):
    return lambda image, text: product(image, text, weight)


def definition(query, gallery, weight):
    """Compute the scores of one query in float64, directly from the formula; return (N,) float32."""
    images = exact_unit_rows(gallery)
    v, t = (F.normalize(half.double(), dim=0) for half in query.chunk(2))
    mean = images.mean(dim=0)
    by_image, by_text = (images - mean) @ (v - mean), (images - mean) @ t
    return by_image.clamp(min=0) ** (1 - weight) * by_text.clamp(min=0) ** weight


def random_queries(count=12, size=700, width=16, seed=0):
    torch.manual_seed(seed)
    gallery = F.normalize(torch.randn(size, width) + 0.7, dim=1)
    gallery[300:310] = gallery[0]  # ties
    v, t = (F.normalize(torch.randn(count, width) + 0.3, dim=1) for _ in range(2))
    return torch.cat([v, t], dim=1) * 0.5**0.5, gallery


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_dual_encoder("clip", folder)
    return folder


@pytest.fixture(scope="module")
def made(clip):
    model = TrainingFreeModel.from_vl_pretrained(clip, composition="product")
    return model, PVLFProcessor.from_vl_pretrained(clip)


def test_product_equals_numbers_computed_by_hand():
    image, text = torch.tensor([0.5, -0.1, 0.2, 0.3]), torch.tensor([0.08, 0.4, -0.2, 0.0])
    close = {"rel": 12 * roundoff(), "abs": 0}  # two numbers that no float holds, two powers of 4 and their product
    assert product(image, text, 0.5).tolist() == pytest.approx([0.2, 0, 0, 0], **close)
    assert product(image, text, 0.0).tolist() == pytest.approx([0.5, 0, 0.2, 0.3], **close)  # the image alone
    assert product(image, text, 1.0).tolist() == pytest.approx([0.08, 0.4, 0, 0], **close)


@pytest.mark.parametrize("weight", [0.5, 0.3, 0.0, 1.0])
def test_all_ways_to_rank_agree_with_the_formula(weight):
    queries, gallery = random_queries()
    combined = CombinedQueries(queries, combine(weight))
    defined = torch.stack([definition(query, gallery, weight) for query in queries])
    scores, best = top_k_of(combined, gallery, len(gallery))
    close = {"rtol": 1.01 * roundoff(), "atol": 0}  # in float64, and rounded once
    torch.testing.assert_close(scores.double(), defined.gather(1, best), **close)
    assert (scores.diff() <= 0).all() and all(sorted(row) == list(range(700)) for row in best.tolist())
    tied = [row for row in best.tolist() if set(row[:100]) & {0}]
    assert not tied or all(sorted(r, key=row.index) == r for row in tied for r in [[0, *range(300, 310)]])
    ranks = torch.stack([row.argsort() for row in best])
    target = torch.arange(12) * 50 + 7
    assert torch.equal(target_ranks(combined, gallery, target), ranks.gather(1, target[:, None])[:, 0])
    excluded = best[:, 0].where(best[:, 0] != target, best[:, 1])
    ranks_of_targets = target_ranks(combined, gallery, target, excluded)
    above = ranks.gather(1, excluded[:, None])[:, 0] < ranks.gather(1, target[:, None])[:, 0]
    assert torch.equal(ranks_of_targets, ranks.gather(1, target[:, None])[:, 0] - above.long())
    positives = torch.stack([target, (target + 1) % 700, torch.full_like(target, -1)], dim=1)
    expected = ranks.gather(1, positives.clamp(min=0)).where(positives >= 0, -1)
    assert torch.equal(positive_ranks(combined, gallery, positives), expected)
    subset = torch.stack([target, (target + 1) % 700, (target + 9) % 700], dim=1)
    among = (ranks.gather(1, subset) < ranks.gather(1, target[:, None])).sum(dim=1)
    assert torch.equal(subset_ranks(combined, gallery, subset, target), among)


def finder(name, gallery, some, folder):
    """Return a function that finds the best k images of one query, among all or among `some`."""
    if name != "milvus":
        index = make_index(name, gallery)
        return lambda query, k, rows: nearest(index, gallery, query.against(gallery), k, rows)
    from pvlf_hf.search.milvus.nearest import nearest_in_store
    from pvlf_hf.search.milvus.store import StoreAddress, create_store

    columns, mean = pa.table({"chosen": torch.isin(torch.arange(len(gallery)), some).tolist()}), gallery_mean(gallery)
    address = StoreAddress(index_options(name, folder)["uri"], "product")
    store = create_store(address, gallery.shape[1], columns.schema, {})
    store.write(table_of(gallery, chosen=columns["chosen"]))

    def find(query, k, rows):
        expression = "" if rows is None else "chosen == true"
        found = nearest_in_store(store, lambda embeds: query.against(embeds, mean), k, expression)
        return found.scores, torch.tensor([int(image_id[:6]) for image_id in found.ids])

    return find


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "faiss", "milvus"])
def test_each_index_finds_the_best(name, tmp_path, monkeypatch):
    queries, gallery = random_queries(count=8, size=3000)
    index_options(name, tmp_path)  # skips where the index is not installed
    combined = CombinedQueries(queries, combine())
    scores, best = top_k_of(combined, gallery, 3000)
    some = torch.arange(0, 3000, 7)
    find = finder(name, gallery, some, tmp_path)
    for query, k in itertools.product(range(8), (1, 10, 100 if name == "faiss" else 2000)):
        one = combined.select(torch.tensor([query]))
        found_scores, found = find(one, k, None)
        if name == "faiss":  # a graph may miss some
            assert len({*found.tolist()} & {*best[query, :k].tolist()}) >= 0.9 * k
        else:
            assert torch.equal(found, best[query, :k]) and torch.equal(found_scores, scores[query, :k])
        expected = best[query][torch.isin(best[query], some)][:k]
        assert torch.equal(find(one, k, some)[1], expected)  # filtered, exact with every index
    if name == "milvus":
        monkeypatch.setattr("pvlf_hf.search.milvus.store.MOST_RESULTS", 200)
        for k, message in (
            (500, "500 results were requested"),
            (150, "150 images by two .* are not settled by the 200"),
        ):
            with pytest.raises(ValueError, match=message):
                find(combined.select(torch.tensor([0])), k, None)


@pytest.mark.parametrize("width", [2, 33, 256])
def test_exact_search_allows_for_half_precision(width):
    """Search images whose scores differ by less than half precision resolves."""
    torch.manual_seed(width)
    query = torch.cat([F.normalize(torch.rand(width) + 0.5, dim=0), F.normalize(torch.rand(width) + 0.5, dim=0)])
    near = F.normalize(query[:width] + query[width:], dim=0)
    jitter = 10.0 ** -torch.linspace(1, 6, 1500)[:, None]
    images = near + jitter * torch.randn(1500, width) * width**-0.5
    gallery = F.normalize(torch.cat([images, torch.randn(1500, width)]), dim=1)
    scores = CombinedQueries(query[None], combine()).against(gallery)
    index = make_index("exact", gallery)
    for k in (1, 10, 300):
        found = index.combined_candidates(scores, k)
        assert {*found.tolist()} >= {*top_k_of(CombinedQueries(query[None], combine()), gallery, k)[1][0].tolist()}


def test_exact_search_rescores_few_candidates():
    """Count the candidates: exact search does not score every image in float64."""
    queries, gallery = random_queries(size=5000)
    index = make_index("exact", gallery)
    for query in range(12):
        one = CombinedQueries(queries[query : query + 1], combine()).against(gallery)
        assert len(index.combined_candidates(one, 10)) < 250
    faiss = FaissIndex(gallery)
    requested = []
    faiss.candidates, candidates = (lambda query, k: requested.append(k) or candidates(query, k)), faiss.candidates
    nearest(faiss, gallery, CombinedQueries(queries[:1], combine()).against(gallery), 5)
    assert max(requested) < 5000


def test_gallery_pipeline_and_model_rank_alike(made, tmp_path):
    model, processor = made
    images = {f"{row}.png": draw(row) for row in range(9)}
    (tmp_path / "photos").mkdir()
    for name, image in images.items():
        image.save(tmp_path / "photos" / name)
    gallery = Gallery.from_folder(tmp_path / "photos", *made, path=tmp_path / "index", progress=False)
    result = gallery.search(draw(0), TEXT, k=9)
    with torch.no_grad():
        inputs = processor.process_queries(draw(0), TEXT)
        output = model.get_query_features(**inputs)
        scores = definition(output.pooler_output[0], gallery.embeds, 0.5)
    targets = processor.process_targets([*images.values()])["pixel_values"]

    def computed(model, inputs):
        query = model.get_query_features(**inputs["query"]).pooler_output[0]
        return {"scores": definition(query, model.get_image_features(inputs["targets"]).pooler_output, 0.5)}

    with torch.no_grad():
        error = rounding(computed, model, {"query": dict(inputs), "targets": targets})["scores"]
    order = scores.sort(descending=True, stable=True)
    assert result.ids == [gallery.ids[row] for row in order.indices]
    assert result.scores == pytest.approx(order.values.tolist(), rel=0, abs=error)
    assert torch.equal(output.pooler_output, torch.cat([output.image_embeds, output.text_embeds], 1) * 0.5**0.5)
    found = pipeline("composed-image-retrieval", model=model, processor=processor, gallery=[*images.values()])
    found = found(draw(0), text=TEXT, top_k=9)
    assert sorted(one["score"] for one in found) == pytest.approx(sorted(scores.tolist()), rel=0, abs=error)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model"), AutoProcessor.from_pretrained(tmp_path / "model")
    opened = Gallery.load(tmp_path / "index", *again)
    assert opened.search(draw(0), TEXT, k=9).scores == result.scores
    assert gallery.search(query=result.query, weights=(1, 0, 0)).ids == gallery.search(draw(0)).ids
    assert gallery.search(query=result.query, weights=(0, 0, 1)).ids == gallery.search(text=TEXT).ids
    assert result.refine("in green", pick=1).ids
    with pytest.raises(ValueError, match="scores by two similarities and has no embedding to mix"):
        gallery.search(query=result.query, weights=(0.5, 1, 0))


def test_demo_searches_by_the_product(made, tmp_path):
    gallery = Gallery.from_dataset(make_benchmark().gallery, *made, progress=False)
    searcher = Searcher(gallery, tmp_path)
    session = searcher.search(Session(reference="red"), TEXT, balance=0.5)
    assert session.shown and session.steps[0].why is None and not has_both(session.steps[0].query)


def test_evaluation_of_the_product_equals_its_search(made, tmp_path):
    benchmark, store = make_benchmark(), EmbeddingStore(tmp_path)
    measured = evaluate(*made, benchmark, progress=False, store=store)
    assert measured == evaluate(*made, benchmark, progress=False)
    gallery = Gallery.from_dataset(benchmark.gallery, *made, progress=False)
    ranks = []
    for query in benchmark.queries:
        ids = gallery.search(query["reference"], query["caption"], k=9).ids
        ids.remove(query["reference_id"])
        ranks.append(ids.index(query["target_id"]))
    assert measured.per_query["rank"] == tuple(ranks)
    plain = evaluate(*made, benchmark, "image+text", progress=False)
    assert plain.per_query["rank"] != measured.per_query["rank"]
    embeds = embed(*made, benchmark, progress=False)
    assert isinstance(embeds.queries, CombinedQueries)
    recall, _ = cirr_submission(benchmark, *embeds)
    assert len(recall) > 2
    with pytest.raises(ValueError, match="other than an inner product .'product'.*pass the model"):
        evaluate(None, None, benchmark, progress=False, store=EmbeddingStore(tmp_path))
    captioned = make_benchmark(several_captions=True)  # several captions: the mean of the text embeddings
    assert isinstance(evaluate(*made, captioned, progress=False).metrics["recall@1"], float)


def test_calls_that_need_query_embeddings_raise(made):
    model, processor = made
    inputs = processor(images=[draw(0)] * 2, text=[TEXT] * 2, target_images=[draw(1), draw(2)])
    output = model(**inputs)
    assert output.loss is None and output.similarity.shape == (2, 2)
    remedies = {
        "no query embedding that a loss could train: fine-tune with": lambda: model(**inputs, return_loss=True),
        "sentence-transformers compares embeddings by cosine": lambda: PVLFSentenceModule(model, processor),
        "export it with composition='slerp' or 'sum'": lambda: export_program(model, "query"),
        "which is not twice the gallery's 5": lambda: CombinedQueries(torch.ones(1, 8), combine()).against(
            torch.ones(2, 5)
        ),
    }
    for message, call in remedies.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert COMPOSITIONS["sum"].combine is None
    torch.testing.assert_close(gallery_mean(torch.eye(4)), torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0)
