"""The loss terms, under the names they carry in the paper, in the code and in the logs; the confusion matrix.

Losses take logits or images as the networks return them and compute in float32, or wider where those are.
Formulas: Choi, Kim, Kim, ICCV 2019, unless a docstring names another source.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # label of pixels that count neither in a loss nor in a metric


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: sums and differences of many numbers need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lsgan_d(real: list[Tensor], fake: list[Tensor]) -> list[Tensor]:
    """E[(D(x_t) - 1)^2] + E[D(G(x_s, x_t))^2] (Mao et al. 2017), a scalar per scale; L_D is their sum.

    real, fake: one (N, 1, h, w) score map per scale.
    """
    return [(wide(r) - 1).square().mean() + wide(f).square().mean() for r, f in zip(real, fake, strict=True)]


def lsgan_g(fake: list[Tensor]) -> Tensor:
    """L_GAN for the generator: E[(D(G(x_s, x_t)) - 1)^2], summed over the scales -> scalar."""
    return sum((wide(f) - 1).square().mean() for f in fake)


def class_weights(pixels, balance: float) -> Tensor:
    """(share of each class in the data)^-balance, scaled so that the mean over all pixels is 1.

    pixels: (images, C) numbers of labelled pixels; balance: 0 (all 1) to 1 (each class as a whole weighs the
    same) -> (C,) float32. A class weighs at most as one of 1 pixel in 10,000.
    """
    share = torch.as_tensor(pixels).sum(0).double()
    share = share / share.sum().clamp(min=1)
    weight = share.clamp(min=1e-4) ** -balance
    return (weight / (weight * share).sum()).float()


def cross_entropy(logits: Tensor, y: Tensor, weight=None) -> Tensor:
    """Mean of -log softmax(logits)[y] over the pixels that are not IGNORE; 0, gradient 0, if there are none.

    logits: (N, C, H, W); y: (N, H, W) integer class ids or IGNORE; weight: (C,) of classes, by default
    1 each -> scalar. This is L_sup's term, and L_sem with f_seg's logits of a generated image and the source
    label.
    """
    z = wide(logits)
    weight = None if weight is None else weight.to(z)
    total = F.cross_entropy(z, y, weight, ignore_index=IGNORE, reduction="sum")
    return total / (y != IGNORE).sum().clamp(min=1)


def consistency(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_con: squared error between the two softmaxes, **summed over classes, mean over batch and cells**.

    Both logits: (N, C, h, w) before up-sampling -> scalar in [0, 2]. No gradient reaches the teacher. By this
    reduction delta_con means the same for any number of classes.
    """
    p_s, p_t = wide(student_logits).softmax(1), wide(teacher_logits.detach()).softmax(1)
    return (p_s - p_t).square().sum(1).mean()


def style_statistics(x: Tensor) -> Tensor:
    """Style as six numbers, mean and deviation of each colour channel: (N, 3, H, W) -> (N, 6)."""
    var, mean = torch.var_mean(wide(x), (2, 3), correction=0)
    return torch.cat([mean, (var + 1e-6).sqrt()], 1)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over the rows of two (K, M) tensors; the mean of the M columns. A constant one has 0."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-6)).mean())


def sigmoid_ramp_up(step: int, length: float) -> float:
    """exp(-5 (1 - x)^2), x = step/length in [0, 1] (Tarvainen & Valpola 2017); 1 where length is 0."""
    x = min(max(step / length, 0.0), 1.0) if length > 0 else 1.0
    return math.exp(-5 * (1 - x) ** 2)


def poly(step: int, steps: int) -> float:
    """Factor of the learning rate in step 1 ... steps: (1 - (step - 1)/steps)^0.9, after a rise over 3 %."""
    return min(1.0, step / (0.03 * steps)) * (1 - (step - 1) / steps) ** 0.9


def linear(step: int, steps: int) -> float:
    """The same: 1 for the first half of the steps, then linearly to 0 (pix2pixHD)."""
    return min(1.0, 2 * (1 - (step - 1) / steps))


def confusion_matrix(label: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Integer tensors of one shape, label with IGNORE -> (classes, classes) int64, row = label."""
    # IGNORE is counted as a row like any other and cut off: cheaper than selecting pixels.
    pairs = label.to(torch.int32) * classes + prediction.to(torch.int32)
    return torch.bincount(pairs.view(-1), minlength=(IGNORE + 1) * classes).view(-1, classes)[:classes]


def iou_from_confusion(confusion) -> np.ndarray:
    """(C, C) counts -> (C,) float64 IoU = TP / (TP + FP + FN); NaN for a class that is nowhere."""
    confusion = np.asarray(confusion, np.int64)
    hit = np.diag(confusion)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate: its own `base_lr` times the schedule's factor."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
