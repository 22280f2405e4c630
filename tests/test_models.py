"""The networks: formulas, published shapes, pretrained weights, and that pixels stay where they were."""

import re
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2.functional import normalize

import models
from conftest import REPO
from models import DeepLabVGG16, FCN8s, Generator, MultiScaleDiscriminator, ResBlock, adain, build_segmenter, step_costs
from runtime import UserError, load_config
from train_gan import check_depth

TRUNK = sum(9 * a * b + b for a, b in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
                                       (256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)))  # fmt: skip
RES_BLOCK = 2 * (9 * 256 * 256 + 256)
PUBLISHED = {
    "fcn8s": (lambda: FCN8s(19), TRUNK + (7 * 7 * 512 * 4096 + 4096) + (4096 * 4096 + 4096)
              + 19 * (4096 + 512 + 256 + 3) + 19 * 19 * (4 * 4 + 4 * 4 + 16 * 16)),
    "deeplab": (lambda: DeepLabVGG16(19), TRUNK + 4 * ((9 * 512 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 19 + 19))),
    "generator": (Generator,
                  2 * (49 * 3 * 64 + 64) + 2 * (16 * 64 * 128 + 128) + 2 * (16 * 128 * 256 + 256)  # both encoders
                  + 2 * (16 * 256 * 256 + 256) + (256 * 8 + 8) + 8 * RES_BLOCK  # E_t goes on; E_s's and decoder's blocks
                  + (8 * 256 + 256) + (256 * 256 + 256) + (256 + 1) * (2 * 2 * 256 * 4)  # style -> AdaIN parameters
                  + (25 * 256 * 128 + 128 + 2 * 128) + (25 * 128 * 64 + 64 + 2 * 64) + (49 * 64 * 3 + 3)),
    "discriminator": (MultiScaleDiscriminator,
                      3 * (16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 64 + 128 + 256 + 512 + 512 + 1)),
}  # fmt: skip


def tiny_generator(downsamples=2):
    return Generator(width=4, style_dim=4, mlp_dim=8, downsamples=downsamples, res_blocks=1)


def tiny(name):
    """A tiny network as a function of the image alone, and the network."""
    if name == "generator":
        net = tiny_generator().eval()
        style = torch.rand(1, 3, 16, 16) * 2 - 1
        return (lambda x: net(x, style.to(x).expand(len(x), -1, -1, -1))), net
    if name == "fcn8s":
        net = FCN8s(3, 0.04).eval()
        return net, net
    net = DeepLabVGG16(3, 0.04, rates=(1, 2)).eval()
    return (lambda x: net(x, full_size=True)), net


# ----------------------------------------------------------------------------------------------------------- AdaIN


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 8, 8)])
def test_adain_is_the_formula(shape):
    """AdaIN carries the style, so it must be gamma (c - mu) / sigma + beta with the caller's parameters."""
    rng = np.random.default_rng(0)
    c, gamma, beta = rng.normal(3, 2, shape), rng.normal(size=shape[:2]), rng.normal(size=shape[:2])
    mu, var = c.mean((2, 3), keepdims=True), c.var((2, 3), keepdims=True)
    expected = gamma[..., None, None] * (c - mu) / np.sqrt(var + 1e-5) + beta[..., None, None]
    got = adain(*(torch.tensor(a, dtype=torch.float32) for a in (c, gamma, beta)))
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


def test_instance_norm_is_adain_with_one_and_zero():
    """The content encoder's blocks share the code: without parameters they must be plain instance norm."""
    x = torch.randn(2, 4, 6, 9)
    torch.testing.assert_close(adain(x, torch.ones(2, 4), torch.zeros(2, 4)), F.instance_norm(x))
    block = ResBlock(4)
    torch.testing.assert_close(block(x), block(x, torch.ones(2, 2, 4), torch.zeros(2, 2, 4)))
    assert not torch.allclose(block(x), block(x, 2 * torch.ones(2, 2, 4), torch.zeros(2, 2, 4)))


def test_adain_keeps_bfloat16_accurate():
    """Statistics of a large mean lose everything in bfloat16, so they are taken in float32."""
    x = (torch.randn(1, 2, 32, 32) + 20).bfloat16()
    expected = F.instance_norm(x.double())
    got = adain(x, torch.ones(1, 2), torch.zeros(1, 2))
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch, shared", [(1, False), (1, True), (3, False), (3, True)])
def test_gradients_of_adain_are_autograds(batch, shared, layout):
    """The backward pass is written by hand: it must be the formula's own, for every layout, in float64 and in float32."""
    torch.manual_seed(0)
    shape, rows = (batch, 4, 5, 6), 1 if shared else batch
    c, g = ((torch.randn(shape, dtype=torch.float64) + 3).contiguous(memory_format=layout) for _ in range(2))
    gamma, beta = torch.randn(2, rows, 4, dtype=torch.float64)

    def formula(c, gamma, beta):
        centred = c - c.mean((2, 3), keepdim=True)
        sigma = (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        return gamma[..., None, None] * centred / sigma + beta[..., None, None]

    def outcome(call, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (c, gamma, beta)]
        y = call(*leaves)
        assert y.is_contiguous(memory_format=layout)
        return y, *torch.autograd.grad(y, leaves, g.to(dtype))

    expected = outcome(formula, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        for ours, theirs in zip(outcome(adain, dtype), expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_generator_output_depends_on_the_guide_and_on_the_content():
    """Style reaches the image only through AdaIN's parameters; a cut wire would leave one fixed look."""
    torch.manual_seed(0)
    net, x, y = tiny_generator(), torch.rand(1, 3, 16, 24) - 0.5, torch.rand(1, 3, 32, 16) - 0.5
    base = net(x, y)
    assert (net(x, y * 0.2 + 0.6) - base).abs().max() > 1e-3
    assert (net(x.flip(-1), y) - base).abs().max() > 1e-3
    assert base.abs().max() <= 1


# ------------------------------------------------------------------------------------------------ published shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_at_published_width(name):
    """A count from the published layer shapes catches a missing layer, a wrong width or a doubled bias."""
    make, expected = PUBLISHED[name]
    with torch.device("meta"):
        net = make()
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("network", [FCN8s, DeepLabVGG16])
def test_trunk_is_torchvisions_vgg16(network, batch_norm):
    """Pretrained weights load only where names and shapes are torchvision's."""
    with torch.device("meta"):
        theirs = (torchvision.models.vgg16_bn if batch_norm else torchvision.models.vgg16)(weights=None)
        ours = network(19, batch_norm=batch_norm)
    shapes = [{k: v.shape for k, v in m.features.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_deeplab_has_output_stride_8_and_dilated_conv5(batch_norm):
    """DeepLab keeps pool3's resolution: pool4 and pool5 at stride 1, conv5 dilated by 2, everything before as in VGG."""
    net = DeepLabVGG16(3, 0.03, batch_norm, rates=(2, 5))
    convs = [m for m in net.features if isinstance(m, nn.Conv2d)]
    assert [m.dilation[0] for m in convs] == [1] * 10 + [2] * 3
    assert [m.stride for m in net.features if isinstance(m, nn.MaxPool2d)][3:] == [1, 1]
    assert [branch[0].dilation for branch in net.aspp] == [(2, 2), (5, 5)]
    assert net.eval()(torch.zeros(1, 3, 64, 40)).shape == (1, 3, 8, 5)


# --------------------------------------------------------------------------------------------- pretrained weights


@pytest.mark.parametrize("network", [FCN8s, DeepLabVGG16])
def test_pretrained_file_is_copied_exactly(tmp_path, monkeypatch, network):
    """A trunk that is loaded only in part, or into other layers, trains worse and says nothing."""
    monkeypatch.setitem(cfgs, "D", [c if c == "M" else c // 32 for c in cfgs["D"]])
    trunk = {f"features.{k}": torch.randn_like(v) for k, v in make_layers(cfgs["D"]).state_dict().items()}
    torch.save(trunk | {"classifier.6.weight": torch.zeros(2)}, tmp_path / "vgg.pth")
    kwargs = {"width": 1.0} if network is DeepLabVGG16 else {"width": 0.999}
    loaded = network(3, pretrained=str(tmp_path / "vgg.pth"), **kwargs).features.state_dict()
    assert loaded.keys() == {k.removeprefix("features.") for k in trunk}
    assert all(torch.equal(v, trunk[f"features.{k}"]) for k, v in loaded.items())


def test_pretrained_classifier_becomes_fc6_and_fc7(tmp_path, monkeypatch):
    """FCN-8s is VGG-16 made convolutional: at width 1 its fc6 and fc7 give VGG's own classifier activations."""
    monkeypatch.setitem(cfgs, "D", [c if c == "M" else 2 for c in cfgs["D"]])
    state = {f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}
    fc6, fc7 = nn.Linear(2 * 49, 4096), nn.Linear(4096, 4096)
    for name, layer in (("classifier.0", fc6), ("classifier.3", fc7)):
        state |= {f"{name}.{k}": v for k, v in layer.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    net = FCN8s(3, 1.0, pretrained=str(tmp_path / "vgg.pth"))
    x = torch.randn(1, 2, 7, 7)
    with torch.no_grad():
        ours = net.fc7(F.relu(net.fc6(x)))[..., 3, 3]
        torch.testing.assert_close(ours, fc7(F.relu(fc6(x.flatten(1)))), atol=1e-5, rtol=1e-4)


def test_imagenet_without_network_says_where_the_file_belongs(tmp_path, monkeypatch):
    """Without network, and on cluster nodes, the user has to place the file by hand and must learn where."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        DeepLabVGG16(3, 1.0, batch_norm=True, pretrained="imagenet")
    assert str(tmp_path / "checkpoints" / "vgg16_bn-6c64b313.pth") in str(error.value)


def test_pretrained_file_errors_name_the_file(tmp_path):
    """A missing, foreign, or wrong-width file stops the run with its name, not with a traceback."""
    with pytest.raises(UserError, match="nowhere.pth"):
        FCN8s(3, 0.05, pretrained=str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="text.pth"):
        FCN8s(3, 0.05, pretrained=str(tmp_path / "text.pth"))
    trunk = {f"features.{k}": v for k, v in FCN8s(3, 0.05).features.state_dict().items()}
    torch.save(trunk, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"vgg.pth.*another architecture.*0\.bias"):
        DeepLabVGG16(3, 0.1, pretrained=str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="vgg.pth.*another architecture"):
        DeepLabVGG16(3, 0.05, batch_norm=True, pretrained=str(tmp_path / "vgg.pth"))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth"):
        DeepLabVGG16(3, 0.05, pretrained=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 3), (3, 5), (4, 8)])
def test_fc6_on_maps_that_are_smaller_than_its_window(rows, columns):
    """Small crops: the parts of the 7x7 window that meet padding alone have a gradient of 0, in bfloat16, too."""
    torch.manual_seed(0)
    net = FCN8s(3, 0.25).eval()
    x = torch.rand(4, 3, 32 * rows, 32 * columns) * 2 - 1
    whole = F.conv2d(net.features(net.normalise(x)), net.fc6.weight, net.fc6.bias, padding=3)
    seen = []
    net.fc7.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    torch.testing.assert_close(seen[0], F.relu(whole), atol=1e-5, rtol=1e-4)
    for _ in range(5):
        used = [torch.full((net.fc6.weight.numel() // k,), torch.nan) for k in (1, 2, 4)]
        del used  # what memory holds before the gradient is written there
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            net(x).float().square().mean().backward()
        gradient = net.fc6.weight.grad
        assert torch.isfinite(gradient).all() and gradient.any()
        for k in range(7):
            assert abs(k - 3) < rows or not gradient[:, :, k].any()
            assert abs(k - 3) < columns or not gradient[:, :, :, k].any()


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [(33, 47), (40, 64), (8, 17), (65, 31)])
@pytest.mark.parametrize("name", ["generator", "fcn8s", "deeplab"])
def test_any_image_size(name, size):
    """Labels are compared pixel by pixel, so the output has the input's size whatever the strides are."""
    call, net = tiny(name)
    with torch.no_grad():
        assert call(torch.zeros(2, 3, *size)).shape[-2:] == size
        if name == "deeplab":
            assert net(torch.zeros(1, 3, *size)).shape[-2:] == (-(-size[0] // 8), -(-size[1] // 8))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ["generator", "fcn8s", "deeplab"])
def test_network_commutes_with_mirroring(name, axis):
    """With mirror-symmetric kernels a mirrored image must give the mirrored output: any layer that shifts breaks it."""
    torch.manual_seed(0)
    call, net = tiny(name)
    net.double()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                m.weight.copy_((m.weight + m.weight.flip(axis)) / 2)
        x = torch.rand(1, 3, 64, 96, dtype=torch.float64) * 2 - 1
        out = call(x)
        assert out.std() > 1e-4
        torch.testing.assert_close(call(x.flip(axis)).flip(axis), out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name, bottom, right", [("generator", 3, 1), ("fcn8s", 19, 13), ("deeplab", 3, 5)])
def test_padding_is_at_the_right_and_bottom(name, bottom, right):
    """Sizes that the stride does not divide: the output is the padded image's, cut at the right and bottom, unshifted."""
    torch.manual_seed(0)
    call, _ = tiny(name)
    x = torch.rand(1, 3, 45, 51) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(call(x), call(F.pad(x, (0, right, 0, bottom), mode="replicate"))[..., :45, :51])


@pytest.mark.parametrize("width", [44, 45, 47])
def test_change_of_one_column_stays_at_that_column(width):
    """A pole must be repainted where it stands: G's answer to a change in one column is centred on it, at any size."""
    offsets = torch.arange(-12, 13)
    centres = []
    for seed in range(8):
        torch.manual_seed(seed)
        net = tiny_generator()
        x, x_t, response = torch.rand(1, 3, 18, width) - 0.5, torch.rand(1, 3, 16, 16) - 0.5, 0
        with torch.no_grad():
            net.decoder[-1].weight *= 0.02  # tanh must not saturate
            for m in net.modules():
                if isinstance(m, nn.Conv2d):
                    m.weight.copy_((m.weight + m.weight.flip(-1)) / 2)
            columns = range(13, width - 13)
            changed = x.repeat(len(columns), 1, 1, 1)
            for k, j in enumerate(columns):
                changed[k, ..., j] += 0.05
            profiles = (net(changed, x_t.expand(len(changed), -1, -1, -1)) - net(x, x_t)).abs().sum((1, 2))
        for profile, j in zip(profiles, columns, strict=True):
            local = profile[j - 12 : j + 13] - profile[j - 12 : j + 13].min()  # instance norm answers everywhere a little
            response = response + local / local.sum()
        centres.append(float((response * offsets).sum() / response.sum()))
    assert abs(np.mean(centres)) < 0.3


def test_generator_fitted_to_the_identity_keeps_poles_in_their_columns():
    """End to end, at a size the stride does not divide: a one-pixel pole comes out in the column it went in."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net, style = Generator(width=8, style_dim=4, mlp_dim=16, downsamples=1, res_blocks=1), torch.zeros(1, 3, 16, 16)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3, (0.9, 0.99))

    def poles(n):
        columns = torch.tensor(rng.integers(0, 37, n))
        x = torch.full((n, 3, 7, 37), -0.6)
        x[torch.arange(n), :, :, columns] = 0.9
        return x, columns, style.expand(n, -1, -1, -1)

    for step in range(150):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 150)
        x, _, x_t = poles(16)
        loss = ((net(x, x_t) - x).square() * (1 + 20 * (x > 0))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, columns, x_t = poles(60)
    with torch.no_grad():
        found = net(x, x_t).mean((1, 2)).argmax(1)
    assert (found == columns).float().mean() >= 0.9


def test_deeplab_upsampling_puts_a_cell_onto_its_own_pixels():
    """Half-pixel convention: cell i covers pixels 8i to 8i + 7, so its centre of mass is at 8i + 3.5."""
    for i, j in ((2, 3), (4, 5), (3, 3)):
        logits = torch.zeros(1, 1, 7, 9)
        logits[0, 0, i, j] = 1
        full = DeepLabVGG16.upsample(logits, (53, 70))[0, 0].double()
        assert full.shape == (53, 70)
        centre = [float((full.sum(1 - k) * torch.arange(n)).sum() / full.sum()) for k, n in enumerate((53, 70))]
        assert centre == pytest.approx([8 * i + 3.5, 8 * j + 3.5])


@pytest.mark.parametrize("name, scale", [("up7", 2), ("up4", 2), ("up3", 8)])
def test_fcn_upsampling_starts_bilinear(name, scale):
    """FCN-8s's learned up-sampling starts as the bilinear one that its skips are aligned to, class by class."""
    layer = getattr(FCN8s(3, 0.03), name)
    x = torch.randn(1, 3, 6, 5)
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    with torch.no_grad():
        got = layer(x)
    assert got.shape == expected.shape
    inside = slice(scale, -scale)
    torch.testing.assert_close(got[..., inside, inside], expected[..., inside, inside], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("layers, scales", [(1, 1), (2, 3), (4, 2)])
def test_discriminator_layers_and_scales(layers, scales):
    """Scales and layers are config keys: each scale sees half the size of the last, each layer halves it again."""
    maps = MultiScaleDiscriminator(4, layers, scales)(torch.randn(2, 3, 64, 96))
    assert [m.shape for m in maps] == [(2, 1, 64 >> (layers + s), 96 >> (layers + s)) for s in range(scales)]


def test_every_discriminator_convolution_is_spectrally_normalised():
    """The paper's D is 1-Lipschitz per layer: after some power iterations every largest singular value is 1."""
    torch.manual_seed(0)
    D = MultiScaleDiscriminator(8, 3, 2).train()
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 2 * (3 + 1)
    with torch.no_grad():
        for m in convs:
            assert torch.nn.utils.parametrize.is_parametrized(m, "weight")
            m.parametrizations.weight.original.mul_(7)  # whatever the optimiser makes of it
        for _ in range(60):
            D(torch.randn(1, 3, 32, 32))
        for m in convs:
            assert float(torch.linalg.matrix_norm(m.weight.flatten(1), 2)) == pytest.approx(1, abs=0.02)


def test_segmenters_use_imagenet_normalisation():
    """Images are in [-1, 1] outside; torchvision's weights expect (x - mean) / std of [0, 1]."""
    x = torch.rand(2, 3, 4, 5)
    expected = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(FCN8s(2, 0.03).normalise(2 * x - 1), expected)


# ------------------------------------------------------------------------------------------------------------- cost


def test_step_costs_count_every_pass():
    """The estimate of GPU hours rests on this count: a hand count of f_seg's and of the segmenter's convolutions."""
    cfg = load_config(None, ["fseg.batch=2", "selfens.batch=2", "fseg.batch_norm=false", "selfens.batch_norm=false"])
    costs = step_costs(cfg, 10)
    segmenter = build_segmenter(cfg, 10)
    counted = {}

    def count(module, _, y):
        counted[module] = 2 * y.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    for m in segmenter.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(count)
    with torch.no_grad():
        segmenter(torch.zeros(2, 3, *cfg.source.size))
    first = next(m for m in segmenter.modules() if isinstance(m, nn.Conv2d))
    forward = sum(counted.values())
    # The teacher's pass, and for each of three domains a forward and twice that back; nothing goes back into the image.
    assert costs["selfens"][1] == forward + 3 * (3 * forward - counted[first])
    assert costs["selfens"][0] == sum(p.numel() for p in segmenter.parameters())
    assert costs["augment"][1] < costs["gan"][1]
    assert [name for name, (_, _, kept, _) in costs.items() if not kept] == ["augment"]


@pytest.mark.parametrize("name", ["gta5_cityscapes", "synthia_cityscapes"])
def test_estimates_in_the_configs_are_what_the_command_prints(name, capsys, monkeypatch):
    """A number in a comment goes stale when a step count changes; and the full-size networks must fit the crops."""
    path = REPO / "configs" / f"{name}.yaml"
    monkeypatch.setattr("sys.argv", ["models.py", str(path), "--peak", "312", "--share", "0.2"])
    models.main()
    printed, text = capsys.readouterr().out, " ".join(path.read_text().replace("#", " ").split())
    hours = re.search(r"([\d.]+) hours in all", printed)[1]
    flops = {m[1]: f"{float(m[2]):.1f}" for m in re.finditer(r"^(\w+) +[\d,]+ +([\d.]+) ", printed, re.M)}
    assert f"{hours} GPU hours" in text
    assert f"({flops['f_seg']} TFLOP for f_seg, {flops['gan']} for G and D, {flops['selfens']} for self-ensembling)" in text
    check_depth(load_config(str(path)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_each_element_with_probability_p(p):
    """Drawn by our own code on the CPU: shares, scale, independence of neighbours, gradient, and nothing in eval mode."""
    torch.manual_seed(0)
    layer = models.Dropout(p)
    x = torch.ones(8, 16, 33, 31).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    kept = (y != 0).double()
    n, deviation = x.numel(), (p * (1 - p)) ** 0.5
    assert float(kept.mean()) == pytest.approx(1 - p, abs=4 * deviation / n**0.5)
    torch.testing.assert_close(y[y != 0].detach(), torch.full((int(kept.sum()),), 1 / (1 - p)), atol=0, rtol=1e-4)
    for dim in range(4):  # neighbours of each kind: images, channels, rows, columns
        a, b = kept.narrow(dim, 0, x.shape[dim] - 1) - (1 - p), kept.narrow(dim, 1, x.shape[dim] - 1) - (1 - p)
        assert abs(float((a * b).mean())) < 4 * deviation**2 / a.numel() ** 0.5
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert layer(x).ne(y).any() and torch.equal(layer.eval()(x), x)
