"""The loss terms, under the names they carry in the paper, in the code and in the logs.

All take logits or images as the networks return them and compute in float32 (or wider, where those are) whatever the
networks' precision.
Source of the formulas: Choi, Kim, Kim, ICCV 2019, unless a docstring names another.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import all_sum, world

IGNORE = 255  # label of pixels that count neither in a loss nor in a metric


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: sums and differences of many numbers need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lsgan_d(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """L_D = E[(D(x_t) - 1)^2] + E[D(G(x_s, x_t))^2] (Mao et al. 2017), each scale's mean, summed over the scales.

    real, fake: one (N, 1, h, w) score map per scale -> scalar.
    """
    return sum((wide(r) - 1).square().mean() + wide(f).square().mean() for r, f in zip(real, fake, strict=True))


def lsgan_g(fake: list[Tensor]) -> Tensor:
    """L_GAN for the generator: E[(D(G(x_s, x_t)) - 1)^2], each scale's mean, summed over the scales -> scalar."""
    return sum((wide(f) - 1).square().mean() for f in fake)


def labelled_pixels(y: Tensor) -> Tensor:
    """Number of pixels of y (N, H, W) that are not IGNORE, at least 1 in all; with several processes the mean of theirs."""
    return all_sum((y != IGNORE).sum()).clamp(min=1) / world()


def class_weights(pixels, balance: float) -> Tensor:
    """(share of each class in the data)^-balance, scaled so that the mean over all pixels is 1.

    pixels: (images, C) numbers of labelled pixels; balance: 0 (all 1) to 1 (each class as a whole weighs the same) -> (C,)
    float32. A class weighs at most as one of 1 pixel in 10,000.
    """
    share = torch.as_tensor(pixels).sum(0).double()
    share = share / share.sum().clamp(min=1)
    weight = share.clamp(min=1e-4) ** -balance
    return (weight / (weight * share).sum()).float()


def cross_entropy(logits: Tensor, y: Tensor, pixels: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Mean of -log softmax(logits)[y] over the pixels that are not IGNORE; 0 (with a gradient of 0) if there are none.

    logits: (N, C, H, W); y: (N, H, W) integer class ids or IGNORE; pixels: the number to divide by, where y is but a part
    of the batch (see `labelled_pixels`); weight: (C,) of the classes, 1 each without it -> scalar. This is L_sup's term, and
    with f_seg's logits of a generated image and the source label it is L_sem.
    """
    z = wide(logits)
    total = F.cross_entropy(z, y, None if weight is None else weight.to(z), ignore_index=IGNORE, reduction="sum")
    return total / (labelled_pixels(y) if pixels is None else pixels)


def consistency(student_logits: Tensor, teacher_logits: Tensor, confidence: float = 0.0, balance: float = 0.0) -> Tensor:
    """L_con: mean squared error between the two softmaxes, **mean over batch, classes and cells**.

    student_logits, teacher_logits: (N, C, h, w) before up-sampling -> scalar in [0, 2/C]. No gradient reaches the
    teacher. delta_con has a meaning only together with this reduction: a sum over classes would be C times as large.

    confidence, 0 to 1: cells where the teacher's highest probability is lower count as 0 (French et al. 2018; the mean
    remains one over all cells). balance, 0 to 1: a cell weighs (share of its class)^-balance, its class being the
    teacher's and shares taken over the batch (1 % at least), divided by the mean weight. Both 0: the paper's term.
    """
    s, t = wide(student_logits).softmax(1), wide(teacher_logits.detach()).softmax(1)
    if not confidence and not balance:
        return F.mse_loss(s, t)
    highest, k = t.max(1)
    weight = torch.ones_like(highest)
    if balance:
        cells = all_sum(F.one_hot(k, t.shape[1]).sum((0, 1, 2)))
        share = cells / cells.sum()
        per_class = share.clamp(min=0.01) ** -balance
        weight = (per_class / (per_class * share).sum())[k]
    return ((s - t).square().mean(1) * weight * (highest >= confidence)).mean()


def style_statistics(x: Tensor) -> Tensor:
    """Style as six numbers, mean and deviation of each colour channel over the image: (N, 3, H, W) -> (N, 6)."""
    var, mean = torch.var_mean(wide(x), (2, 3), correction=0)
    return torch.cat([mean, (var + 1e-6).sqrt()], 1)


def style_loss(x_g: Tensor, x_t: Tensor) -> Tensor:
    """L_style: mean distance of the generated images' style statistics from their guides' -> scalar. Not in the paper."""
    return (style_statistics(x_g) - style_statistics(x_t)).abs().mean()


def sigmoid_ramp_up(step: int, length: float) -> float:
    """exp(-5 (1 - x)^2) with x = step/length clipped to [0, 1] (Tarvainen & Valpola 2017); 1 where length is 0."""
    x = min(max(step / length, 0.0), 1.0) if length > 0 else 1.0
    return math.exp(-5 * (1 - x) ** 2)
