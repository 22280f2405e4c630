"""Losses, schedules and the metric against plain float64 formulas, loops, and Cityscapes' own script."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import losses
from losses import IGNORE

RNG = np.random.default_rng(0)
REAL, FAKE = ([RNG.normal(size=(2, 1, h, h + 1)) for h in (8, 4, 2)] for _ in range(2))
Z, Z2 = (RNG.normal(0, 3, (2, 5, 6, 7)) for _ in range(2))  # logits
Y = RNG.integers(0, 5, (2, 6, 7))
Y[0, :3] = IGNORE
WEIGHT = np.array([0.2, 1.0, 3.0, 0.5, 2.0])


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def mean_log_loss(z, weight):
    """Sum of -weight[y] log p[y] over the labelled pixels, one by one, divided by their number."""
    n, i, j = np.nonzero(Y != IGNORE)
    y = Y[n, i, j]
    return (-np.log(softmax(z)[n, y, i, j]) * weight[y]).sum() / len(y)


FORMULAS = {  # name: (the project's function, the formula, arrays)
    "lsgan_d": (lambda *x: losses.lsgan_d(x[:3], x[3:]),
                lambda *x: [((r - 1) ** 2).mean() + (f**2).mean() for r, f in zip(x[:3], x[3:], strict=True)],
                [*REAL, *FAKE]),
    "lsgan_g": (lambda *x: losses.lsgan_g(x), lambda *x: sum(((f - 1) ** 2).mean() for f in x), FAKE),
    "cross_entropy": (lambda z: losses.cross_entropy(z, torch.tensor(Y)),
                      lambda z: mean_log_loss(z, np.ones(5)), [Z]),
    "weighted": (lambda z: losses.cross_entropy(z, torch.tensor(Y), torch.tensor(WEIGHT)),
                 lambda z: mean_log_loss(z, WEIGHT), [Z]),
    "consistency": (losses.consistency,
                    lambda a, b: ((softmax(a) - softmax(b)) ** 2).sum() / (a.size / a.shape[1]), [Z, Z2]),
    "style": (losses.style_statistics,
              lambda x: np.concatenate([x.mean((2, 3)), np.sqrt(x.var((2, 3)) + 1e-6)], 1), [Z[:, :3]]),
}  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_is_its_formula(name, dtype, tolerance):
    """lambda_sem and delta_con mean something only with these sums and means, in float32 at least."""
    function, formula, arrays = FORMULAS[name]
    tensors = [torch.tensor(a).to(dtype) for a in arrays]
    got, expected = function(*tensors), formula(*(t.double().numpy() for t in tensors))
    for ours, theirs in zip(*(x if isinstance(x, list) else [x] for x in (got, expected)), strict=True):
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=tolerance, atol=tolerance)


def test_where_gradients_flow():
    """Ignored pixels teach nothing, a crop of them gives 0 and not NaN, and nothing pulls the teacher."""
    z, teacher = (torch.tensor(a, requires_grad=True) for a in (Z, Z2))
    losses.cross_entropy(z, torch.tensor(Y)).backward()
    assert torch.equal(z.grad.abs().sum(1) > 0, torch.tensor(Y != IGNORE))
    z.grad = None
    loss = losses.cross_entropy(z, torch.full(Y.shape, IGNORE), torch.tensor(WEIGHT))
    loss.backward()
    assert float(loss.detach()) == 0 and not z.grad.any()
    losses.consistency(z, teacher).backward()
    assert z.grad.any() and teacher.grad is None


def test_statistics_of_classes_and_styles():
    """Class weights are share^-balance, bounded, 1 in the mean over all pixels; style_corr is Pearson's."""
    pixels = np.array([[700, 200, 0, 1], [800, 200, 0, 98]])  # images, classes
    share = pixels.sum(0) / pixels.sum()
    for balance in (0.0, 0.5, 1.0):
        raw = np.maximum(share, 1e-4) ** -balance
        expected = raw / (raw * share).sum()
        np.testing.assert_allclose(losses.class_weights(pixels, balance), expected, rtol=1e-6)
    a, b = RNG.normal(size=(2, 8, 6))
    b[:, 2] = 0.3  # constant: 0, not NaN
    expected = [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in (0, 1, 3, 4, 5)]
    assert losses.correlation(*map(torch.tensor, (a, b))) == pytest.approx(sum(expected) / 6, abs=1e-12)


def test_schedules():
    """Ramp-up and learning rates by their formulas, also at their ends."""
    for step, length in ((0, 100), (37, 100), (100, 100), (250, 100), (-5, 100)):
        x = min(1, max(0, step / length))
        assert losses.sigmoid_ramp_up(step, length) == pytest.approx(np.exp(-5 * (1 - x) ** 2), rel=1e-12)
    assert losses.sigmoid_ramp_up(0, 0) == losses.sigmoid_ramp_up(3, 0) == 1
    for step in (1, 15, 30, 31, 500, 1000):
        assert losses.poly(step, 1000) == pytest.approx(min(1, step / 30) * (1 - (step - 1) / 1000) ** 0.9)
    assert [losses.linear(step, 10) for step in (1, 6, 7, 10)] == pytest.approx([1, 1, 0.8, 0.2])
    assert losses.poly(1, 1) == losses.linear(1, 1) == 1


def test_confusion_matrix_and_iou():
    """Every reported number comes from these counts: a loop over pixels gives them, too."""
    label, prediction = RNG.integers(0, 4, (3, 9, 11)), RNG.choice([0, 1, 2, 4], (3, 9, 11))
    label[0, :4] = IGNORE
    counts = np.zeros((6, 6), np.int64)  # class 5 is in neither
    for y, p in zip(label.flat, prediction.flat, strict=True):
        if y != IGNORE:
            counts[y, p] += 1
    for kind in (torch.uint8, torch.int64):
        ours = losses.confusion_matrix(torch.tensor(label).to(kind), torch.tensor(prediction).to(kind), 6)
        assert ours.dtype == torch.int64 and np.array_equal(ours, counts)
    iou = losses.iou_from_confusion(ours)
    for k in range(6):
        both = sum(((label == k) & (prediction == k)).flat)
        either = sum((((label == k) | (prediction == k)) & (label != IGNORE)).flat)
        assert iou[k] == both / either if either else np.isnan(iou[k])


def test_cityscapes_script_agrees(tmp_path):
    """Published numbers are made by evalPixelLevelSemanticLabeling.py: the same counts and IoU."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    ids = {label.trainId: label.id for label in official.labels if not label.ignoreInEval}
    ids = np.array([ids[k] for k in range(19)], np.uint8)
    ignored = np.array([v.id for v in official.labels if v.ignoreInEval and v.id >= 0], np.uint8)
    args = SimpleNamespace(evalInstLevelScore=False, evalPixelAccuracy=False, normalized=True)
    theirs, ours = official.generateMatrix(args), 0
    for k in range(2):
        label = RNG.integers(0, 18, (40, 60))  # class 18 is in neither, class 17 never predicted
        prediction = np.where(RNG.random(label.shape) < 0.6, label, RNG.integers(0, 17, label.shape)) % 17
        gaps = RNG.random(label.shape) < 0.2
        files = [str(tmp_path / f"{k}_{name}.png") for name in ("prediction", "gtFine_labelIds")]
        Image.fromarray(ids[prediction]).save(files[0])
        Image.fromarray(np.where(gaps, RNG.choice(ignored, label.shape), ids[label])).save(files[1])
        official.evaluatePair(*files, theirs, {}, {}, args)
        label = torch.tensor(np.where(gaps, IGNORE, label).astype(np.uint8))
        ours = ours + losses.confusion_matrix(label, torch.tensor(prediction), 19)
    assert np.array_equal(ours, theirs[np.ix_(ids, ids)].astype(np.int64))
    expected = [official.getIouScoreForLabel(i, theirs, args) for i in ids]
    np.testing.assert_allclose(losses.iou_from_confusion(ours), expected, rtol=0, atol=1e-12)
    assert np.isnan(expected).sum() == 1
