"""`training/cpu_dropout.py`: equivalent to PyTorch's dropout, in training only, and removed afterwards."""

import pytest
import torch
from error_bounds import roundoff
from tiny import make_inputs, make_model
from torch import nn

from pvlf_hf.training.cpu_dropout import FastDropout, fast_cpu_dropout, fast_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fast_dropout_keeps_rate_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    states = torch.rand(250_001, 3).add(0.5).to(dtype).requires_grad_()  # no zeros, no multiple of four
    out = fast_dropout(states, p, training=True)
    (gradient,) = torch.autograd.grad(out.sum(), states)
    kept = out != 0
    for given, wanted in ((out[kept], states[kept] / (1 - p)), (gradient, kept / (1 - p))):
        # 1 / (1 - p), the product and the expected value, each rounded
        torch.testing.assert_close(given, wanted.to(dtype), rtol=4 * roundoff(dtype), atol=0)
    shares = kept.flatten()[:750_000].view(-1, 4).double()  # the four numbers of one draw are independent, too
    assert ((shares.mean(dim=0) - (1 - p)).abs() < 5 * (p * (1 - p) / len(shares)) ** 0.5).all()
    assert (torch.corrcoef(shares.T) - torch.eye(4)).abs().max() < 5 / len(shares) ** 0.5
    again = [fast_dropout(states, p, training=True) for _ in range(2) if torch.manual_seed(0)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], fast_dropout(states, p, training=True))
    for share, training in ((p, False), (0.0, True)):
        assert fast_dropout(states, share, training) is states
    assert not fast_dropout(states, 1.0, training=True).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", ["blip", "clip"])
def test_fast_dropout_is_swapped_in_only_for_training(backbone, attention):
    model, inputs = make_model(backbone, dropout=0.5), make_inputs(backbone)
    model.set_attn_implementation(attention)
    before, kept = model(**inputs).loss, model.state_dict()
    with fast_cpu_dropout(model):
        assert model.config._attn_implementation != attention
        assert not any(type(module) is nn.Dropout for module in model.modules())
        assert any(type(module) is FastDropout for module in model.modules())
        assert torch.equal(model(**inputs).loss, before), "without dropout nothing changes"
        assert model.state_dict().keys() == kept.keys()
        assert not torch.equal(model.train()(**inputs).loss, before)
        text = model.config.to_json_string()
    assert not any(type(module) is FastDropout for module in model.modules())
    assert "fast" not in text, "what is saved amid training loads without this package"
    assert model.config._attn_implementation == attention and model.training
    assert torch.equal(model.eval()(**inputs).loss, before)
