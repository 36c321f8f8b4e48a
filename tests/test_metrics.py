"""`metrics.py` against a plain sort of every row, and against the numbers of the public reference."""

import json
from pathlib import Path

import pytest
import torch

from pvlf_hf.metrics import cirr_metrics, ranks_from_scores, recall_at_k, subset_ranks, target_ranks, top_k

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "metrics.json").read_text())


def plain_ranking(query, gallery, excluded=None):
    """Gallery positions of one query, best first: what every function must agree with."""

    def cosine(image):
        a, b = query.double(), image.double()
        return (a @ b / (a.norm() * b.norm()).clamp(min=1e-12)).float().item()

    scores = [cosine(image) for image in gallery]
    return [i for i in sorted(range(len(gallery)), key=lambda i: -scores[i]) if i != excluded]  # sorted() is stable


def problem(num_queries, gallery_size, width=5, levels=None, dtype=torch.float32, seed=0):
    """Random embeddings; with `levels`, of so few distinct rows that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(levels or gallery_size, width, generator=generator).to(dtype)
    gallery = rows[torch.randint(len(rows), (gallery_size,), generator=generator)] if levels else rows
    queries = torch.randn(num_queries, width, generator=generator).to(dtype)
    # three different positions a query: target, excluded, other member
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
        assert subset_ranks(queries, gallery, subset, target, excluded, **kwargs).tolist() == positions(restricted)
        scores, found = top_k(queries, gallery, 22, excluded, **kwargs)
        assert found.tolist() == without
        assert scores.dtype == torch.float32 and (scores.diff(dim=1) <= 0).all()
        assert top_k(queries, gallery, 7, **kwargs)[1].tolist() == [row[:7] for row in plain]


def test_equal_gallery_rows_tie_exactly_whatever_the_chunk():
    # In float32 the products of equal rows differ in the last bit, by column and by the number of queries at a time.
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


def test_recall_counts_by_hand():
    ranks = torch.tensor([0, 1, 4, 5])
    assert recall_at_k(ranks, [1, 2, 5, 6]) == {1: 0.25, 2: 0.5, 5: 0.75, 6: 1.0}
    metrics = cirr_metrics(ranks, subset_ranks=torch.tensor([0, 0, 1, 2]))
    assert metrics == {
        "recall@1": 0.25,
        "recall@5": 0.75,
        "recall@10": 1.0,
        "recall@50": 1.0,
        "recall_subset@1": 0.5,
        "recall_subset@2": 0.75,
        "recall_subset@3": 1.0,
        "mean": 0.625,
    }
    assert list(cirr_metrics(ranks)) == ["recall@1", "recall@5", "recall@10", "recall@50"]


# ---- the public reference's numbers ----


def reference_case(case):
    """Scores and indices of a fixture case; a name that is not in the gallery becomes -1."""
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
        ours = {f"recall_at{k}": recall for k, recall in recall_at_k(ranks, [10, 50]).items()}
    else:
        metrics = cirr_metrics(ranks, ranks_from_scores(scores, target, excluded, subset))
        ours = {k.replace("recall_subset@", "group_recall_at").replace("@", "_at"): v for k, v in metrics.items()}
    assert {k: 100 * ours[k] for k in case["expected"]} == pytest.approx(case["expected"], abs=1e-4)
    bounds = case.get("target_rank_best_worst") or case["target_rank_best_worst_after_dropping_reference"]
    assert all(best <= rank + 1 <= worst for rank, (best, worst) in zip(ranks.tolist(), bounds, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("error_target_is_reference", "query 0: its target .* is also its excluded image"),
        ("error_target_not_in_members", "query 0: its target .* is not in its subset"),
        ("error_reference_not_in_gallery", "exclude_index of query 0 is -1, outside the gallery of 12"),
        ("error_target_not_in_gallery", "target_index of query 0 is -1, outside the gallery of 12"),
        ("error_duplicate_member", "query 0: its subset .* repeats a member"),
    ],
)
def test_what_the_reference_rejects_is_rejected_with_a_reason(name, message):
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == name)
    scores, target, excluded, subset = reference_case(case)
    with pytest.raises(ValueError, match=message):
        ranks_from_scores(scores, target, excluded, subset)


def test_one_query_without_its_reference_among_the_members_is_fine_here():
    # The reference code needs rows of equal length after dropping the reference and fails in a reshape.
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == "error_one_query_members_without_reference")
    ranks = ranks_from_scores(*reference_case(case))
    assert (ranks >= 0).all() and (ranks < 6).all()


def test_a_gallery_name_listed_twice_cannot_lift_recall_above_one():
    # The reference counts both positions of the name and arrives at 150 percent; a target is one position here.
    (case,) = (c for c in FIXTURE["cases"] if c["name"] == "fiq_duplicate_gallery_names")
    scores, target, *_ = reference_case(case)
    assert recall_at_k(ranks_from_scores(scores, target), [10]) == {10: 1.0}


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in FIXTURE["cirr_test_submissions"]])
def test_top_k_equals_the_reference_submission(case):
    names, members = case["index_names"], case["members"]
    queries, gallery = torch.tensor(case["predicted_features"]), torch.tensor(case["index_features"])
    excluded = torch.tensor([names.index(name) for name in case["references"]])
    _, found = top_k(queries, gallery, len(names) - 1, excluded)
    for pair, row, group in zip(case["pair_ids"], found, members, strict=True):
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
    ],
)
def test_bad_inputs_are_named(change, message):
    inputs = {"query_embeds": torch.eye(2), "gallery_embeds": torch.ones(4, 2), "target_index": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        target_ranks(**(inputs | change))


def test_bad_subsets_scores_and_cut_offs_are_named():
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
    with pytest.raises(ValueError, match="2 queries and subset_ranks 1"):
        cirr_metrics(target, target[:1])


def test_k_beyond_the_gallery_names_both_numbers():
    queries, gallery = torch.eye(2), torch.ones(4, 2)
    assert top_k(queries, gallery, 4)[1].tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="k is 5, but each query has 4"):
        top_k(queries, gallery, 5)
    with pytest.raises(ValueError, match="k is 4, but each query has 3"):
        top_k(queries, gallery, 4, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="k is 0"):
        top_k(queries, gallery, 0)
