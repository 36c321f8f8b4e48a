"""How far rounding may move a result, whatever the processor: the tolerances of the tests are made of these bounds.

A test compares with a truth in float64, and allows what floating-point arithmetic allows: roundings of half a unit in
the last place, times the terms that are summed, times the condition of what follows (Higham, "Accuracy and Stability
of Numerical Algorithms", chapters 3 and 4). Such a bound holds for every order of summation, so for every processor,
kernel and number of threads, and it says nothing of what one of them gave.
"""

import copy
from functools import cache, partial
from typing import NamedTuple

import torch
from squares import QUERIES, draw
from tiny import make_model, make_processor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModel, AutoProcessor


def roundoff(dtype=torch.float32):
    """Returns the largest relative error of one rounding: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def dot_error(terms, dtype=torch.float32):
    """Returns the bound of a dot product's error in units of `|x| . |y|`, which is at most 1 for unit vectors."""
    return terms * roundoff(dtype) / (1 - terms * roundoff(dtype))


UNDERFLOW = torch.finfo(torch.float32).tiny
"""What a processor may take for zero."""

MEAN_ERROR = dot_error(100, torch.float64)
"""The relative error of a mean in float64 of up to a hundred numbers, none of them negative."""


def unit_error(width, dtype=torch.float32):
    """Returns the bound of a normalised row's relative error, and of what a norm computed of it is away from 1.

    Of the norm's `width` squares half the error remains under the root; the root, the division and two casts round.
    """
    return dot_error(width + 4, dtype)


# --- the loss -------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """The loss and its gradients, or the bounds of their errors."""

    value: Tensor
    queries: Tensor
    targets: Tensor


def exact_loss(queries, targets, temperature=0.01, alpha=1.0, gamma=2.0, positives=None, target_ids=None):
    """Computes equations 14-15 in float64, and what float32 may be off by.

    An error of the cosines is divided by the temperature. How it goes on, to the loss by the gradient in the logits
    and to that gradient by its own derivative, is computed at the very point; `e^(2 d)` bounds by how much a softmax
    changes while its logits move by d.

    Returns:
        Two [`Loss`]: the truth, and the bound of each number's error in float32.
    """
    u, (batch, width), count = roundoff(), queries.shape, len(targets)
    queries, targets = queries.detach().double(), targets.detach().double()
    own = torch.arange(batch) if positives is None else positives
    logits = queries @ targets.T / temperature
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if target_ids is not None:
        left_out = (target_ids[own][:, None] == target_ids).scatter(1, own[:, None], False)
    logits = logits.masked_fill(left_out, -1e9)  # e^-1e9 is 0

    def one(logits, own):
        log_p = logits.log_softmax(dim=0).gather(0, own[None])[0]
        return -alpha * (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny) ** gamma * log_p

    losses = torch.func.vmap(one)(logits, own)
    slopes = torch.func.vmap(torch.func.grad(one))(logits, own)  # (batch, count), of each row's loss in its logits
    bends = torch.func.vmap(torch.func.jacrev(torch.func.grad(one)))(logits, own)  # (batch, count, count)
    truth = Loss(losses.mean(), slopes @ targets / temperature / batch, slopes.T @ queries / temperature / batch)

    # Logits: the cosine, the division by a rounded temperature, x - max. The logarithm: a sum of exponentials.
    sizes = logits.abs().masked_fill(left_out, 0).amax(dim=1, keepdim=True)
    moved = dot_error(width) * (queries.abs() @ targets.abs().T) / temperature + 4 * u * sizes
    moved = moved.masked_fill(left_out, 0)
    worse = torch.exp(2 * moved.amax(dim=1))
    log_p = logits.log_softmax(dim=1).gather(1, own[:, None])
    rounded = u * (count + 4 + 2 * log_p.abs())

    def outer(log_p):
        """The loss's slope in log p, of which every logit's is a part."""
        miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny)
        return alpha * (miss**gamma - gamma * miss ** (gamma - 1) * log_p.exp() * log_p)

    slope, ends = outer(log_p), [outer((log_p + end).clamp_max(0)) for end in (rounded, -rounded)]
    # Where p is 1 but for rounding, a power below 1 may be anything between these two.
    slope_off = torch.stack([(end - slope).abs() for end in ends]).amax(dim=0) + u * (2 * gamma + 15) * slope
    p, is_own = logits.softmax(dim=1), torch.nn.functional.one_hot(own, count)
    off = worse * (slopes.abs() * moved).sum(dim=1) + u * (2 * gamma + 6 + batch) * losses
    largest = torch.stack([slope, *ends]).amax(dim=0)
    off += (largest * rounded).squeeze(1)
    slopes_off = worse[:, None] * (bends.abs() @ moved[:, :, None]).squeeze(2) + (is_own + p) * (u * largest)
    slopes_off += (is_own - p).abs() * slope_off + UNDERFLOW * (1 + largest)
    bound = Loss(
        off.mean() + UNDERFLOW,
        (slopes_off + dot_error(count + 3) * slopes.abs()) @ targets.abs() / temperature / batch + count * UNDERFLOW,
        (slopes_off + dot_error(batch + 3) * slopes.abs()).T @ queries.abs() / temperature / batch + batch * UNDERFLOW,
    )
    return truth, bound


# --- a whole model --------------------------------------------------------------------------------------------------

MOVES = frozenset(
    """alias cat clamp_min clone copy_ detach embedding gather index masked_fill masked_fill_ neg relu select_backward
    slice_backward stack threshold_backward _unsafe_view where""".split()
)
"""Operations that round nothing; others are taken to round, and views are known by their schema."""


def operation_errors(name, function, args, kwargs, outs):
    """Returns the standard deviation, or more, of what each output of an operation of PyTorch is off by in float32.

    A rounding of y is off by at most u |y|, evenly: its standard deviation is `u |y| / sqrt(3)`. The k-th partial sum
    of n terms t, whose signs follow no order, has the mean square `(k/n)^2 y^2 + (k/n) (1 - k/n) sum(t^2)`, less than
    a third of `y^2 + sum(t^2)` over all k: n additions make `u sqrt(n (y^2 + sum(t^2))) / 3`. Vectors and blocks add
    in fewer steps, and so make less.
    """
    u = roundoff() / 3**0.5
    tensors = [a for a in args if isinstance(a, Tensor)]

    def squares():
        """Returns the operation of squared inputs: the sum of its terms' squares."""
        found = function(*(a**2 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **kwargs)
        return found if isinstance(found, (tuple, list)) else [found]

    def row(dim):
        return u * (tensors[0].shape[dim] ** 0.5 + 4)

    if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
        whole = {"convolution": lambda: tensors[1][0].numel(), "convolution_backward": lambda: tensors[0].numel()}
        terms = whole.get(name, lambda: tensors[-1].shape[-2])() + 1
        return [
            u * (terms * (y**2 + q) / 3) ** 0.5 if y is not None else y for y, q in zip(outs, squares(), strict=True)
        ]
    if name in ("sum", "mean", "scatter_add", "index_put", "embedding_dense_backward", "_embedding_bag_forward_only"):
        terms = max(t.numel() for t in tensors) // outs[0].numel() + 2
        return [u * (terms * (outs[0] ** 2 + squares()[0]) / 3) ** 0.5]
    if name == "linalg_vector_norm":
        return [row(-1) * outs[0]]
    if name == "native_layer_norm":
        x, _, weight, bias = args[:4]
        size = (x**2).mean(dim=-1, keepdim=True).sqrt() * outs[2] * weight.abs()
        shift = 0 if bias is None else bias.abs()
        return [row(-1) * (size + shift + outs[0].abs()), row(-1) * outs[1].abs(), row(-1) * outs[2]]
    if name == "native_layer_norm_backward":
        grad, x, _, mean, rstd, weight = args[:6]
        normed, slope = (x - mean) * rstd, grad * weight
        parts = slope.abs() + slope.abs().mean(-1, True) + normed.abs() * (slope * normed).abs().mean(-1, True)
        rows = tuple(range(x.ndim - 1))
        long = u * (x[..., 0].numel() ** 0.5 + x.shape[-1] ** 0.5 + 4)
        in_weight = ((grad * (normed.abs() + 1)) ** 2).sum(rows) ** 0.5
        return [row(-1) * rstd * parts, long * in_weight, long * (grad**2).sum(rows) ** 0.5]
    if name in ("_softmax", "_safe_softmax", "_log_softmax"):
        x, dim = args[:2]
        off = row(dim) + 2 * u * (x - x.amax(dim=dim, keepdim=True)).abs()
        return [off + 2 * u * outs[0].abs() if name == "_log_softmax" else off * outs[0]]
    if name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        grad, out, dim = args[:3]
        p = out.exp() if name.startswith("_log") else out
        weighted = grad if name.startswith("_log") else grad * p
        return [row(dim) * ((grad if name.startswith("_log") else weighted).abs() + p * weighted.abs().sum(dim, True))]
    if name in ("gelu", "gelu_backward"):  # 1 + erf cancels
        return [2 * u * tensors[0].abs() * (1 if name == "gelu" else 1 + tensors[1].abs())]
    return [2 * u * y.abs() if isinstance(y, Tensor) else None for y in outs]


class Rounded(TorchDispatchMode):
    """Float64 in which each operation is off by what it may be off by in `dtype`, with random signs.

    In half precision every result is rounded; what the code computes in float32 then stays float32, unchanged.

    Args:
        dtype: what the code under test computes in.
        seed: of the signs; None for no errors, which gives the truth.
    """

    def __init__(self, dtype, seed):
        super().__init__()
        self.dtype, self.random = dtype, None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        if self.dtype == torch.float32 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        outs = out = function(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if self.random is None or is_view or name in MOVES:
            return out
        outs = out if isinstance(out, (tuple, list)) else [out]
        if not any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in outs):
            return out
        errors = [0 * out] if name == "_to_copy" else operation_errors(name, function, args, kwargs, outs)
        rounded = roundoff(self.dtype) / 3**0.5
        for one, error in zip(outs, errors, strict=False):
            if isinstance(one, Tensor) and one.dtype == torch.float64:
                self.move(one, error + (rounded * one.abs() if self.dtype != torch.float32 else 0))
        return out

    def move(self, tensor, error):
        """Adds an error of random sign, in place."""
        signs = 2 * torch.randint(0, 2, tensor.shape, generator=self.random, dtype=torch.float64) - 1
        tensor.add_((signs * error).nan_to_num(0, 0, 0))


def rounding(compute, model, inputs, dtype=torch.float32, stored=None, draws=8):
    """Returns how far apart two computations of the same may be, by output, when they add in different orders.

    No formula follows rounding through a network. So it is done in float64, where each operation is moved by what its
    error may be, with a random sign: the outputs then spread by the condition of all that follows. The bound is six
    standard deviations of a difference of two. It is met on every processor whose additions round, and whatever the
    order they are done in.

    Args:
        compute: from a model and its inputs to a dictionary of tensors.
        model: in float32; it is copied.
        inputs: of the model, in float32.
        dtype: what the code under test computes in. Half precision rounds weights and inputs too, and is compared
            with float32; errors in float64 are those of float32, in its units.
        stored: the half precision that the inputs, in float32, were kept in.
        draws: of the signs: 8 know a standard deviation within a quarter.

    Returns:
        a number for each output: of the element that spreads most.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    carried = dtype if half else torch.float32
    inputs = tree_map(lambda t: t.double() if t.is_floating_point() and not half else t, inputs)

    def run(seed):
        copied, rounded, random = copy.deepcopy(model).double(), Rounded(carried, seed), torch.random.get_rng_state()
        if half and seed is not None:
            for weight in copied.parameters():
                rounded.move(weight.data, roundoff(dtype) / 3**0.5 * weight.data.abs())
        given = tree_map(torch.clone, inputs)
        if stored is not None and seed is not None:
            for kept in (t for t in tree_leaves(given) if t.is_floating_point()):
                rounded.move(kept, roundoff(stored) / 3**0.5 * kept.abs())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), rounded:
            found = {name: out.detach().double() for name, out in compute(copied, given).items()}
        torch.random.set_rng_state(random)
        return found

    truth, moved = run(None), [run(seed) for seed in range(draws)]
    spread = {name: torch.stack([(run[name] - truth[name]) ** 2 for run in moved]).mean(dim=0) for name in truth}
    scale = roundoff(dtype) / roundoff(carried)
    return {name: 6 * scale * (2 * square.max()).sqrt().item() for name, square in spread.items()}


def embeds_of(model, inputs):
    """Returns what a model makes of its inputs: embeddings, tokens, cosines, and what else there is of the output."""
    output, found = model(**inputs), {}
    names = ("query_embeds", "target_embeds", "similarity", "aggregation_weights", "loss")
    found |= {name: output[name] for name in names if output.get(name) is not None}
    if "pixel_values" in inputs:
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        found |= {"image_embeds": image.pooler_output, "image_tokens": image.last_hidden_state}
        found |= {"text_embeds": text.pooler_output, "text_tokens": text.last_hidden_state}
        found["image_text_similarity"] = image.pooler_output @ text.pooler_output.T
        found["image_similarity"] = image.pooler_output @ image.pooler_output.T
    if model.config._attn_implementation == "eager":
        query = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        found["attentions"] = torch.stack(model.get_query_features(**query, output_attentions=True).attentions)
    return found


@torch.no_grad()
def embedding_error(model, inputs, dtype=torch.float32):
    """Returns [`rounding`] of [`embeds_of`]."""
    return rounding(embeds_of, model, inputs, dtype)


@cache
def squares_error(backbone="blip", dtype=torch.float32, checkpoint=None):
    """Returns [`embedding_error`] of nine squares, each a reference and a target, with nine captions.

    Of the toy model and its attention too; or of a checkpoint.
    """
    if checkpoint is None:
        model, processor = make_model(backbone), make_processor()
        model.set_attn_implementation({"": "eager"})
    else:
        model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    squares, captions = [draw(row) for row in range(9)], [caption for _, caption, _ in QUERIES]
    inputs = processor(images=squares, text=(captions * 2)[:9], target_images=squares)
    return embedding_error(model, dict(inputs), dtype)


def sgd(model, inputs, steps, rate, clip=5.0):
    """Returns the losses of some steps of plain SGD on one batch, and by name how far the weights have moved."""
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moves, losses = {name: torch.zeros_like(p) for name, p in trained.items()}, []
    for _ in range(steps):
        loss = model(**inputs).loss
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained.values(), strict=True)]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
        losses.append(loss.detach())
        for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
            move = gradient * (-rate * min(1.0, clip / norm))
            moves[name] = moves[name] + move
            weight.data.add_(move)
    return {"losses": torch.stack(losses), **moves}


def training_error(model, inputs, steps, rate, dtype=torch.float32, stored=None):
    """Returns how far apart two runs of the same steps of SGD may be: "losses", and the weights by name.

    Args:
        model: in train mode, its weights in float32.
        inputs: a batch like the others.
        steps: of SGD, each of which also rounds the weights.
        rate: of learning.
        dtype: of the autocast.
        stored: see [`rounding`].
    """
    error = rounding(partial(sgd, steps=steps, rate=rate), model, inputs, dtype, stored)
    for name, weight in model.named_parameters():
        if name in error:
            error[name] += 2 * steps * roundoff() * weight.abs().max().item()
    return error
