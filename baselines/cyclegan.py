"""CycleGAN (Zhu, Park, Isola, Efros, ICCV 2017): two generators translate there and back, without pairs.

    python baselines/cyclegan.py cfg.yaml
    python baselines/cyclegan.py configs/carla_camvid.yaml --lambda-cycle 5 --lambda-identity 0 name=loose
    python baselines/cyclegan.py cfg.yaml --restart            begin anew; the old folder is kept aside

Reads the images of source (X) and target (Y); writes OUTPUT/NAME/baselines/cyclegan/: last.pt, log.jsonl,
TensorBoard events, image sheets, and after the last step images/NAME.png, every source image translated, for
augment.py's method `folder`, whose command it prints. A run that was stopped continues from its last
checkpoint; images that are there are not made again.

    --lambda-cycle L       weight of L_cyc beside L_GAN (10)
    --lambda-identity R    weight of L_idt, relative to L_cyc's (0.5, as for the paper's paintings); 0 is off

Steps, batch, crop, learning rates, widths and depths are those of the config's `gan` section. The paper's are
the losses and their weights, Adam with beta_1 = 0.5, a rate that is constant for half of the steps and then
falls to 0, instance norm. Ours, so that the comparison with TGCF-DA is one of methods: G and F are its
generator without the style; D_X and D_Y are its discriminators, the losses summed over their scales, with its
rates, weight decay and spectral norm. D's loss is not halved, and D is updated first. Every step is of both
players: G has no warm-up, as TGCF-DA's has. There is no pool of 50 earlier images, as processes would differ.
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks here alone
from runtime import (  # noqa: E402
    Run, UserError, all_reduce, atomic_write, autocast, average_gradients, command_line, rank, run_main,
    seed_torch, world,
)  # fmt: skip

# isort: split
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datasets import Batches, Scenes, make_sheet, some_of, to_float, to_uint8  # noqa: E402
from losses import linear, lsgan_d, lsgan_g, set_lr, wide  # noqa: E402
from models import (  # noqa: E402
    InstanceNorm, ResBlock, build_discriminator, check_sizes, pad_to_multiple, reflected,
)  # fmt: skip


class PlainBlock(ResBlock):
    """x + norm(conv(relu(norm(conv(x))))), the norm being instance norm without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.new_ones(1, 2, x.shape[1]), x.new_zeros(1, 2, x.shape[1]))


class Translator(nn.Module):
    """models.Generator without the style: its E_s, as many residual blocks, its decoder with instance norm.

    Arguments: cfg.yaml's `gan` section. x: (N, 3, H, W) in [-1, 1] -> the same.
    """

    def __init__(self, width=64, downsamples=2, res_blocks=4):
        super().__init__()
        self.multiple, c = 2**downsamples, width
        down, up = [reflected(3, c, 7), InstanceNorm(), nn.ReLU()], []
        for _ in range(downsamples):
            down += [reflected(c, 2 * c, 4, 2), InstanceNorm(), nn.ReLU()]
            c *= 2
        self.encoder = nn.Sequential(*down)
        self.blocks = nn.Sequential(*(PlainBlock(c) for _ in range(2 * res_blocks)))
        for _ in range(downsamples):
            up += [nn.Upsample(scale_factor=2), reflected(c, c // 2, 5), InstanceNorm(), nn.ReLU()]
            c //= 2
        self.decoder = nn.Sequential(*up, reflected(c, 3, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.decoder(self.blocks(self.encoder(pad_to_multiple(x, self.multiple))))
        return torch.tanh(wide(y))[..., : x.shape[-2], : x.shape[-1]]


def build_translator(cfg) -> Translator:
    return Translator(cfg.gan.width, cfg.gan.downsamples, cfg.gan.res_blocks)


def check(cfg) -> None:
    """Raises UserError for sizes that do not fit, and for no steps at all."""
    check_sizes(cfg)
    if not cfg.gan.steps:
        raise UserError("gan.steps=0: the generator would know nothing; raise it")


def prepare(cfg, run: Run, nets: dict, optimisers: dict) -> SimpleNamespace:
    """The networks on the run's device and their Adams, new or as the checkpoint has them, by their names.

    nets: {name: network}; optimisers: {name: (base learning rate, the names of its networks)}.
    """
    for net in nets.values():
        net.to(run.device, memory_format=torch.channels_last)
        if cfg.compile:  # in place, so that the names in checkpoints stay
            net.compile(dynamic=False)
    made = {}
    for name, (lr, names) in optimisers.items():
        groups = [{"params": [p for n in names for p in nets[n].parameters()], "base_lr": lr}]
        made[name] = torch.optim.Adam(groups, lr, (0.5, 0.999), weight_decay=cfg.gan.weight_decay, fused=True)
    run.load(nets | made)
    sizes = [f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in nets.items()]
    print(f"{run.folder.name}: parameters: {', '.join(sizes)}")
    return SimpleNamespace(**nets, **made)


def update_d(games: list[tuple], opt_d, cast) -> Tensor:
    """One update of discriminators on (D, real images, fake ones) each; L_D. They are left in eval mode."""
    opt_d.zero_grad()
    L_D = 0
    # L_D = E[(D(y) - 1)^2] + E[D(G(x))^2], summed over scales and games
    for D, real, fake in games:
        D.train().requires_grad_(True)  # training mode is what makes spectral norm iterate: here, once a step
        with cast:
            scores = D(torch.cat([real, fake.detach()]))
        real, fake = zip(*(score.chunk(2) for score in scores), strict=True)
        L_D = L_D + sum(lsgan_d(real, fake))
    L_D.backward()
    for D, _, _ in games:
        average_gradients(D)
        D.eval().requires_grad_(False)
    opt_d.step()
    return L_D.detach()


def write_images(run: Run, G, source: Scenes, items: str) -> None:
    """G(x) of every source image, whole, to images/NAME.png, where it is missing; prints what comes next."""
    folder, method, size = run.folder / "images", run.folder.name, run.cfg.inference_batch
    files = [folder / f"{sample.name}.png" for sample in source.samples]
    batches = [range(len(files))[first : first + size] for first in range(0, len(files), size)]
    # A batch is translated as a whole: an image's bits do not depend on which others are there.
    missing = [batch for batch in batches if not all(files[k].exists() for k in batch)]
    all_reduce(torch.zeros(1))  # no process begins before all have looked
    for batch in tqdm(missing[rank() :: world()], "images", mininterval=1, disable=rank() > 0):
        x = to_float(torch.stack([source.image(k) for k in batch]), run.device)
        with torch.inference_mode(), autocast(run.device, run.precision):
            y = G(x)
        for k, image in zip(batch, map(to_uint8, y), strict=True):
            atomic_write(files[k], lambda file, image=image: Image.fromarray(image).save(file, "PNG"))
    all_reduce(torch.zeros(1))
    print(f"{method}: {len(files)} images in {folder}; next: python augment.py {items} "
          f"name={run.cfg.name}-{method} augment.method=folder augment.folder={shlex.quote(str(folder))} "
          "augment.styles_per_image=1")


def cyclegan_step(nets, x, y, lambda_cycle: float, lambda_identity: float, cast) -> dict:
    """One update of D_X and D_Y, then one of G and F, on one batch. Returns the loss terms, scalars.

    nets: G (X to Y), F (Y to X), D_X, D_Y, opt_g, opt_d; x, y: (N, 3, H, W) in [-1, 1], source and target;
    lambda_identity: relative to lambda_cycle; cast: the context in which networks run.
    """
    G, F, D_X, D_Y = nets.G, nets.F, nets.D_X, nets.D_Y
    with cast:
        y_g, x_g = G(x), F(y)

    # L_D = E[(D_Y(y) - 1)^2] + E[D_Y(G(x))^2] + E[(D_X(x) - 1)^2] + E[D_X(F(y))^2]
    L_D = update_d([(D_Y, y, y_g), (D_X, x, x_g)], nets.opt_d, cast)

    # L_GAN = E[(D_Y(G(x)) - 1)^2] + E[(D_X(F(y)) - 1)^2]
    with cast:
        scores = D_Y(y_g), D_X(x_g)
    L_GAN = lsgan_g(scores[0]) + lsgan_g(scores[1])

    # L_cyc = E|F(G(x)) - x| + E|G(F(y)) - y|, a mean over pixels and channels
    with cast:
        x_rec, y_rec = F(y_g), G(x_g)
    L_cyc = (x_rec - x).abs().mean() + (y_rec - y).abs().mean()

    # L = L_GAN + lambda_cycle (L_cyc + lambda_identity L_idt);  L_idt = E|G(y) - y| + E|F(x) - x|
    terms = {"L_D": L_D, "L_GAN": L_GAN, "L_cyc": L_cyc}
    loss = L_GAN + lambda_cycle * L_cyc
    if lambda_identity:
        with cast:
            y_idt, x_idt = G(y), F(x)
        terms["L_idt"] = (y_idt - y).abs().mean() + (x_idt - x).abs().mean()
        loss = loss + lambda_cycle * lambda_identity * terms["L_idt"]
    nets.opt_g.zero_grad()
    loss.backward()
    average_gradients(G)
    average_gradients(F)
    nets.opt_g.step()
    return {name: term.detach() for name, term in terms.items()}


@torch.inference_mode()
def write_sheet(run: Run, step: int, nets, source: Scenes, target: Scenes) -> None:
    """Sheet of fixed images of both domains, what they become, and what comes back."""
    rows = []
    for x, y in zip(*(some_of(scenes, 6, run.device).split(1) for scenes in (source, target)), strict=True):
        with autocast(run.device, run.precision):
            y_g, x_g = nets.G(x), nets.F(y)
            row = [x, y_g, nets.F(y_g), y, x_g, nets.G(x_g)]
        rows.append([to_uint8(image[0]) for image in row])
    columns = ["source x", "translated G(x)", "back F(G(x))", "target y", "translated F(y)", "back G(F(y))"]
    run.sheet(step, "translated", make_sheet(columns, rows))


def build_nets(cfg, run: Run):
    """G, F, D_X, D_Y and their optimisers, new or as the checkpoint has them."""
    seed_torch(cfg.seed, "cyclegan", "init")
    nets = {"G": build_translator(cfg), "F": build_translator(cfg),
            "D_X": build_discriminator(cfg), "D_Y": build_discriminator(cfg)}  # fmt: skip
    optimisers = {"opt_g": (cfg.gan.lr_g, ("G", "F")), "opt_d": (cfg.gan.lr_d, ("D_X", "D_Y"))}
    return prepare(cfg, run, nets, optimisers)


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}),
                             ("--lambda-cycle", {"type": float, "default": 10.0}),
                             ("--lambda-identity", {"type": float, "default": 0.5}))  # fmt: skip
    check(cfg)
    c = cfg.gan
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    data = {"source train": source.digest, "target train": target.digest,
            "--lambda-cycle": args.lambda_cycle, "--lambda-identity": args.lambda_identity}  # fmt: skip
    run = Run(cfg, "baselines/cyclegan", ("", "source", "target", "gan"), data, c.steps, args.restart)
    nets, cast = build_nets(cfg, run), autocast(run.device, run.precision)

    if not run.finished():
        run.begin()
        batches = Batches(cfg, "gan", {"source": source, "target": target})
        for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
            x, y = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
            set_lr(nets.opt_g, linear(step, c.steps))
            set_lr(nets.opt_d, linear(step, c.steps))
            terms = cyclegan_step(nets, x, y, args.lambda_cycle, args.lambda_identity, cast)
            run.log(step, terms)
            if run.due("sheet", step):
                write_sheet(run, step, nets, source, target)
            run.save(step, vars(nets), classes=list(source.classes))
        run.close()
    write_images(run, nets.G, source, args.items)


if __name__ == "__main__":
    run_main(main)
