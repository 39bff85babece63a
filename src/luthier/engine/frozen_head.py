"""The summed loss under a head that does not train, and the gradient of its hidden states, in one go over the words.

The vocabulary comes in parts, each of them once, as the keys do in flash attention: beside the hidden states there are
their largest logit so far, the sum of the exponentials below it and the sum of the words' vectors, each as often as its
exponential says; where a later part has a larger logit, what is there is scaled down. The logits of one part are all
that there ever is. (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135)

Shapes: S supervised places, P words of a part, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.engine import products

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits at once, by the type of the device, 4 bytes each, and 2 more where products are in 16 bits, 4 with a soft cap.

cpu: 900 places × 151,936 words × 512 take the same time within 3 hundredths from 2**20 to 2**23. cuda: sixteen times as
many, so that the kernels are few; a judgement, not measured."""

FEWEST = 256
"""Words of a part: below, products lose."""

IN_CACHE = 1 << 19
"""Logits whose exponentials are taken at once on the CPU: 2 MiB. They are gone over five times."""


class FrozenHead(NamedTuple):
    """logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)."""

    layer: nn.Linear
    scale: float
    softcap: float | None
    format: torch.dtype
    """What the products are computed in."""

    def parts(self, words: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight, `words` at once, and these rows in the products' format, until the next ones."""
        return products.parts(self.layer.weight, self.format, words)


def summed(hidden: Tensor, targets: Tensor, weights: Tensor | None, head: FrozenHead) -> Tensor:
    """Sum of the cross entropy, a fp32 scalar. hidden: [S, D]; targets: [S] ids; weights: [S] or None for 1 each."""
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    return _Summed.apply(hidden, targets, weights, head, wanted)  # type: ignore[no-any-return, no-untyped-call]


class _Summed(torch.autograd.Function):
    """The gradient is made with the loss: it is all that is kept. Not to be differentiated twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weights: Tensor | None, head: FrozenHead, wanted: bool
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            softmax, vectors = _over_the_words(hidden, targets, head, wanted)
            losses = softmax.losses()
            losses = losses if weights is None else losses * weights
            if wanted:
                ctx.save_for_backward(_gradient(softmax, vectors, targets, weights, head).to(hidden.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


class _Softmax(NamedTuple):
    """Of the words so far: [S, 1] each, in fp32. peak: the largest logit; others: Σ exp(logit - peak) without the
    target, of which p - 1 would keep no digits where p is near 1; target: its logit."""

    peak: Tensor
    others: Tensor
    target: Tensor

    def losses(self) -> Tensor:
        return (self.all().log() + self.peak - self.target).squeeze(1)

    def all(self) -> Tensor:
        return self.others + (self.target - self.peak).exp()


def _over_the_words(hidden: Tensor, targets: Tensor, head: FrozenHead, wanted: bool) -> tuple[_Softmax, Tensor]:
    """The softmax, and if it is wanted Σ exp(logit - peak) · slope · vector over all words but the target: [S, D]."""
    places, device, weight = len(hidden), hidden.device, head.layer.weight
    most = LOGITS[device.type] // max(1, places)
    if weight.dtype != head.format:
        most = min(most, products.PART // weight.shape[1])
    words = min(len(weight), max(FEWEST, most))
    x = hidden.detach().to(head.format)
    lowest = torch.full((3, places, 1), -torch.inf, device=device)
    softmax = _Softmax(lowest[0], lowest[1].zero_(), lowest[2])
    vectors = torch.zeros(hidden.shape if wanted else (0,), device=device)
    room = torch.empty(1 + (head.softcap is not None), places * words, device=device)
    narrow = None if head.format == torch.float32 else x.new_empty(places * words)
    for part, rows in head.parts(words):
        z, *slope = (each[: places * len(rows)].view(places, len(rows)) for each in room)
        product = z if narrow is None else narrow[: z.numel()].view_as(z)
        torch.mm(x, rows.t(), out=product)
        if narrow is not None:
            z.copy_(product)
        if head.layer.bias is not None:
            z.add_(head.layer.bias[part])
        factor = _exponentials(z, slope, targets - part.start, softmax, head)
        if wanted:
            vectors.mul_(factor)
            e = z.mul_(slope[0]) if slope else z
            vectors = vectors.addmm_(e, rows) if narrow is None else vectors.add_(product.copy_(e) @ rows)
    return softmax, vectors


def _exponentials(z: Tensor, slope: list[Tensor], targets: Tensor, softmax: _Softmax, head: FrozenHead) -> Tensor:
    """Logits [S, P], not yet scaled, become exp(logit - peak), 0 at the target; the softmax takes them in. Gives back
    what all so far is to be multiplied by, [S, 1], as the peak is another one. targets: [S], 0 the first word."""
    places, words = z.shape
    factor = softmax.peak.clone()
    here = ((targets >= 0) & (targets < words)).unsqueeze(1)
    index = targets.clamp(0, words - 1).unsqueeze(1)
    few = max(1, IN_CACHE // words) if z.device.type == "cpu" else max(1, places)
    for start in range(0, places, few):
        piece = slice(start, start + few)
        logits, peak, others, target = z[piece], softmax.peak[piece], softmax.others[piece], softmax.target[piece]
        if head.scale != 1.0:
            logits.mul_(head.scale)
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_()
            torch.mul(logits, logits, out=slope[0][piece]).neg_().add_(1)
            logits.mul_(head.softcap)
        torch.maximum(peak, logits.amax(1, keepdim=True), out=peak)
        found, mine = logits.gather(1, index[piece]), here[piece]
        torch.where(mine, found, target, out=target)
        logits.scatter_(1, index[piece], found.masked_fill_(mine, -torch.inf))
        logits.sub_(peak).exp_()
        factor[piece].sub_(peak).exp_()
        others.mul_(factor[piece]).add_(logits.sum(1, keepdim=True))
    return factor


def _gradient(softmax: _Softmax, vectors: Tensor, targets: Tensor, weights: Tensor | None, head: FrozenHead) -> Tensor:
    """weight · scale · (Σ p · slope · vector - slope · vector of the target): [S, D], in place of `vectors`."""
    counted = head.scale / softmax.all()
    if weights is not None:
        counted = counted * weights.unsqueeze(1)
    vectors.mul_(counted)
    missing = counted.mul_(softmax.others)  # (1 - p of the target) · scale · weight
    if head.softcap is not None:
        missing = missing * (1 - (softmax.target / head.softcap).square_())
    rows = max(1, IN_CACHE // vectors.shape[1])
    for start in range(0, len(vectors), rows):
        piece = slice(start, start + rows)
        own = head.layer.weight.index_select(0, targets[piece])
        vectors[piece].addcmul_(missing[piece], own.to(head.format).float(), value=-1)
    return vectors
