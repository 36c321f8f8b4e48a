"""Loss and ranks against float64 on adversarial inputs; training on a batch with NaN."""

from itertools import product

import pytest
import torch
from error_bounds import exact_loss, roundoff
from squares import square_triplets
from test_loss import slow_loss
from test_metrics import plain_ranking
from test_trainer import arguments
from torch.nn import functional as F

from pvlf_hf import PVLFTrainer, focal_info_nce
from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.evaluation.metrics import recall_at_k
from pvlf_hf.evaluation.ranking import target_ranks


def adversarial():
    """Return queries and targets by kind of difficulty; rows are unit vectors or zero."""
    random = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(7, 16, generator=random), dim=-1)
    nearly = F.normalize(rows[:1] + 1e-4 * torch.randn(7, 16, generator=random), dim=-1)
    two = rows[torch.tensor([0, 1, 0, 1, 0, 0, 1])]
    return {
        "identical": (rows[:1].repeat(7, 1), rows[:1].repeat(7, 1)),
        "zero vectors": (torch.zeros(7, 16), torch.zeros(7, 16)),
        "a zero query": (torch.cat([torch.zeros(1, 16), rows[1:]]), rows),
        "one query": (rows[:1], rows[1:2]),
        "found": (rows, rows),
        "opposite": (rows, -rows),
        "nearly identical": (nearly, nearly.flip(0)),
        "ties everywhere": (two, two.flip(0)),
    }


def plain_loss(queries, targets, temperature, gamma, ids):
    """Compute the loss as in the paper, in the inputs' dtype; `slow_loss` is the same, one number at a time."""
    logits = queries @ targets.T / temperature
    same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
    log_p = logits.masked_fill(same, -torch.inf).log_softmax(dim=-1).diagonal()
    miss = -torch.expm1(log_p)
    # Where p is 1 the loss and its gradient are 0; for a gamma below 1 autograd would return NaN.
    focal = torch.where(miss > 0, torch.where(miss > 0, miss, 1.0) ** gamma, 0.0 if gamma else 1.0)
    return (-focal * log_p).mean()


@pytest.mark.slow
@pytest.mark.reliability(
    7,
    "The loss and its gradient equal those in float64, also for identical, zero and tied embeddings, one "
    "query, bf16 and temperature 1e-4; the float64 gradient passes `gradcheck`",
    broken=(
        "src/pvlf_hf/models/loss_pvlf.py",
        "query_embeds.float() @ target_embeds.float().T",
        "(query_embeds @ target_embeds.T).float()",
    ),
)
def test_loss_equals_float64(figure):
    cases = 0
    choices = product([1.0, 0.01, 1e-4], [0.0, 0.5, 1.0, 2.0], [False, True], [torch.float32, torch.bfloat16])
    for temperature, gamma, shared, dtype in choices:
        for name, pair in adversarial().items():
            ids = torch.arange(len(pair[0])) // 3 if shared else torch.arange(len(pair[0]))
            ours = [side.to(dtype).clone().requires_grad_() for side in pair]
            theirs = [side.detach().double().requires_grad_() for side in ours]
            loss = focal_info_nce(*ours, temperature=temperature, gamma=gamma, target_ids=ids)
            expected = plain_loss(*theirs, temperature, gamma, ids)
            slow = slow_loss(*(side.detach() for side in theirs), temperature, gamma=gamma, target_ids=ids.tolist())
            _, error = exact_loss(*ours, temperature=temperature, gamma=gamma, target_ids=ids)
            finer = 2 * roundoff(torch.float64) / roundoff()  # difference of two float64 losses
            assert expected.item() == pytest.approx(slow, abs=finer * error.value.item()), name
            assert abs(loss.item() - expected.item()) <= error.value, (name, temperature, gamma)
            loss.backward()
            expected.backward()
            for a, b, bound in zip(ours, theirs, (error.queries, error.targets), strict=True):
                assert a.grad.isfinite().all(), name
                stored = roundoff(dtype) * (b.grad.abs() + bound)  # the gradient has the embeddings' dtype
                assert ((a.grad.double() - b.grad).abs() <= bound + stored).all(), (name, temperature, gamma)
            cases += 1
    random = torch.Generator().manual_seed(1)
    sides = [F.normalize(torch.randn(4, 6, generator=random).double(), dim=-1).requires_grad_() for _ in range(2)]
    for gamma, ids in product([0.0, 1.0, 2.0], [torch.arange(4), torch.tensor([0, 1, 0, 2])]):
        torch.autograd.gradcheck(lambda q, t, gamma=gamma, ids=ids: plain_loss(q, t, 0.1, gamma, ids), sides)
    figure(f"{cases} cases, gradients in all of them; 6 by `gradcheck`")


@pytest.mark.reliability(
    7,
    "Ranks, top-k and recall equal those of a plain float64 sort for identical, zero and tied embeddings, one "
    "query, bf16 and fp16; embeddings that are not finite are refused",
    broken=("src/pvlf_hf/evaluation/ranking.py", 'if ties != "best":', "if False:"),
)
def test_ranks_equal_float64(figure):
    cases = 0
    for (name, (queries, gallery)), dtype in product(
        adversarial().items(), (torch.float32, torch.bfloat16, torch.half)
    ):
        queries, gallery = queries.to(dtype), gallery.repeat(3, 1).to(dtype)
        target = torch.arange(len(queries)) + len(queries)  # the second of three equal images
        plain = [plain_ranking(query, gallery) for query in queries]
        ranks = [row.index(int(t)) for row, t in zip(plain, target, strict=True)]
        assert target_ranks(queries, gallery, target).tolist() == ranks, name
        assert top_k(queries, gallery, 3)[1].tolist() == [row[:3] for row in plain], name
        assert recall_at_k(torch.tensor(ranks), [5])[5] == pytest.approx(
            sum(r < 5 for r in ranks) / len(ranks), rel=2 * roundoff(torch.float64)
        )
        for bad in (torch.nan, torch.inf):
            broken = gallery.clone()
            broken[1, 2] = bad
            with pytest.raises(ValueError, match="not finite|NaN|finite"):
                target_ranks(queries, broken, target)
        cases += 1
    figure(f"{cases} cases")


@pytest.mark.slow
@pytest.mark.reliability(
    7,
    "A NaN in a batch stops training before the weights change; the error names the triplets, or the weights, "
    "that caused it",
    broken=("src/pvlf_hf/training/trainer.py", "if model.training and not loss.isfinite():", "if False:"),
)
def test_nan_stops_training(tiny_model, tiny_processor, tmp_path, figure):
    captions = {("red", "green"): "a cat"}
    triplets = square_triplets(tmp_path, ["red", "green", "blue"], lambda *pair: captions.get(pair, "make it red"))

    def train():
        args = arguments(tmp_path / "out", per_device_train_batch_size=6)
        PVLFTrainer(tiny_model, args, triplets, processing_class=tiny_processor).train()

    (words,) = (w for name, w in tiny_model.named_parameters() if name.endswith("word_embeddings.weight"))
    with torch.no_grad():
        words[tiny_processor.tokenizer.convert_tokens_to_ids("cat")] = torch.nan
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step 1 is nan: 1 of 6 triplets .* target_id \['green'\]; check their"):
        train()
    for name, weight in tiny_model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        words.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"6 of 6 triplets .*'red'.* all of them, so the weights are to blame"):
        train()
    figure("1 triplet of 6 named; all 6, with the weights to blame")
