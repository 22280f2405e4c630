"""CUT and FastCUT (Park, Efros, Zhang, Zhu, ECCV 2020): a patch must stay recognisable after its translation.

    python baselines/cut.py cfg.yaml
    python baselines/cut.py cfg.yaml --fast                    FastCUT
    python baselines/cut.py configs/carla_camvid.yaml --lambda-nce 4 name=strict
    python baselines/cut.py cfg.yaml --restart                 begin anew; the old folder is kept aside

Reads the images of source (X) and target (Y); writes OUTPUT/NAME/baselines/cut/ (or fastcut/): last.pt,
log.jsonl, TensorBoard events, image sheets, and after the last step images/NAME.png, every source image
translated, for augment.py's method `folder`, whose command it prints. A run that was stopped continues from
its last checkpoint; images that are there are not made again.

    --fast            no identity term, lambda_NCE 10, and half of the steps mirror what G is given
    --lambda-nce L    weight of L_NCE beside L_GAN (1; 10 with --fast)

Steps, batch, crop, learning rates, widths and depths are those of the config's `gan` section. The paper's are
L_GAN and L_NCE, its layers, 256 patches, heads of two layers with 256 units, tau 0.07, negatives from the
same image alone. As in the authors' code, L_NCE is a mean over layers and patches where the paper writes a
sum, CUT's two L_NCE count half each, and no gradient reaches the keys. Ours, so that the comparison with
TGCF-DA is one of methods: G is its generator without the style; D is its discriminator, the losses summed
over its scales, with its rates, schedule, weight decay and spectral norm. D's loss is not halved. Every step
is of both players: G has no warm-up, as TGCF-DA's has.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks here alone
from runtime import Run, autocast, average_gradients, command_line, run_main, seed_torch  # noqa: E402

# isort: split
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from baselines.cyclegan import (  # noqa: E402
    Translator, build_translator, check, prepare, update_d, write_images,
)  # fmt: skip
from datasets import Batches, Scenes, make_sheet, some_of, to_float, to_uint8  # noqa: E402
from losses import linear, lsgan_g, set_lr, wide  # noqa: E402
from models import build_discriminator, pad_to_multiple  # noqa: E402

PATCHES, UNITS, TAU = 256, 256, 0.07


def encode(G: Translator, x: Tensor) -> list[Tensor]:
    """G_enc(x): the pixels, the strided convolutions, the first residual block and the middle one.

    The paper's blocks are the first and the fifth of nine. x: (N, 3, H, W) -> maps (N, C_l, h_l, w_l).
    """
    y = pad_to_multiple(x, G.multiple)
    maps = [y]
    for layer in G.encoder:
        y = layer(y)
        if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
            maps.append(y)
    middle = len(G.blocks) // 2
    for i, block in enumerate(G.blocks[: middle + 1]):
        y = block(y)
        if i in (0, middle):
            maps.append(y)
    return maps


class Heads(nn.Module):
    """H_l, an MLP per layer, from a map's channels at some places to vectors of length 1."""

    def __init__(self, channels: list[int]):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS)) for c in channels)

    def forward(self, maps: list[Tensor], places: list[Tensor]) -> list[Tensor]:
        """maps: (N, C_l, h_l, w_l); places: (S_l,) indices below h_l w_l -> (N, S_l, UNITS) each, float32."""
        z = [mlp(y.flatten(2)[..., at].transpose(1, 2))
             for mlp, y, at in zip(self.mlps, maps, places, strict=True)]
        return [F.normalize(wide(vectors), dim=-1) for vectors in z]


def patch_nce(z_q: Tensor, z_k: Tensor, tau: float = TAU) -> Tensor:
    """Mean over patches s of -log(exp(z_q[s] z_k[s] / tau) / sum over s' of exp(z_q[s] z_k[s'] / tau)).

    z_q, z_k: (N, S, U), queries and keys of length 1; s' goes over the patches of the same image -> scalar.
    """
    logits = z_q @ z_k.transpose(1, 2) / tau
    n, s, _ = logits.shape
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(s, device=logits.device).repeat(n))


def nce(G: Translator, H: Heads, x: Tensor, x_g: Tensor, flip: bool, cast) -> Tensor:
    """L_PatchNCE(G, H, x), the mean over layers, at random places, the same in each image; x_g = G(x).

    flip: x_g was made of the mirrored x, so that its maps are mirrored back; where G pads the width, they are
    then as many pixels off.
    """
    with torch.no_grad(), cast:
        keys = encode(G, x)
        places = [torch.randperm(y[0, 0].numel(), device=y.device)[:PATCHES] for y in keys]
        z_k = H(keys, places)
    with cast:
        z_q = H([y.flip(-1) if flip else y for y in encode(G, x_g)], places)
    return sum(map(patch_nce, z_q, z_k)) / len(z_q)


def cut_step(nets, x, y, lambda_nce: float, fast: bool, cast) -> dict:
    """One update of D, then one of G and H, on one batch. Returns the loss terms, scalars.

    nets: G, H, D, opt_g, opt_d; x, y: (N, 3, H, W) in [-1, 1], source and target; fast: FastCUT; cast: the
    context in which networks run.
    """
    G, H, D = nets.G, nets.H, nets.D
    flip = fast and bool(torch.rand(()) < 0.5)
    with cast:
        y_g = G(x.flip(-1) if flip else x)

    # L_D = E[(D(y) - 1)^2] + E[D(G(x))^2]
    L_D = update_d([(D, y, y_g)], nets.opt_d, cast)

    # L_GAN = E[(D(G(x)) - 1)^2]
    with cast:
        scores = D(y_g)
    L_GAN, L_NCE = lsgan_g(scores), nce(G, H, x, y_g, flip, cast)
    terms, both = {"L_D": L_D, "L_GAN": L_GAN, "L_NCE": L_NCE}, L_NCE

    # L = L_GAN + lambda_NCE (L_NCE(X) + L_NCE(Y)) / 2;  FastCUT: L = L_GAN + lambda_NCE L_NCE(X)
    if not fast:
        with cast:
            y_idt = G(y)
        terms["L_NCE/Y"] = nce(G, H, y, y_idt, False, cast)
        both = (L_NCE + terms["L_NCE/Y"]) / 2
    nets.opt_g.zero_grad()
    (L_GAN + lambda_nce * both).backward()
    average_gradients(G)
    average_gradients(H)
    nets.opt_g.step()
    return {name: term.detach() for name, term in terms.items()}


@torch.inference_mode()
def write_sheet(run: Run, step: int, nets, source: Scenes, target: Scenes) -> None:
    """Sheet of fixed source images translated, and of target images, which should stay what they are."""
    rows = []
    for x, y in zip(*(some_of(scenes, 6, run.device).split(1) for scenes in (source, target)), strict=True):
        with autocast(run.device, run.precision):
            rows.append([to_uint8(image[0]) for image in (x, nets.G(x), y, nets.G(y))])
    columns = ["source x", "translated G(x)", "target y", "identity G(y)"]
    run.sheet(step, "translated", make_sheet(columns, rows))


def build_nets(cfg, run: Run):
    """G, H, D and their optimisers, new or as the checkpoint has them."""
    seed_torch(cfg.seed, "cut", "init")
    G, D = build_translator(cfg), build_discriminator(cfg)
    with torch.no_grad():
        H = Heads([y.shape[1] for y in encode(G, torch.zeros(1, 3, 64, 64))])
    optimisers = {"opt_g": (cfg.gan.lr_g, ("G", "H")), "opt_d": (cfg.gan.lr_d, ("D",))}
    return prepare(cfg, run, {"G": G, "H": H, "D": D}, optimisers)


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}), ("--fast", {"action": "store_true"}),
                             ("--lambda-nce", {"type": float}))  # fmt: skip
    check(cfg)
    c, method = cfg.gan, "fastcut" if args.fast else "cut"
    lambda_nce = args.lambda_nce if args.lambda_nce is not None else 10.0 if args.fast else 1.0
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    data = {"source train": source.digest, "target train": target.digest, "--lambda-nce": lambda_nce}
    run = Run(cfg, f"baselines/{method}", ("", "source", "target", "gan"), data, c.steps, args.restart)
    nets, cast = build_nets(cfg, run), autocast(run.device, run.precision)

    if not run.finished():
        run.begin()
        batches = Batches(cfg, "gan", {"source": source, "target": target})
        for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
            seed_torch(cfg.seed, "cut", step)  # places and flip
            x, y = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
            set_lr(nets.opt_g, linear(step, c.steps))
            set_lr(nets.opt_d, linear(step, c.steps))
            run.log(step, cut_step(nets, x, y, lambda_nce, args.fast, cast))
            if run.due("sheet", step):
                write_sheet(run, step, nets, source, target)
            run.save(step, vars(nets), classes=list(source.classes))
        run.close()
    write_images(run, nets.G, source, args.items)


if __name__ == "__main__":
    run_main(main)
