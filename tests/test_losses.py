"""Each loss against its formula in float64, and where gradients may and may not flow."""

import numpy as np
import pytest
import torch

import losses
from losses import IGNORE, consistency, cross_entropy, lsgan_d, lsgan_g, sigmoid_ramp_up
from models import FCN8s, Generator, MultiScaleDiscriminator


def softmax(z, axis=1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def scores(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, 1, h, h + 1)) for h in (8, 4, 2)]


def labelled_logits(dtype=torch.float32):
    rng = np.random.default_rng(3)
    z = torch.tensor(rng.normal(0, 3, (2, 5, 6, 7))).to(dtype)
    y = torch.tensor(rng.integers(0, 5, (2, 6, 7)))
    y[0, :3] = IGNORE
    return z, y


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_lsgan_losses_are_the_formulas(dtype, tolerance):
    """Means per scale, summed over scales, in float32 even for bfloat16 scores: a coarse scale counts like a fine one."""
    real, fake = ([torch.tensor(s).to(dtype) for s in scores(k)] for k in (0, 1))
    expected_d = sum(((r - 1) ** 2).mean() + (f**2).mean()
                     for r, f in zip([r.double().numpy() for r in real], [f.double().numpy() for f in fake], strict=True))
    expected_g = sum(((f.double().numpy() - 1) ** 2).mean() for f in fake)
    for got, expected in ((lsgan_d(real, fake), expected_d), (lsgan_g(fake), expected_g)):
        assert got.dtype == torch.float32
        assert float(got) == pytest.approx(expected, rel=tolerance)


def test_lsgan_losses_have_their_optimum_where_the_paper_puts_it():
    """Real is 1 and generated is 0 for D, generated is 1 for G; swapped targets would train as smoothly."""
    one, zero = [torch.ones(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)]
    assert [float(v) for v in (lsgan_d(one, zero), lsgan_d(zero, one), lsgan_g(one), lsgan_g(zero))] == [0, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_formula(dtype):
    """Mean over the labelled pixels of the whole batch, not over all pixels and not a mean of means."""
    z, y = labelled_logits(dtype)
    logp = np.log(softmax(z.double().numpy()))
    n, i, j = np.nonzero(y.numpy() != IGNORE)
    assert float(cross_entropy(z, y)) == pytest.approx(-logp[n, y.numpy()[n, i, j], i, j].mean(), rel=1e-5)
    assert cross_entropy(z, y).dtype == torch.float32


def test_ignored_pixels_get_no_gradient_and_labelled_ones_do():
    """A pixel without label teaches nothing, whatever is predicted there."""
    z, y = labelled_logits()
    z.requires_grad_()
    cross_entropy(z, y).backward()
    per_pixel = z.grad.abs().sum(1)
    assert (per_pixel[y == IGNORE] == 0).all()
    assert (per_pixel[y != IGNORE] > 0).all()


def test_a_crop_without_any_label_costs_nothing():
    """A random crop can hold only IGNORE: the loss is 0 with gradient 0, where a plain mean is NaN and ends the run."""
    z = labelled_logits()[0].requires_grad_()
    loss = cross_entropy(z, torch.full((2, 6, 7), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (z.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consistency_is_the_mean_over_batch_classes_and_cells(dtype):
    """delta_con has a meaning only with this reduction, and bfloat16 would lose the small differences."""
    rng = np.random.default_rng(4)
    a, b = (torch.tensor(rng.normal(0, 2, (2, 5, 3, 4))).to(dtype) for _ in range(2))
    expected = ((softmax(a.double().numpy()) - softmax(b.double().numpy())) ** 2).mean()
    assert float(consistency(a, b)) == pytest.approx(expected, rel=1e-5)
    assert consistency(a, b).dtype == torch.float32
    sure = torch.tensor([[100.0, 0, 0, 0]])[..., None, None]
    assert float(consistency(sure, sure.flip(1))) == pytest.approx(2 / 4)


def test_no_gradient_reaches_the_teacher():
    """The teacher is an average, not a player: the loss pulls the student alone."""
    a, b = (torch.randn(1, 4, 3, 3, requires_grad=True) for _ in range(2))
    consistency(a, b).backward()
    assert b.grad is None
    assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("step, length, expected", [
    (0, 100, np.exp(-5)), (50, 100, np.exp(-1.25)), (100, 100, 1), (250, 100, 1), (-5, 100, np.exp(-5)), (3, 0, 1), (0, 0, 1),
])  # fmt: skip
def test_ramp_up(step, length, expected):
    """exp(-5 (1 - x)^2), clipped at both ends, and no division by a length of 0."""
    assert sigmoid_ramp_up(step, length) == pytest.approx(expected)


def test_gradients_of_the_generator_update():
    """L_sem reaches G through the frozen f_seg; f_seg and the frozen D stay as they are."""
    torch.manual_seed(0)
    G = Generator(4, 4, 8, 1, 1)
    D = MultiScaleDiscriminator(4, 2, 2).requires_grad_(False)
    f_seg = FCN8s(3, 0.04).eval().requires_grad_(False)
    y = torch.randint(0, 3, (1, 32, 32))

    def gradient(loss):
        G.zero_grad()
        loss.backward()
        return sum(float(p.grad.abs().sum()) for p in G.parameters() if p.grad is not None)

    x_s, x_t = torch.rand(1, 3, 32, 32) - 0.5, torch.rand(1, 3, 32, 32) - 0.5
    assert gradient(cross_entropy(f_seg(G(x_s, x_t)), y)) > 0
    assert gradient(lsgan_g(D(G(x_s, x_t)))) > 0
    assert all(p.grad is None for net in (f_seg, D) for p in net.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in G.mlp.parameters())  # the style is trained, too


def test_discriminator_update_leaves_the_generator_alone():
    """D is trained on detached images: G must not learn to be found out."""
    G, D = Generator(4, 4, 8, 1, 1), MultiScaleDiscriminator(4, 2, 1)
    x = torch.rand(1, 3, 32, 32) - 0.5
    lsgan_d(D(x), D(G(x, x).detach())).backward()
    assert all(p.grad is None for p in G.parameters())
    assert all(p.grad is not None for p in D.parameters())


def test_labelled_pixels_of_several_processes(monkeypatch):
    """The mean of their numbers, so that averaged gradients are the whole batch's: also where one pixel is all they have."""
    y = torch.full((1, 4, 4), IGNORE)
    assert float(losses.labelled_pixels(y)) == 1
    y[0, 0, 0] = 2
    assert float(losses.labelled_pixels(y)) == 1
    monkeypatch.setattr(losses, "world", lambda: 2)
    monkeypatch.setattr(losses, "all_sum", lambda n: n)  # the other process has none
    assert float(losses.labelled_pixels(y)) == 0.5
