"""`evaluation/metrics.py` and `ranking.py` against a plain sort of every row and figures of a public reference."""

import json
from pathlib import Path

import pytest
import torch
from error_bounds import MEAN_ERROR
from reference import TOLERANCES

from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.evaluation.metrics import (
    METRICS,
    average_precision_at_k,
    map_at_k,
    metrics_named,
    rank_gallery,
    recall_at_k,
)
from pvlf_hf.evaluation.ranking import (
    NOT_RETRIEVED,
    positive_ranks,
    ranks_from_lists,
    ranks_from_scores,
    subset_ranks,
    target_ranks,
)

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "metrics.json").read_text())


def plain_ranking(query, gallery, excluded=None):
    """Rank the gallery for one query in plain Python: gallery positions, best first."""

    def cosine(image):
        a, b = query.double(), image.double()
        return (a @ b / (a.norm() * b.norm()).clamp(min=1e-12)).float().item()

    scores = [cosine(image) for image in gallery]
    return [i for i in sorted(range(len(gallery)), key=lambda i: -scores[i]) if i != excluded]  # sorted() is stable


def problem(num_queries, gallery_size, width=5, levels=None, dtype=torch.float32, seed=0):
    """Make random embeddings and three gallery positions a query; a small number of `levels` makes most rows tie."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(levels or gallery_size, width, generator=generator).to(dtype)
    gallery = rows[torch.randint(len(rows), (gallery_size,), generator=generator)] if levels else rows
    queries = torch.randn(num_queries, width, generator=generator).to(dtype)
    # distinct positions: target, excluded, other member
    picks = torch.stack([torch.randperm(gallery_size, generator=generator)[:3] for _ in range(num_queries)])
    return queries, gallery, picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_ranks_equal_a_plain_sort(levels, dtype):
    queries, gallery, picks = problem(11, 23, levels=levels, dtype=dtype)
    target, excluded = picks[:, 0], picks[:, 1]
    subset = torch.cat([picks, torch.full((11, 1), -1)], dim=1)
    plain = [plain_ranking(q, gallery) for q in queries]
    without = [plain_ranking(q, gallery, int(e)) for q, e in zip(queries, excluded, strict=True)]
    restricted = [[i for i in row if i in picks[n].tolist()] for n, row in enumerate(without)]

    def positions(rankings):
        return [row.index(int(t)) for row, t in zip(rankings, target, strict=True)]

    for chunk_size in (1, 4, 11, 128):  # 4 leaves a ragged last chunk
        kwargs = {"chunk_size": chunk_size}
        assert target_ranks(queries, gallery, target, **kwargs).tolist() == positions(plain)
        assert target_ranks(queries, gallery, target, excluded, **kwargs).tolist() == positions(without)
        assert subset_ranks(queries, gallery, subset, target, excluded).tolist() == positions(restricted)
        scores, best = top_k(queries, gallery, 22, excluded, **kwargs)
        assert best.tolist() == without
        assert scores.dtype == torch.float32 and (scores.diff(dim=1) <= 0).all()
        assert top_k(queries, gallery, 7, **kwargs)[1].tolist() == [row[:7] for row in plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("jitter", [0, 1e-8, 1e-7, 1e-6, 1])
def test_fast_ranks_equal_the_definition(jitter, dtype):
    """Compare with `rank_gallery` on rows in three clusters that float32 products cannot order."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(9, 48, generator=generator, dtype=torch.float64).to(dtype)
    gallery = torch.randn(3, 48, generator=generator, dtype=torch.float64).repeat(70, 1)
    gallery = (gallery + jitter * torch.randn(210, 48, generator=generator, dtype=torch.float64)).to(dtype)
    picks = torch.stack([torch.randperm(210, generator=generator)[:6] for _ in range(9)])
    target, excluded = picks[:, 0], picks[:, 1]
    rankings = [rank_gallery(q, gallery, int(e)).tolist() for q, e in zip(queries, excluded, strict=True)]
    expected = [[ranking.index(i) for i in row] for ranking, row in zip(rankings, picks[:, ::2].tolist(), strict=True)]
    for chunk_size in (1, 4, 128):
        assert positive_ranks(queries, gallery, picks[:, ::2], excluded, chunk_size).tolist() == expected
        assert target_ranks(queries, gallery, target, excluded, chunk_size).tolist() == [row[0] for row in expected]
        assert top_k(queries, gallery, 209, excluded, chunk_size)[1].tolist() == rankings
    among = [[i for i in ranking if i in row] for ranking, row in zip(rankings, picks.tolist(), strict=True)]
    in_subset = subset_ranks(queries, gallery, picks, target, excluded)
    assert in_subset.tolist() == [row.index(i) for row, i in zip(among, target.tolist(), strict=True)]


def test_the_definition_sorts_stably_and_refuses_nan():
    gallery = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert rank_gallery(torch.tensor([3.0, 0.0]), gallery).tolist() == [1, 3, 0, 2]
    assert rank_gallery(torch.tensor([3.0, 0.0]), gallery, exclude=3).tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="gallery_embeds hold NaN or infinity, first at gallery 1"):
        rank_gallery(torch.ones(2), torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="query_embeds are 3 wide and gallery_embeds 2"):
        rank_gallery(torch.ones(3), gallery)


def plain_average_precision(ranking, positives, k):
    """Compute the definition rank by rank, counting precision@j from scratch for each."""
    hits = [image in positives for image in ranking[:k]]
    return sum(sum(hits[: j + 1]) / (j + 1) for j, hit in enumerate(hits) if hit) / min(len(positives), k)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_average_precision_equals_a_plain_sort(levels, exclude):
    queries, gallery, picks = problem(12, 23, levels=levels)
    excluded = picks[:, 0] if exclude else None
    generator = torch.Generator().manual_seed(1)
    positives = [[i for i in torch.randperm(23, generator=generator).tolist() if i != picks[n, 0]] for n in range(12)]
    positives = [row[: 1 + n % 9] for n, row in enumerate(positives)]
    index = torch.tensor([row + [-1] * (9 - len(row)) for row in positives])
    index = index[:, torch.randperm(9, generator=generator)]  # padding may be anywhere
    rankings = [plain_ranking(q, gallery, int(picks[n, 0]) if exclude else None) for n, q in enumerate(queries)]
    for chunk_size in (1, 5, 128):
        ranks = positive_ranks(queries, gallery, index, excluded, chunk_size)
        assert ranks.tolist() == [
            [r.index(i) if i >= 0 else -1 for i in row] for r, row in zip(rankings, index.tolist(), strict=True)
        ]
    ks = [1, 4, 10, 23, 50]
    for k, values in average_precision_at_k(ranks, ks).items():
        plain = [plain_average_precision(r, p, k) for r, p in zip(rankings, positives, strict=True)]
        assert values.tolist() == pytest.approx(plain, rel=MEAN_ERROR)
        assert map_at_k(ranks, [k])[k] == pytest.approx(sum(plain) / 12, rel=MEAN_ERROR)
    alone = positive_ranks(queries, gallery, picks[:, 1:2], excluded)
    assert torch.equal(alone[:, 0], target_ranks(queries, gallery, picks[:, 1], excluded))


def test_equal_gallery_rows_tie_exactly_whatever_the_chunk():
    # In float32 the products of equal rows differ in the last bit, by column and by number of queries.
    queries, gallery, _ = problem(33, 5, width=256)
    gallery = gallery.repeat(2, 1)
    target = torch.full((33,), 7)
    expected = target_ranks(queries, gallery[[7]].repeat(8, 1), target)
    assert expected.tolist() == [7] * 33
    first, second = torch.full((33,), 2), torch.full((33,), 7)
    for chunk_size in (1, 2, 5, 33):
        ahead = target_ranks(queries, gallery, second, chunk_size=chunk_size)
        assert torch.equal(ahead, target_ranks(queries, gallery, first, chunk_size=chunk_size) + 1)


def test_scale_of_the_embeddings_does_not_matter():
    queries, gallery, picks = problem(9, 20)
    scaled = gallery * torch.linspace(0.1, 40, 20)[:, None]
    assert torch.equal(target_ranks(queries, gallery, picks[:, 0]), target_ranks(queries * 3, scaled, picks[:, 0]))


def test_recall_equals_counts_by_hand():
    ranks = torch.tensor([0, 1, 4, 5])
    assert recall_at_k(ranks, [1, 2, 5, 6]) == {1: 0.25, 2: 0.5, 5: 0.75, 6: 1.0}
    metrics = METRICS["cirr"].means({"rank": ranks.tolist(), "subset_rank": [0, 0, 1, 2]})
    assert metrics == {
        "recall@1": 0.25,
        "recall@5": 0.75,
        "recall@10": 1.0,
        "recall@50": 1.0,
        "recall_subset@1": 0.5,
        "recall_subset@2": 0.75,
        "recall_subset@3": 1.0,
        "mean": 0.625,
        "mean_of_seven": (0.25 + 0.75 + 1 + 1 + 0.5 + 0.75 + 1) / 7,
    }
    assert list(METRICS["cirr"].means({"rank": ranks})) == ["recall@1", "recall@5", "recall@10", "recall@50"]
    fashioniq = METRICS["fashioniq"].means({"rank": (9, 10, 49, 50)})
    assert fashioniq == {"recall@10": 0.25, "recall@50": 0.75, "mean": 0.5}
    assert METRICS["fashioniq"].values({"rank": (9, 10, 49, 50)}) == {
        "recall@10": [1, 0, 0, 0],
        "recall@50": [1, 1, 1, 0],
        "mean": [1, 0.5, 0.5, 0],
    }


def test_circo_metrics_equal_counts_by_hand():
    # Ranks of the positives: 1, 3 and 7; 6; 1 and beyond the list.
    ranks = torch.tensor([[6, 0, 2], [5, -1, -1], [0, NOT_RETRIEVED, -1]])
    at_5, at_10 = [(1 + 2 / 3) / 3, 0, 1 / 2], [(1 + 2 / 3 + 3 / 7) / 3, 1 / 6, 1 / 2]
    values = average_precision_at_k(ranks, [1, 5, 10])
    assert {k: v.tolist() for k, v in values.items()} == {
        1: [1, 0, 1],
        5: pytest.approx(at_5, rel=MEAN_ERROR),
        10: pytest.approx(at_10, rel=MEAN_ERROR),
    }
    circo = METRICS["circo"]
    per_query = {"rank": ranks[:, 0].tolist(), **circo.precisions(ranks)}
    expected = {
        "map@5": pytest.approx(sum(at_5) / 3, rel=MEAN_ERROR),
        **{f"map@{k}": pytest.approx(sum(at_10) / 3, rel=MEAN_ERROR) for k in (10, 25, 50)},
        **{f"recall@{k}": hits / 3 for k, hits in zip((5, 10, 25, 50), (1, 3, 3, 3), strict=True)},
    }
    assert circo.means(per_query) == expected
    per_query["semantic_aspects"] = [["negation", "cardinality"], [], ["negation", "negation"]]
    expected |= {
        "map@10/cardinality": pytest.approx(at_10[0], rel=MEAN_ERROR),
        "map@10/negation": pytest.approx((at_10[0] + 0.5) / 2, rel=MEAN_ERROR),
    }
    assert circo.means(per_query) == expected
    assert list(circo.means(per_query))[-2:] == ["map@10/cardinality", "map@10/negation"]
    assert circo.values(per_query)["map@10/negation"] == [values[10][0], values[10][2]]


def test_ranked_lists_equal_embeddings():
    queries, gallery, picks = problem(11, 23)
    target, excluded = picks[:, 0], picks[:, 1]

    def ids(index):
        return [[f"image {i}" for i in row] for row in index.reshape(11, -1).tolist()]

    ranked, reference = ids(top_k(queries, gallery, 23)[1]), [row[0] for row in ids(excluded)]
    several = ranks_from_lists(ranked, ids(picks[:, ::2]), reference)
    assert torch.equal(several, positive_ranks(queries, gallery, picks[:, ::2], excluded))
    among = ranks_from_lists(ranked, ids(target), reference, ids(picks))
    assert torch.equal(among[:, 0], subset_ranks(queries, gallery, picks, target, excluded))
    whole, short = (ranks_from_lists([row[:n] for row in ranked], ids(target)) for n in (23, 7))
    assert torch.equal(short, whole.where(whole < 7, NOT_RETRIEVED)) and (whole >= 7).any()
    assert ranks_from_lists([["a"], ["b", "c"]], [["a"], ["d", "c"]]).tolist() == [[0, -1], [NOT_RETRIEVED, 1]]


# ---- numbers of the public reference ----


def reference_case(case):
    """Return scores and indices of a fixture case; a name that is not in the gallery becomes -1."""
    position = {name: i for i, name in reversed(list(enumerate(case["index_names"])))}
    scores = -torch.tensor(case["distances"], dtype=torch.float32)
    target = torch.tensor([position.get(name, -1) for name in case["targets"]])
    if case["dataset"] == "fiq":
        return scores, target, None, None
    excluded = torch.tensor([position.get(name, -1) for name in case["references"]])
    subset = torch.tensor([[position[name] for name in row] for row in case["members"]])
    return scores, target, excluded, subset


def cases(select):
    return [pytest.param(case, id=case["name"]) for case in FIXTURE["cases"] if select(case)]


@pytest.mark.parametrize("case", cases(lambda c: "outcome" not in c and "note" not in c))
def test_recalls_equal_the_reference(case):
    scores, target, excluded, subset = reference_case(case)
    ranks = ranks_from_scores(scores, target, excluded)
    if case["dataset"] == "fiq":
        metrics = METRICS["fashioniq"].means({"rank": ranks})
    else:
        in_subset = ranks_from_scores(scores, target, excluded, subset)
        metrics = METRICS["cirr"].means({"rank": ranks, "subset_rank": in_subset})
        assert 100 * metrics["mean_of_seven"] == pytest.approx(
            sum(case["expected"].values()) / 7, abs=TOLERANCES["metrics"]
        )
    renamed = {k.replace("recall_subset@", "group_recall_at").replace("@", "_at"): v for k, v in metrics.items()}
    assert {k: 100 * renamed[k] for k in case["expected"]} == pytest.approx(
        case["expected"], abs=TOLERANCES["metrics"]
    )
    bounds = case.get("target_rank_best_worst") or case["target_rank_best_worst_after_dropping_reference"]
    best, worst = (ranks_from_scores(scores, target, excluded, ties=ties) for ties in ("best", "worst"))
    assert [[b + 1, w + 1] for b, w in zip(best.tolist(), worst.tolist(), strict=True)] == bounds
    assert (best <= ranks).all() and (ranks <= worst).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("error_target_is_reference", "query 0: its target .* is also its excluded image"),
        ("error_target_not_in_members", "query 0: its target .* is not in its subset"),
        ("error_reference_not_in_gallery", "exclude_index of query 0 is -1, outside the gallery of 12"),
        ("error_target_not_in_gallery", "target_index of query 0 is -1, outside the gallery of 12"),
        ("error_duplicate_member", r"subset_index of query 0 is \[3, 3, .* repeats a member"),
    ],
)
def test_inputs_the_reference_rejects_raise(name, message):
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == name)
    scores, target, excluded, subset = reference_case(case)
    with pytest.raises(ValueError, match=message):
        ranks_from_scores(scores, target, excluded, subset)


def test_a_subset_may_lack_the_reference():
    # The reference code needs rows of equal length after dropping the reference image, and fails in a reshape.
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == "error_one_query_members_without_reference")
    ranks = ranks_from_scores(*reference_case(case))
    assert (ranks >= 0).all() and (ranks < 6).all()


def test_a_gallery_name_listed_twice_cannot_lift_recall_above_one():
    # The reference code counts both positions of the name and returns 150 percent; here a target is one position.
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == "fiq_duplicate_gallery_names")
    scores, target, *_ = reference_case(case)
    assert recall_at_k(ranks_from_scores(scores, target), [10]) == {10: 1.0}


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in FIXTURE["cirr_test_submissions"]])
def test_top_k_equals_the_reference_submission(case):
    names, members = case["index_names"], case["members"]
    queries, gallery = torch.tensor(case["predicted_features"]), torch.tensor(case["index_features"])
    excluded = torch.tensor([names.index(name) for name in case["references"]])
    _, best = top_k(queries, gallery, len(names) - 1, excluded)
    for pair, row, group in zip(case["pair_ids"], best, members, strict=True):
        ranked = [names[i] for i in row]
        assert ranked[:50] == case["recall_submission"][str(pair)]
        assert [name for name in ranked if name in group][:3] == case["recall_subset_submission"][str(pair)]


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery_embeds": torch.ones(4, 3)}, "query_embeds are 2 wide and gallery_embeds 3"),
        ({"query_embeds": torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])}, "query_embeds hold NaN.*query 1"),
        ({"gallery_embeds": torch.tensor([[1.0, torch.inf]] * 4)}, "gallery_embeds hold NaN or infinity.*gallery 0"),
        ({"query_embeds": torch.ones(2)}, r"query_embeds must have shape \(rows, width\).*got \(2,\)"),
        ({"target_index": torch.tensor([0, 4])}, "target_index of query 1 is 4, outside the gallery of 4"),
        ({"target_index": torch.tensor([0])}, r"target_index must have shape \(2,\)"),
        ({"exclude_index": torch.tensor([1, -1])}, "exclude_index of query 1 is -1"),
        ({"exclude_index": torch.tensor([1, 1])}, "query 1: its target 1 is also its excluded image"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"ties": "none"}, r"ties='none': choose one of \('gallery order', 'best', 'worst'\)"),
    ],
)
def test_invalid_embeddings_raise(change, message):
    inputs = {"query_embeds": torch.eye(2), "gallery_embeds": torch.ones(4, 2), "target_index": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        target_ranks(**(inputs | change))


def test_invalid_subsets_scores_and_cutoffs_raise():
    scores, target = torch.zeros(2, 4), torch.tensor([0, 1])
    for subset in (torch.tensor([[0, 4], [1, 2]]), torch.tensor([[0, -2], [1, 2]])):
        with pytest.raises(ValueError, match="subset_index of query 0 .* gallery of 4"):
            ranks_from_scores(scores, target, subset_index=subset)
    with pytest.raises(ValueError, match="query 1: its target 1 is not in its subset"):
        ranks_from_scores(scores, target, subset_index=torch.tensor([[0, -1], [2, -1]]))
    with pytest.raises(ValueError, match=r"subset_index must have shape \(2, members\)"):
        ranks_from_scores(scores, target, subset_index=target)
    with pytest.raises(ValueError, match="scores of query 1 hold NaN"):
        ranks_from_scores(torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="ranks is empty"):
        recall_at_k(torch.tensor([], dtype=torch.int64), [1])
    with pytest.raises(ValueError, match=r"at least 1, got \[0\]"):
        recall_at_k(target, [0, 1])
    with pytest.raises(ValueError, match=r"ranks must have shape \(queries,\) and be 0 or more"):
        recall_at_k(torch.tensor([1, -1]), [1])
    with pytest.raises(ValueError, match="one value per query.*'rank': 2, 'subset_rank': 1"):
        METRICS["cirr"].means({"rank": target, "subset_rank": target[:1]})
    precisions = METRICS["circo"].precisions(target[:, None])
    with pytest.raises(ValueError, match="one value per query.*'rank': 1, 'average_precision@5': 2"):
        METRICS["circo"].means({"rank": target[:1], **precisions})
    with pytest.raises(ValueError, match="one value per query.*'semantic_aspects': 1"):
        METRICS["circo"].values({"rank": target, **precisions, "semantic_aspects": [["negation"]]})
    for nothing in ({}, {"rank": []}):
        with pytest.raises(ValueError, match="at least one query"):
            METRICS["fashioniq"].means(nothing)
    with pytest.raises(ValueError, match=r"unknown metrics 'micro'; .* \['cirr', 'fashioniq', 'circo', 'icir', "):
        metrics_named("micro")


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        ([[0, 1], [2, 4]], r"positive_index of query 1 is \[2, 4\]: members must lie in the gallery of 4"),
        ([[0, 1], [2, 2]], "positive_index of query 1 .* repeats a member"),
        ([[0, 1], [-1, -1]], "positive_index of query 1 holds no position"),
        ([[0, 1], [2, 3]], "query 1: its target 3 is also its excluded image"),
        ([[0, 1]], r"positive_index must have shape \(2, members\), got \(1, 2\)"),
    ],
)
def test_invalid_positives_raise(positives, message):
    with pytest.raises(ValueError, match=message):
        positive_ranks(torch.eye(2), torch.ones(4, 2), torch.tensor(positives), torch.tensor([2, 3]))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[0, 1], [2, 2]], r"ranks of query 1 are \[2, 2\]: two positives cannot share a rank"),
        ([[0, 1], [-1, -1]], "query 1 has no positive"),
        ([0, 1], r"ranks must have shape \(queries, positives\)"),
        ([[], []], r"ranks must have shape \(queries, positives\)"),
    ],
)
def test_invalid_ranks_of_positives_raise(ranks, message):
    with pytest.raises(ValueError, match=message):
        map_at_k(torch.tensor(ranks), [5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranked": [["a", "b"], []]}, "query 1: its ranked list is empty"),
        ({"ranked": [["a", "b"], ["b", "c", "b"]]}, "query 1: its ranked list repeats 'b'"),
        ({"positives": [["a"], []]}, "query 1: its list of positives is empty"),
        ({"positives": [["a"], ["b", "b"]]}, "query 1: its list of positives repeats 'b'"),
        ({"positives": [["a"], [7]]}, r"query 1: its ids are of types \['int', 'str'\]"),
        ({"exclude": ["b", 3]}, r"query 1: its ids are of types \['int', 'str'\]"),
        ({"exclude": ["b", "c"]}, "query 1: its target 'c' is also its excluded image"),
        ({"subsets": [["a", "b"], ["a", "b"]]}, "query 1: its target 'c' is not in its subset"),
        ({"exclude": ["b"]}, "one row per query, .* 'exclude': 1"),
        ({"ranked": [], "positives": []}, "at least one query"),
    ],
)
def test_invalid_ranked_lists_raise(change, message):
    lists = {"ranked": [["a", "b"], ["b", "c"]], "positives": [["a"], ["c"]]}
    with pytest.raises(ValueError, match=message):
        ranks_from_lists(**(lists | change))


def test_k_beyond_the_gallery_names_both_numbers():
    queries, gallery = torch.eye(2), torch.ones(4, 2)
    assert top_k(queries, gallery, 4)[1].tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="k is 5, but each query has 4"):
        top_k(queries, gallery, 5)
    with pytest.raises(ValueError, match="k is 4, but each query has 3"):
        top_k(queries, gallery, 4, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="k is 0"):
        top_k(queries, gallery, 0)
