"""Bounds of rounding errors that hold on every processor; the tests compute their tolerances from them.

A test compares with a float64 reference and allows for floating-point rounding: half a unit in
the last place, times the summed terms, times the condition of later operations (Higham, "Accuracy and Stability
of Numerical Algorithms", chapters 3 and 4). Such a bound holds for every order of summation, so for every processor,
kernel and number of threads; it is not a difference measured on one of them.
"""

import copy
from functools import cache, partial
from typing import NamedTuple

import torch
from squares import QUERIES, draw
from tiny import make_model, make_processor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModel, AutoProcessor


def roundoff(dtype=torch.float32):
    """Return the largest relative error of one rounding: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def dot_error(terms, dtype=torch.float32):
    """Return the bound of a dot product's error, in units of `|x| . |y|`, which is at most 1 for unit vectors."""
    return terms * roundoff(dtype) / (1 - terms * roundoff(dtype))


UNDERFLOW = torch.finfo(torch.float32).tiny
"""What a processor may take for zero."""

MEAN_ERROR = dot_error(100, torch.float64)
"""The relative error of a mean in float64 of up to a hundred numbers, none of them negative."""


def unit_error(width, dtype=torch.float32):
    """Return the bound of a normalised row's relative error, which also bounds how far its computed norm is from 1.

    The square root halves the error of the norm's sum of `width` squares; the root, the division and two casts round.
    """
    return dot_error(width + 4, dtype)


# --- the loss -------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """Loss and gradients, or the bounds of their errors."""

    value: Tensor
    queries: Tensor
    targets: Tensor


def exact_loss(queries, targets, temperature=0.01, alpha=1.0, gamma=2.0, positives=None, target_ids=None):
    """Compute equations 14-15 in float64, and the error bounds of float32.

    An error of the cosines is divided by the temperature. Its effect on the loss (through the gradient in the logits)
    and on that gradient (through its derivative) is computed at the inputs; `e^(2 d)` bounds by how much a softmax
    changes while its logits move by d.

    Returns:
        Two [`Loss`]: the reference, and the error bound of each number in float32.
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
    # (batch, count), gradient of each row's loss in its logits
    slopes = torch.func.vmap(torch.func.grad(one))(logits, own)
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
        """Return the derivative of the loss in log p, a factor of its derivative in every logit."""
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
    """Return an upper bound of the standard deviation of each output's float32 error in a PyTorch operation.

    A rounding error of y is uniform within u |y|: its standard deviation is `u |y| / sqrt(3)`. The k-th partial sum
    of n terms t with random signs has the mean square `(k/n)^2 y^2 + (k/n) (1 - k/n) sum(t^2)`, less than
    a third of `y^2 + sum(t^2)` over all k: n additions make `u sqrt(n (y^2 + sum(t^2))) / 3`. Vectors and blocks add
    in fewer steps, so their error is smaller.
    """
    u = roundoff() / 3**0.5
    tensors = [a for a in args if isinstance(a, Tensor)]

    def squares():
        """Return the operation applied to squared inputs, which is the sum of its terms' squares."""
        found = function(*(a**2 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **kwargs)
        return found if isinstance(found, (tuple, list)) else [found]

    def row(dim):
        return u * (tensors[0].shape[dim] ** 0.5 + 4)

    if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
        whole = {"convolution": lambda: tensors[1][0].numel(), "convolution_backward": lambda: tensors[0].numel()}
        terms = whole.get(name, lambda: tensors[-1].shape[-2])() + 1
        return [y if y is None else _size(y, q, u, terms) for y, q in zip(outs, squares(), strict=True)]
    if name in ("sum", "mean", "scatter_add", "index_put", "embedding_dense_backward", "_embedding_bag_forward_only"):
        terms = max(t.numel() for t in tensors) // outs[0].numel() + 2
        return [_size(outs[0], squares()[0], u, terms)]
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


def _size(sums, squares, u, terms):
    """Return `u sqrt(terms (sums^2 + squares)) / sqrt(3)`."""
    return sums.square().add_(squares).mul_(terms / 3).sqrt_().mul_(u)


@cache
def _signs():
    """Return the eight signs that each byte stands for, float64 `(256, 8)`."""
    return 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1).double() - 1


@cache
def _is_view(function):
    return any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)


class Rounded(TorchDispatchMode):
    """Float64 arithmetic in which each operation gets a random error of the size that `dtype` allows.

    In half precision every result is rounded; what the code computes in float32 stays in float32.

    Args:
        dtype: dtype that the code under test computes in.
        seed: seed of the signs; None for no errors, which gives the reference.
    """

    def __init__(self, dtype, seed):
        super().__init__()
        self.dtype, self.random = dtype, None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        if self.dtype == torch.float32 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        outs = out = function(*args, **kwargs)
        if self.random is None or name in MOVES or _is_view(function):
            return out
        outs = out if isinstance(out, (tuple, list)) else [out]
        if not any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in outs):
            return out
        errors = [0 * out] if name == "_to_copy" else operation_errors(name, function, args, kwargs, outs)
        rounded = roundoff(self.dtype) / 3**0.5
        for one, error in zip(outs, errors, strict=False):
            if isinstance(one, Tensor) and one.dtype == torch.float64:
                self.move(one, error if self.dtype == torch.float32 else error + rounded * one.abs())
        return out

    def move(self, tensor, error):
        """Add an error of random sign, in place."""
        # Eight signs a number take half the time of drawing each.
        drawn = torch.randint(0, 256, (-(-tensor.numel() // 8),), generator=self.random)
        signs = _signs()[drawn].flatten()[: tensor.numel()].view(tensor.shape)
        tensor.addcmul_(signs, error.nan_to_num(0, 0, 0))


def rounding(compute, model, inputs, dtype=torch.float32, stored=None, draws=8):
    """Return by output how far apart two computations of the same values may be if they add in different orders.

    No formula bounds rounding through a network, so it is simulated in float64: each operation gets an error of the
    permitted size with a random sign, and the outputs spread by the condition of later operations. The bound is six
    standard deviations of a difference of two runs. It holds on every processor whose additions round, whatever the
    order of the additions.

    Args:
        compute: function from a model and its inputs to a dictionary of tensors.
        model: model in float32; it is copied.
        inputs: inputs of the model, in float32.
        dtype: dtype that the code under test computes in. Half precision rounds weights and inputs, and is compared
            with float32; errors in float64 are those of float32, in its units.
        stored: half-precision dtype in which the inputs, now float32, were stored.
        draws: number of draws of the signs; 8 estimate a standard deviation within a quarter.

    Returns:
        a number for each output: the bound of the element that spreads most.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    carried = dtype if half else torch.float32
    inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() and not half else t, inputs)

    def run(seed):
        copied, rounded, random = copy.deepcopy(model).double(), Rounded(carried, seed), torch.random.get_rng_state()
        if half and seed is not None:
            for weight in copied.parameters():
                rounded.move(weight.data, roundoff(dtype) / 3**0.5 * weight.data.abs())
        given = tree_map_only(Tensor, torch.clone, inputs)
        if stored is not None and seed is not None:
            for kept in (t for t in tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point()):
                rounded.move(kept, roundoff(stored) / 3**0.5 * kept.abs())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), rounded:
            found = {name: out.detach().double() for name, out in compute(copied, given).items()}
        torch.random.set_rng_state(random)
        return found

    truth, moved = run(None), [run(seed) for seed in range(draws)]
    spread = {name: torch.stack([(run[name] - truth[name]) ** 2 for run in moved]).mean(dim=0) for name in truth}
    scale = roundoff(dtype) / roundoff(carried)
    return {name: 6 * scale * (2 * square.max()).sqrt().item() for name, square in spread.items()}


def function_error(compute, *tensors, **options):
    """Return [`rounding`] of a function of tensors, which returns one: how far apart two computations of it may be."""
    empty = torch.nn.Module()
    return rounding(lambda _, given: {"value": compute(*given)}, empty, [*tensors], **options)["value"]


def assert_within(ours, theirs, bound):
    """Assert that two dictionaries of tensors differ by at most `bound()`, a number by name; equal ones need none.

    A bound takes nine runs in float64; on most machines the two are equal to the bit.
    """
    assert ours.keys() == theirs.keys()
    if all(ours[name].dtype == wanted.dtype and torch.equal(ours[name], wanted) for name, wanted in theirs.items()):
        return
    error = bound()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=error[name], msg=name)


def embeds_of(model, inputs):
    """Return the outputs of a model: embeddings, tokens, cosines, and optional outputs that are present."""
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
    """Return [`rounding`] of [`embeds_of`]."""
    return rounding(embeds_of, model, inputs, dtype)


@torch.no_grad()
def images_error(model, processor, images):
    """Return how far apart two computations of the embeddings of images, opened ones or files, may be."""

    def embeds(model, inputs):
        return {"images": model.get_image_features(**inputs).pooler_output}

    return rounding(embeds, model, dict(processor.process_targets(images)))["images"]


@cache
def squares_error(backbone="blip", dtype=torch.float32, checkpoint=None):
    """Return [`embedding_error`] of nine squares, each as reference and as target, with nine captions.

    Uses the toy model, with its attentions, or a checkpoint.
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
    """Return the losses of plain SGD steps on one batch, and how far the weights have moved, by name."""
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
    """Return how far apart two runs of the same SGD steps may be: "losses", and the weights by name.

    Args:
        model: model in train mode, with float32 weights.
        inputs: a representative batch.
        steps: number of SGD steps, each of which also rounds the weights.
        rate: learning rate.
        dtype: dtype of autocast.
        stored: see [`rounding`].
    """
    error = rounding(partial(sgd, steps=steps, rate=rate), model, inputs, dtype, stored)
    for name, weight in model.named_parameters():
        if name in error:
            error[name] += 2 * steps * roundoff() * weight.abs().max().item()
    return error
