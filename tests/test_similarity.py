"""`embeddings/similarity.py`: fast ranks equal the definition bit for bit, also where float32 would be wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pvlf_hf.embeddings import similarity
from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.evaluation.metrics import rank_gallery
from pvlf_hf.evaluation.ranking import positive_ranks, subset_ranks, target_ranks


def plain_score(query, image):
    """Score one pair by the definition, number by number: unit vectors, products summed by halves in float64."""

    def halves(values):
        half = len(values) // 2
        return (
            halves([*map(sum, zip(values[:half], values[half : 2 * half], strict=True)), *values[2 * half :]])
            if half
            else values[0]
        )

    def unit(row):
        norm = max(math.sqrt(halves([value * value for value in row])), 1e-12)
        return [value / norm for value in row]

    products = [a * b for a, b in zip(unit(query.double().tolist()), unit(image.double().tolist()), strict=True)]
    return torch.tensor(halves(products), dtype=torch.float64).float().item()


def plain_ranking(scores, excluded):
    """Sort gallery positions, best first; `sorted` is stable."""
    return [i for i in sorted(range(len(scores)), key=lambda i: -scores[i]) if i != excluded]


def clusters(seed, num_queries, gallery_size, width, jitter, dtype):
    """Make embeddings in a few clusters, a jitter apart: 0 makes ties, float32 products cannot order 1e-8 to 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, width, generator=generator, dtype=torch.float64)
    centres[2] *= torch.rand((), generator=generator) < 0.7  # zero vectors score 0 with every image
    noise = torch.randn(gallery_size, width, generator=generator, dtype=torch.float64)
    gallery = centres[torch.randint(3, (gallery_size,), generator=generator)] + jitter * noise
    queries = torch.randn(num_queries, width, generator=generator, dtype=torch.float64)
    queries[0] = gallery[0]
    picks = torch.stack([torch.randperm(gallery_size, generator=generator)[:4] for _ in range(num_queries)])
    return queries.to(dtype), gallery.to(dtype), picks


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(1, 5), st.integers(4, 30), st.sampled_from([1, 3, 8, 33])),
    jitter=st.sampled_from([0, 1e-9, 1e-8, 3e-8, 1e-7, 1e-6, 1e-5, 1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    chunk_size=st.integers(1, 6),
    tile=st.sampled_from([1, 7, 64, 2**20]),
    crowded=st.sampled_from([0, 1]),
    k=st.integers(1, 3),
)
def test_ranks_equal_the_definition(seed, sizes, jitter, dtype, chunk_size, tile, crowded, k):
    queries, gallery, picks = clusters(seed, *sizes, jitter, dtype)
    target, excluded = picks[:, 0], picks[:, 1]
    scores = [[plain_score(query, image) for image in gallery] for query in queries]
    rankings = [plain_ranking(row, int(e)) for row, e in zip(scores, excluded, strict=True)]
    assert [rank_gallery(q, gallery, int(e)).tolist() for q, e in zip(queries, excluded, strict=True)] == rankings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "COSINES_PER_TILE", tile)
        patch.setattr(similarity, "CROWDED_SHARE", crowded)
        ranks = target_ranks(queries, gallery, target, excluded, chunk_size)
        several = positive_ranks(queries, gallery, picks[:, [0, 2]], excluded, chunk_size)
        best, worst = (target_ranks(queries, gallery, target, excluded, chunk_size, t) for t in ("best", "worst"))
        in_subset = subset_ranks(queries, gallery, picks, target, excluded)
        values, best_k = top_k(queries, gallery, k, excluded, chunk_size)
    assert several.tolist() == [[r.index(int(i)) for i in row[[0, 2]]] for r, row in zip(rankings, picks, strict=True)]
    assert ranks.equal(several[:, 0])
    assert in_subset.tolist() == [
        [i for i in r if i in row.tolist()].index(int(row[0])) for r, row in zip(rankings, picks, strict=True)
    ]
    assert best_k.tolist() == [r[:k] for r in rankings]
    assert values.tolist() == [[row[i] for i in r[:k]] for r, row in zip(rankings, scores, strict=True)]
    for n, row in enumerate(scores):
        others = [row[i] for i in rankings[n] if i != target[n]]
        assert best[n] == sum(other > row[target[n]] for other in others)
        assert worst[n] == sum(other >= row[target[n]] for other in others)


@pytest.mark.parametrize("jitter", [0, 1e-7, 1e-6])
def test_near_ties_of_real_width_are_ordered_across_tiles(jitter, monkeypatch):
    queries, gallery, picks = clusters(1, 40, 900, 256, jitter, torch.float32)
    rows, columns = torch.ones(40, 900).nonzero(as_tuple=True)
    scores = similarity._score_pairs(queries, gallery, rows, columns).view(40, 900)
    ranking = scores.sort(dim=1, descending=True, stable=True).indices
    monkeypatch.setattr(similarity, "COSINES_PER_TILE", 40 * 100)
    for crowded in (0, 1):  # scores by pairs and by complete tiles are equal
        monkeypatch.setattr(similarity, "CROWDED_SHARE", crowded)
        assert top_k(queries, gallery, 20)[1].equal(ranking[:, :20])
        assert target_ranks(queries, gallery, picks[:, 0]).equal((ranking == picks[:, :1]).nonzero()[:, 1])


@pytest.mark.parametrize("width", [1, 2, 33, 256, 1024])
def test_float32_error_bound_holds(width):
    generator = torch.Generator().manual_seed(width)
    worst = 0.0
    for scale in (1, 1e-6, 1e6):
        # growing partial sums
        queries, gallery = (torch.rand(60, width, generator=generator) ** 4 * scale for _ in range(2))
        gallery[:20] = queries[:20] * torch.rand(20, 1, generator=generator)
        gallery[20:40] *= torch.randint(0, 2, (20, width), generator=generator) * 2 - 1  # cancelling sums
        ((_, _, tile),) = similarity.cosine_tiles(queries, gallery, None, 64)
        rows, columns = torch.ones(60, 60).nonzero(as_tuple=True)
        scores = similarity.score_pairs(queries, gallery, rows, columns).view(60, 60)
        worst = max(worst, float((tile.double() - scores.double()).abs().max()))
    assert (width == 1 or worst > 0) and worst <= similarity.error_bound(width)


def test_embeddings_whose_squares_overflow_float32_are_ranked():
    queries, gallery, picks = clusters(0, 4, 20, 8, 1, torch.float64)
    expected = target_ranks(queries, gallery, picks[:, 0])
    for scale in (1e-9, 1e25, 1e80):
        assert target_ranks(queries * scale, gallery * scale, picks[:, 0]).equal(expected)


def test_products_stay_float32_where_tf32_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with similarity.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_bound_on_the_kth_highest_cosine_holds_and_is_close():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, generator=generator)
    for k in (1, 10, 700, 5000):
        bound = similarity.kth_at_least(values, k)
        reached = (values >= bound[:, None]).sum(dim=1)
        assert (reached >= k).all() and (reached <= 1.2 * k + 2).all()
        row, column = similarity.where_above(values, bound)
        assert torch.equal(torch.stack([row, column], dim=1), (values > bound[:, None]).nonzero())
    assert similarity.kth_at_least(values[:, :9], 10).tolist() == [-torch.inf] * 3
