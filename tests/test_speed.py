"""The steps that train, as fast as they are, against the plain ones of reference_steps.py; and that they stay fast.

In float64, so that whatever differs is a difference in the mathematics: passes that are shared or joined, gradients that are
written by hand, optimisers and averages that run over all tensors at once.
"""

import contextlib
import copy
import importlib
import shutil

import pytest
import torch
from conftest import make_cfg
from reference_steps import PlainGAN, PlainSelfEnsembling, gradients
from torch import nn

import train_selfens
from models import DeepLabVGG16, FCN8s, MultiScaleDiscriminator, build_generator
from train_gan import fseg_step, gan_step, warm_up_step
from train_selfens import DomainPasses, MovingAverage, selfens_step

PLAIN = contextlib.nullcontext()
needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"),
                                    reason="torch.compile needs a C++ compiler, and there is no g++ or clang++ here")
TINY = {"gan__width": 4, "gan__style_dim": 4, "gan__mlp_dim": 8, "gan__res_blocks": 2}


def images(count, *shape, dtype=torch.float64):
    return [(torch.rand(shape, dtype=dtype) * 2 - 1).contiguous(memory_format=torch.channels_last) for _ in range(count)]


def moved(weights: dict, gradients: dict) -> dict:
    """Without what has no gradient but rounding, such as a bias before a normalisation: Adam divides it by itself."""
    return {k: v for k, v in weights.items() if k not in gradients or gradients[k].abs().max() > 1e-12}


def no_check(terms):
    pass


def gan_nets(dtype=torch.float64, d_layers=2):
    """Tiny G, D and frozen f_seg with some statistics of its own, channels last."""
    torch.manual_seed(0)
    G, D = build_generator(make_cfg(**TINY)), MultiScaleDiscriminator(4, d_layers, 2)
    f_seg = FCN8s(3, 0.04, True)
    with torch.no_grad():
        for name, buffer in f_seg.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5).sub_(float("mean" in name))
        for m in (f_seg.score7, f_seg.score4, f_seg.score3):
            m.weight.normal_()
    nets = [net.to(dtype=dtype, memory_format=torch.channels_last) for net in (G, D, f_seg)]
    f_seg.eval().requires_grad_(False)
    return nets


def adams(*nets, lr=1e-2):
    return [torch.optim.Adam(net.parameters(), lr, (0.5, 0.999), weight_decay=1e-4, fused=True) for net in nets]


def students(dtype=torch.float64, batch_norm=True, dropout=0.0):
    """Student and teacher in training mode, as the stage makes them."""
    torch.manual_seed(0)
    student = DeepLabVGG16(3, 0.04, batch_norm, dropout, (1, 2)).to(dtype=dtype, memory_format=torch.channels_last)
    for branch in student.aspp:
        nn.init.normal_(branch[-1].weight)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.train(), teacher.train()
    train_selfens.track_statistics(teacher, False)
    return student, teacher


def compare(ours: dict, theirs: dict, tolerance=1e-9, floor=1e-3):
    """Equal relative to each tensor's largest value, or to `floor` if that is larger."""
    assert ours.keys() <= theirs.keys() and ours
    for name, value in ours.items():
        scale = max(float(theirs[name].detach().abs().max()), floor)
        torch.testing.assert_close(value.detach(), theirs[name].detach(), atol=tolerance * scale, rtol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


# ----------------------------------------------------------------------------------------- against the plain reference


@pytest.mark.parametrize("size", [(32, 48), (29, 45)])
@pytest.mark.parametrize("batch", [1, 2])
def test_gan_step_is_the_plain_one(batch, size):
    """Three steps: the same losses, gradients of D and of G, and weights, with D's passes joined and G's image shared."""
    G, D, f_seg = gan_nets()
    opt_g, opt_d = adams(G, D)
    plain = PlainGAN(G, D, f_seg, 1e-2, 1e-2, 1e-4, 3.0)
    for _ in range(3):
        x_s, x_t = images(2, batch, 3, *size)
        y = torch.randint(0, 3, (batch, *size))
        y[:, :5] = 255
        ours = gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, no_check)
        compare(ours, plain.step(x_s, x_t, y))
        of_g = gradients(plain.G)
        compare({k: p.grad for k, p in G.named_parameters()}, of_g, 1e-8)
        compare({k: p.grad for k, p in D.named_parameters()}, plain.gradients_d, 1e-8)
        compare(moved(G.state_dict(), of_g), plain.G, 1e-8, 1.0)
        compare(moved(D.state_dict(), plain.gradients_d), plain.D, 1e-8, 1.0)


def test_real_and_generated_images_of_different_sizes():
    """Without a crop the domains may differ in size: D then sees them one after the other, and L_D is the same formula."""
    _, D, _ = gan_nets()
    x, y = images(1, 2, 3, 32, 48)[0], images(1, 2, 3, 40, 32)[0]
    D.eval()
    for scores, image in zip(D(x, y), (x, y), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(scores, D(image), strict=True))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_selfens_step_is_the_plain_one(batch_norm, monkeypatch):
    """Four steps: losses, the student's gradients, both networks' weights and statistics, and the average in float64."""
    student, teacher = students(batch_norm=batch_norm)
    optimiser = torch.optim.Adam(student.parameters(), 1e-2, weight_decay=1e-4, fused=True)
    plain = PlainSelfEnsembling(student, (1, 2), 1e-2, 1e-4)
    passes, average = DomainPasses(student), MovingAverage(teacher, student)
    for step in range(1, 5):
        x_s, x_g, x_t, noise_s, noise_t = images(5, 2, 3, 29, 40)
        y = torch.randint(0, 3, (2, 29, 40))
        y[:, :, :4] = 255
        draws = iter([noise_s, noise_t])
        monkeypatch.setattr(train_selfens, "own_part", lambda _, draws=draws: next(draws))
        alpha = min(0.9, 1 - 1 / step)
        x = {"x_s": x_s, "x_g": x_g, "x_t": x_t}
        ours = selfens_step(passes, teacher, average, optimiser, x, y, 0.1, 4.0, alpha, PLAIN, no_check)
        theirs = plain.step(x_s, x_g, x_t, 0.1 * noise_s, 0.1 * noise_t, y, 4.0, alpha)
        assert float(ours["L"].detach()) == pytest.approx(float((theirs["L_sup"] + 4 * theirs["L_con"]).detach()), rel=1e-9)
        compare({k: ours[k] for k in theirs}, theirs)
        of_student = gradients(plain.student)
        compare({k: p.grad for k, p in student.named_parameters()}, of_student, 1e-8)
        for net, weights in ((student, plain.student), (teacher, plain.teacher)):
            state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
            compare(moved(state, of_student), weights, 1e-5, 1.0)  # a mean follows its layer's bias


@pytest.mark.parametrize("batch_norm", [True, False])
def test_grouping_of_the_domains(batch_norm):
    """Each domain's logits and gradients are those of a pass of its own, whether the passes are joined or not."""
    student, _ = students(batch_norm=batch_norm)
    other = copy.deepcopy(student)
    batches = [x * (k + 1) + k / 2 for k, x in enumerate(images(3, 2, 3, 24, 32))]
    joined = DomainPasses(student)(batches)
    single = [other(x) for x in batches]
    weights = [torch.rand_like(z) for z in single]
    for logits in (joined, single):
        sum((z * w).sum() for z, w in zip(logits, weights, strict=True)).backward()
    compare(dict(enumerate(joined)), dict(enumerate(single)))
    compare({k: p.grad for k, p in student.named_parameters()}, {k: p.grad for k, p in other.named_parameters()})
    if batch_norm:  # one move, towards the last domain's own statistics
        fresh, _ = students(batch_norm=True)
        fresh(batches[-1])
        compare({k: v for k, v in student.named_buffers() if "running" in k}, dict(fresh.named_buffers()))
        assert not torch.allclose(other.features[1].running_mean, student.features[1].running_mean)


# ------------------------------------------------------------------------------------------- who learns from what


def test_gradients_reach_only_what_an_update_updates():
    """No gradient for f_seg ever, none for D in G's update, none for the teacher; and each update moves its own network."""
    G, D, f_seg = gan_nets()
    opt_g, opt_d = adams(G, D)
    x_s, x_t = images(2, 2, 3, 32, 48)
    y = torch.randint(0, 3, (2, 32, 48))
    in_d_update = {}

    def look(terms):
        if "L_D" in terms:  # before D is updated
            assert all(p.grad is None for p in G.parameters())
            in_d_update.update({k: p.grad.clone() for k, p in D.named_parameters()})

    gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, look)
    assert in_d_update and all(torch.equal(p.grad, in_d_update[k]) for k, p in D.named_parameters())
    assert all(p.grad is None for p in f_seg.parameters())
    assert all(p.grad is not None for p in G.parameters())

    student, teacher = students()
    optimiser = torch.optim.Adam(student.parameters(), 1e-2, fused=True)
    average = MovingAverage(teacher, student)
    x = {"x_s": x_s, "x_t": x_t}
    selfens_step(DomainPasses(student), teacher, average, optimiser, x, y, 0.1, 3.0, 0.9, PLAIN, no_check)
    assert all(p.grad is None and not p.requires_grad and not p.is_inference() for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_spectral_norm_iterates_once_a_step(monkeypatch):
    """A power iteration per update of D is what the method needs; three a step cost time and move D between its uses."""
    G, D, f_seg = gan_nets()
    calls = []
    spectral = torch.nn.utils.parametrizations._SpectralNorm
    original = spectral._power_method
    monkeypatch.setattr(spectral, "_power_method", lambda self, *args: (calls.append(self), original(self, *args)))
    opt_g, opt_d = adams(G, D)
    x_s, x_t = images(2, 2, 3, 32, 48)
    convs = sum(isinstance(m, nn.Conv2d) for m in D.modules())
    for step in range(1, 4):
        gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, torch.zeros(2, 32, 48).long(), 3.0, PLAIN, no_check)
        assert len(calls) == step * convs and len(set(calls)) == convs


@pytest.mark.parametrize("bad", ["f_seg", "warm-up", "D", "G", "student"])
def test_losses_are_checked_before_the_update(bad):
    """A step whose loss is refused leaves the network as it was: the checkpoint after it is from before it."""
    G, D, f_seg = gan_nets()
    student, teacher = students()
    opt_g, opt_d, opt_f, opt_s = adams(G, D, f_seg.requires_grad_(bad == "f_seg"), student)
    x_s, x_t = images(2, 2, 3, 32, 48)
    y = torch.randint(0, 3, (2, 32, 48))
    net, terms, step = {
        "f_seg": (f_seg, {"L_fseg"}, lambda check: fseg_step(f_seg, opt_f, x_s, y, PLAIN, check)),
        "warm-up": (G, {"L_rec"}, lambda check: warm_up_step(G, opt_g, x_s, x_t, PLAIN, check)),
        "D": (D, {"L_D"}, lambda check: gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, check)),
        "G": (G, {"L_GAN", "L_sem"}, lambda check: gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, check)),
        "student": (student, {"L_sup", "L_con", "delta_con"}, lambda check: selfens_step(
            DomainPasses(student), teacher, MovingAverage(teacher, student), opt_s, {"x_s": x_s, "x_t": x_t}, y, 0.1, 3.0, 0.9,
            PLAIN, check)),
    }[bad]
    before = {k: v.detach().clone() for k, v in net.named_parameters()}

    def refuse(found):
        if found.keys() == terms:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        step(refuse)
    assert all(torch.equal(v, before[k]) for k, v in net.named_parameters())


# --------------------------------------------------------------------------------------------------- stays fast


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_layer_keeps_channels_last(precision):
    """A layer that answers in another layout makes the next one copy. f_seg, G, D and student, batch 2, no padding."""
    G, D, f_seg = gan_nets(torch.float32)
    student, _ = students(torch.float32)
    x_s, x_t = images(2, 2, 3, 32, 48, dtype=torch.float32)
    wrong = []

    def look(module, inputs, output):
        for x in (*inputs, output):
            if isinstance(x, torch.Tensor) and x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
                wrong.append(type(module).__name__)

    for net in (G, D, f_seg, student):
        for m in net.modules():
            if not [*m.children()]:
                m.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        f_seg(G(x_s, x_t)), D(x_s, x_t), student(x_t)
    assert not wrong, sorted(set(wrong))


def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a number makes a GPU stand still; only what is logged is read, and that is the stage's."""
    def refuse(self, *args):
        raise AssertionError("a number was read within a step")

    G, D, f_seg = gan_nets(torch.float32)
    student, teacher = students(torch.float32)
    opt_g, opt_d, opt_s = adams(G, D, student)
    average = MovingAverage(teacher, student)
    x_s, x_t = images(2, 2, 3, 32, 48, dtype=torch.float32)
    y = torch.randint(0, 3, (2, 32, 48))
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    warm_up_step(G, opt_g, x_s, x_t, PLAIN, no_check)
    gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, no_check)
    selfens_step(DomainPasses(student), teacher, average, opt_s, {"x_s": x_s, "x_t": x_t}, y, 0.1, 3.0, 0.9, PLAIN, no_check)


# -------------------------------------------------------------------------------------------------------- compiled


@needs_compiler
def test_compiled_gan_step_agrees_with_eager():
    """compile=true changes last bits only, and no name in a state dict."""
    torch.manual_seed(0)
    x_s, x_t = images(2, 2, 3, 32, 48, dtype=torch.float32)
    y = torch.randint(0, 3, (2, 32, 48))
    results = []
    for compiled in (False, True):
        G, D, f_seg = gan_nets(torch.float32)
        names = [*G.state_dict(), *D.state_dict()]
        if compiled:
            for net in (G, D, f_seg):
                net.compile(dynamic=False)
        opt_g, opt_d = adams(G, D, lr=1e-4)
        terms = gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y, 3.0, PLAIN, no_check)
        assert [*G.state_dict(), *D.state_dict()] == names
        results.append(terms | {f"{n}.{k}": p.grad for n, net in (("G", G), ("D", D)) for k, p in net.named_parameters()})
    compare(*results, tolerance=1e-3, floor=0.1)  # a bias before a norm has a gradient of 0, and rounding of any sign


@needs_compiler
def test_compiled_stage_trains_saves_plain_names_and_resumes(stage, tmp_path, monkeypatch):
    """Self-ensembling with compile=true: stopped and continued it ends with the same bits, near those without compile."""
    states = {}
    for name, compiled in (("eager", "false"), ("whole", "true"), ("halves", "true")):
        args = [f"output={tmp_path}", f"name={name}", f"compile={compiled}", "device=cpu", "precision=float32", "save_every=1",
                "log_every=1", "source.images=4", "target.images=4", "source.size=[32, 48]", "target.size=[32, 48]",
                "selfens.variant=self_ensembling", "selfens.steps=3", "selfens.batch=2", "selfens.width=0.03",
                "selfens.lr=1e-4", "selfens.aspp_rates=[1]", "selfens.dropout=0"]  # fmt: skip
        config = tmp_path / "empty.yaml"
        config.write_text("{}")
        if name == "halves":
            with monkeypatch.context() as patch:
                calls = []

                def stop(*a, step=train_selfens.selfens_step, calls=calls):
                    calls.append(1)
                    if len(calls) == 3:
                        raise KeyboardInterrupt
                    return step(*a)

                patch.setattr(train_selfens, "selfens_step", stop)
                with pytest.raises(KeyboardInterrupt):
                    stage("train_selfens", config, *args)
        stage("train_selfens", config, *args)
        runtime = importlib.import_module("runtime")
        state = runtime.load_checkpoint(tmp_path / name / "selfens/self_ensembling/last.pt", "")
        states[name] = {f"{part}.{k}": v for part in ("student", "teacher") for k, v in state[part].items()}
    assert states["eager"].keys() == states["whole"].keys()
    assert all(torch.equal(v, states["halves"][k]) for k, v in states["whole"].items())
    for k, v in states["whole"].items():  # Adam's first steps are lr in size whatever the gradient's last bits
        torch.testing.assert_close(v, states["eager"][k], atol=1e-3, rtol=1e-2)
