"""The steps that train against the plain ones of reference_steps.py, in float64, and who learns from what."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import reference_steps as plain
import torch
from torch import nn

import runtime
from losses import set_lr
from models import adamw, build_discriminator, build_fseg, build_generator, build_segmenter
from train_gan import fseg_step, gan_step, warm_up_step
from train_selfens import selfens_step

CAST, CLASSES, LR, HEAD, DECAY = contextlib.nullcontext(), 3, 1e-3, 5.0, 0.01
TINY = ["gan.width=4", "gan.style_dim=4", "gan.mlp_dim=8", "gan.res_blocks=2", "gan.d_width=4",
        "gan.d_layers=2", "gan.lambda_rec=0.7", "fseg.width=0.2", "selfens.width=0.2",
        "selfens.dropout=0", "gan.downsamples=2"]  # fmt: skip


def config(*items):
    return runtime.load_config(runtime.SCHEMA, [*TINY, *items])


def draw(count, size=(32, 48), n=2, dtype=torch.float64):
    """Images, and labels with some pixels ignored."""
    y = torch.randint(0, CLASSES, (n, *size))
    y[:, :5] = 255
    x = torch.rand(count, n, 3, *size, dtype=dtype) * 2 - 1
    return [*(image.contiguous(memory_format=torch.channels_last) for image in x), y]


def prepared(net, dtype=torch.float64):
    """Channels last, with classifiers whose scores differ: they start near 0, where little is tested."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.out_channels == CLASSES:
            nn.init.normal_(m.weight, std=m.in_channels**-0.5)
    return net.to(dtype=dtype, memory_format=torch.channels_last)


def compare(ours: dict, theirs: dict, tolerance=1e-8):
    """The same names, and values equal relative to each one's largest."""
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        value, expected = (torch.as_tensor(v).detach().double() for v in (value, theirs[name]))
        assert value.shape == expected.shape, name
        assert (value - expected).abs().max() <= tolerance * max(expected.abs().max(), 1e-2), name


def moved(weights: dict, grads: dict) -> dict:
    """Without those whose gradient is rounding alone (a bias before a norm), which Adam divides by itself."""
    return {k: v for k, v in weights.items() if k not in grads or grads[k].abs().max() > 1e-12}


def of(net) -> dict:
    """Gradients by name, of a network or of reference_steps.py's weights."""
    named = net if isinstance(net, dict) else dict(net.named_parameters())
    return {k: p.grad for k, p in named.items() if p.requires_grad or p.grad is not None}


@pytest.mark.parametrize("size, n", [((32, 48), 2), ((29, 45), 1)])
def test_stage_1_is_the_plain_one(size, n):
    """Two warm-up steps and three of the GAN: losses, gradients and weights of G and D are the formulas'.

    So D has its own update's gradient and nothing of G's, and G nothing of D's; nothing moves f_seg.
    """
    torch.manual_seed(0)
    c, f_seg = config().gan, prepared(build_fseg(config(), CLASSES)).eval().requires_grad_(False)
    G, D = prepared(build_generator(config())), prepared(build_discriminator(config()))
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), LR, (0.5, 0.999), weight_decay=DECAY, fused=True)
                    for net in (G, D))
    nets = SimpleNamespace(G=G, D=D, f_seg=f_seg, opt_g=opt_g, opt_d=opt_d)
    ref = plain.PlainGAN(G, D, f_seg, LR, DECAY, c.lambda_sem, c.lambda_rec)
    for step in range(5):
        x_s, x_t, y_s = draw(2, size, n)
        if step < 2:
            compare(warm_up_step(nets, x_s, x_t, CAST), ref.warm_up(x_s, x_t))
        else:
            compare(gan_step(nets, x_s, x_t, y_s, c, CAST), ref.step(x_s, x_t, y_s))
            compare(of(D), of(ref.D))
            compare(moved(D.state_dict(), of(D)), moved(ref.D, of(D)))
        compare(of(G), of(ref.G))
        compare(moved(G.state_dict(), of(G)), moved(ref.G, of(G)))
    compare(f_seg.state_dict(), ref.f_seg.state_dict(), 0.0)
    assert not of(f_seg)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 3.0]).double()])
def test_fseg_step_is_the_plain_one(weight):
    """f_seg's errors are G's later: loss, gradients and AdamW's update, with its groups, over three steps."""
    torch.manual_seed(0)
    f_seg = prepared(build_fseg(config(), CLASSES)).train()
    f_seg.dropout.p = 0.0
    ref = copy.deepcopy(f_seg)
    optimiser, theirs = adamw(f_seg, LR, HEAD, DECAY), plain.adamw(ref, LR, HEAD, DECAY)
    set_lr(optimiser, 1.0)
    for _ in range(3):
        x_s, y_s = draw(1)
        L_fseg = plain.cross_entropy(ref(x_s), y_s, weight)
        theirs.zero_grad()
        L_fseg.backward()
        theirs.step()
        compare(fseg_step(f_seg, optimiser, x_s, y_s, weight, CAST), {"L_fseg": L_fseg})
        compare(of(f_seg), of(ref))
        compare(f_seg.state_dict(), ref.state_dict(), 1e-7)


def selfens_nets(cfg, dtype=torch.float64, weight=None):
    torch.manual_seed(0)
    student = prepared(build_segmenter(cfg, CLASSES), dtype).train()
    teacher, optimiser = copy.deepcopy(student).requires_grad_(False), adamw(student, LR, HEAD, DECAY)
    set_lr(optimiser, 1.0)
    return SimpleNamespace(student=student, teacher=teacher, optimiser=optimiser, weight=weight)


@pytest.mark.parametrize("trunk, domains", [
    ("efficientnet_lite0", ("x_s", "x_g", "x_t")), ("vgg16", ("x_s", "x_t")),
    ("efficientnet_lite0", ("x_s", "x_g")), ("efficientnet_lite0", ("x_s", "x_l")), ("vgg16", ("x_s",))])
def test_selfens_step_is_the_plain_one(trunk, domains):
    """Three steps of each variant: its terms alone, the student's gradients, the weights of both networks.

    The teacher gets no gradient, and noise of its own; with the first steps' alpha it is the students' mean.
    """
    cfg, weight = config(f"selfens.trunk={trunk}"), torch.tensor([0.5, 1.0, 3.0]).double()
    nets = selfens_nets(cfg, weight=weight)
    ref, students = plain.PlainSelfEnsembling(nets.student, LR, HEAD, DECAY, weight), []
    for step in range(1, 4):
        batch = dict(zip((*domains, "y_s"), draw(len(domains), (29, 44)), strict=True))
        batch |= {"y_l": draw(1, (29, 44))[-1]} if "x_l" in batch else {}
        torch.manual_seed(step)
        noise = [cfg.selfens.noise_std * torch.randn_like(batch["x_s"]) for _ in range(2)]
        torch.manual_seed(step)
        ours = selfens_step(nets, batch, cfg.selfens, 4.0, 1 - 1 / step, CAST)
        compare(ours, ref.step(batch, *noise, 4.0, 1 - 1 / step))
        compare(of(nets.student), of(ref.student))
        compare(nets.student.state_dict(), ref.student.state_dict(), 1e-7)
        compare(nets.teacher.state_dict(), ref.teacher.state_dict(), 1e-7)
        students.append(copy.deepcopy(dict(nets.student.named_parameters())))
    mean = {k: sum(weights[k] for weights in students) / 3 for k in students[0]}
    compare(dict(nets.teacher.named_parameters()), mean, 1e-12)
    assert not of(nets.teacher) and not any(torch.equal(p, mean[k]) for k, p in students[-1].items())


def test_delta_con_0_is_the_step_without_consistency():
    """delta_con: 0 must be the ablation without L_con, bit for bit, dropout's draws included."""
    cfg, states = config("selfens.dropout=0.3"), []
    for domains in (("x_s", "x_g", "x_t"), ("x_s", "x_g")):
        nets = selfens_nets(cfg, torch.float32)
        for step in range(3):
            torch.manual_seed(100 + step)
            *x, y_s = draw(3, dtype=torch.float32)
            runtime.seed_torch(0, "selfens", step)
            batch = dict(zip(domains, x, strict=False)) | {"y_s": y_s}
            selfens_step(nets, batch, cfg.selfens, 0.0, 0.9, CAST)
        states.append([*nets.student.state_dict().values(), *nets.teacher.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
