"""The translators in baselines/: their updates against plain ones in float64, and their command lines."""

import copy
import shlex
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import digests, make_camvid, make_carla, shell, write_config
from PIL import Image
from test_stages import PowerCut, cut_power, tensors
from test_steps import CAST, compare, config, draw, moved, of, prepared

from baselines.cut import Heads, cut_step, encode
from baselines.cyclegan import build_translator, cyclegan_step, prepare
from models import build_discriminator
from runtime import HERE, UserError, load_checkpoint


def networks(names: list[str]):
    """Two copies of networks, in float64, with their Adams."""
    torch.manual_seed(0)
    makers = {"D": build_discriminator, "H": lambda _: Heads([3, 8, 16, 16, 16])}
    nets = {name: prepared(makers.get(name[0], build_translator)(config())) for name in names}
    teams = {"opt_g": (1e-3, names[:2]), "opt_d": (1e-3, names[2:])}
    run = SimpleNamespace(device="cpu", load=lambda parts: None, folder=HERE)
    return [prepare(config(), run, some, teams) for some in (nets, copy.deepcopy(nets))]


def update(loss, adam):
    adam.zero_grad()
    loss.backward(inputs=adam.param_groups[0]["params"])
    adam.step()


def score(D, x, goal):  # E[(D(x) - goal)^2], summed over the scales
    return sum(((s - goal) ** 2).mean() for s in D(x))


def compare_all(nets, plain, names):
    """Gradients and weights: so D has its own update's gradient and nothing of G's, and G nothing of D's."""
    for a, b in ((getattr(nets, name), getattr(plain, name)) for name in names):
        compare(of(a), of(b))
        compare(moved(a.state_dict(), of(a)), moved(b.state_dict(), of(b)))


def test_cyclegan_step_is_the_plain_one():
    nets, n = networks(names := ["G", "F", "D_X", "D_Y"])
    for _ in range(3):
        x, y, _ = draw(2, (29, 45))
        ours = cyclegan_step(nets, x, y, 10.0, 0.5, CAST)
        n.D_X.train()(x), n.D_X.eval(), n.D_Y.train()(x), n.D_Y.eval()  # one iteration of spectral norm
        y_g, x_g = n.G(x), n.F(y)
        games = (n.D_X, x, x_g.detach()), (n.D_Y, y, y_g.detach())
        update(L_D := sum(score(D, real, 1) + score(D, fake, 0) for D, real, fake in games), n.opt_d)
        L_GAN = score(n.D_Y, y_g, 1) + score(n.D_X, x_g, 1)
        L_cyc = (n.F(y_g) - x).abs().mean() + (n.G(x_g) - y).abs().mean()
        L_idt = (n.G(y) - y).abs().mean() + (n.F(x) - x).abs().mean()
        update(L_GAN + 10 * L_cyc + 5 * L_idt, n.opt_g)
        compare(ours, {"L_D": L_D, "L_GAN": L_GAN, "L_cyc": L_cyc, "L_idt": L_idt})
        compare_all(nets, n, names)


@pytest.mark.parametrize("fast", [False, True])
def test_cut_step_is_the_plain_one(fast, monkeypatch):
    monkeypatch.setattr("baselines.cut.PATCHES", 7)
    nets, n = networks(names := ["G", "H", "D"])

    def nce(x, x_g, flip):  # -log(e^(v v+ / tau) / sum of e^(v v' / tau)), v' all patches of the same image
        total = 0
        for mlp, key, query in zip(n.H.mlps, encode(n.G, x), encode(n.G, x_g), strict=True):
            maps, at = (key, query.flip(3) if flip else query), torch.randperm(key[0, 0].numel())[:7]
            z_k, z_q = (mlp(y.permute(0, 2, 3, 1).flatten(1, 2)[:, at]) for y in maps)
            z_k, z_q = (z / z.square().sum(-1, keepdim=True).sqrt() for z in (z_k.detach(), z_q))
            e = torch.exp(torch.einsum("nsu,nku->nsk", z_q, z_k) / 0.07)
            total -= torch.log(e.diagonal(dim1=1, dim2=2) / e.sum(2)).mean()
        return total / 5

    for step in range(3):
        x, y, _ = draw(2, (29, 45))
        torch.manual_seed(step)
        ours = cut_step(nets, x, y, 3.0, fast, CAST)
        torch.manual_seed(step)
        flip = fast and bool(torch.rand(()) < 0.5)
        n.D.train()(x), n.D.eval()
        y_g = n.G(x.flip(3) if flip else x)
        update(L_D := score(n.D, y, 1) + score(n.D, y_g.detach(), 0), n.opt_d)
        terms = {"L_D": L_D, "L_GAN": score(n.D, y_g, 1), "L_NCE": nce(x, y_g, flip)}
        terms |= {} if fast else {"L_NCE/Y": nce(y, n.G(y), False)}
        update(terms["L_GAN"] + 1.5 * (terms["L_NCE"] + terms.get("L_NCE/Y", terms["L_NCE"])), n.opt_g)
        compare(ours, terms)
        compare_all(nets, n, names)
        assert flip == (fast and step == 0)  # so both are compared


@pytest.mark.parametrize("method, flags", [("cyclegan", []), ("cut", []), ("fastcut", ["--fast"])])
def test_runs_resume_and_augment_takes_their_images(method, flags, tmp_path, stage, monkeypatch):
    """By the command line and the command that it prints; then a power cut in step 4 changes no bit."""
    roots = make_carla(tmp_path / "carla"), make_camvid(tmp_path / "camvid", bad_train_labels=True)
    config = write_config(tmp_path, source__root=str(roots[0]), target__root=str(roots[1]))
    script, flag = method.removeprefix("fast"), "--lambda-cycle" if method == "cyclegan" else "--lambda-nce"
    words = [f"baselines/{script}.py", config, "workers=2", *flags]
    for _ in range(2):
        done = shell(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        words = shlex.split(done.stdout.rstrip().rpartition("next: python ")[2])
    one, two = (tmp_path / "out" / name / "baselines" / method for name in ("run", "again"))
    assert [Image.open(path).size for path in (one / "images").iterdir()] == 12 * [(48, 32)]

    again = partial(stage, f"baselines.{script}", config, "name=again", *flags)
    cut_power(monkeypatch, sys.modules[f"baselines.{script}"], f"{script}_step", 4)
    pytest.raises(PowerCut, again)
    again()
    (two / "images" / "000000.png").unlink()
    again()  # makes what is missing
    assert digests(one / "images") == digests(two / "images")
    compare(*(tensors(load_checkpoint(folder / "last.pt", "")) for folder in (one, two)), 0.0)
    assert flag in str(pytest.raises(UserError, again, f"{flag}=3").value)
