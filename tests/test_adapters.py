"""MCD and DCAN: their updates against formulas in float64, and both through the command line on tiny data."""

import copy
import sys
from types import SimpleNamespace

import pytest
import reference_steps as plain
import torch
from conftest import REPO, make_camvid, make_carla, shell, write_config
from test_stages import PowerCut, cut_power, tensors
from test_steps import CAST, CLASSES, DECAY, HEAD, LR, compare, config, draw, of, prepared, selfens_nets
from torch import nn

from losses import set_lr
from models import adamw, build_segmenter, load_net
from runtime import load_checkpoint

sys.path.insert(0, str(REPO / "baselines"))
import dcan  # noqa: E402
import mcd  # noqa: E402


@pytest.mark.parametrize("trunk, delta_con", [("efficientnet_lite0", None), ("vgg16", 4.0)])
def test_mcd_step_is_the_plain_one(trunk, delta_con):
    """A, B, C and C, three times, on whole segmenters: each moves the part that it must, and no other."""
    cfg = config(f"selfens.trunk={trunk}")
    nets, other = selfens_nets(cfg), prepared(build_segmenter(cfg, CLASSES)).train()
    nets.G, nets.F = nets.student.trunk, nn.ModuleList(map(mcd.head_of, (nets.student, other)))
    one, two, teacher = (copy.deepcopy(net) for net in (nets.student, other, nets.teacher))
    two.trunk, heads = one.trunk, nn.ModuleList(map(mcd.head_of, (one, two)))
    parts, plain_parts = ((nn.ModuleDict({"trunk": G}), F) for G, F in ((nets.G, nets.F), (one.trunk, heads)))
    nets.opt_g, nets.opt_f = (adamw(part, LR, HEAD, DECAY) for part in parts)
    opt_g, opt_f = (plain.adamw(part, LR, HEAD, DECAY) for part in plain_parts)
    set_lr(nets.opt_g, 1.0), set_lr(nets.opt_f, 1.0)
    def update(loss, *optimisers):
        one.zero_grad(), heads.zero_grad()
        loss.backward()
        [optimiser.step() for optimiser in optimisers]
    def L_sup():
        return sum(plain.cross_entropy(plain.bilinear(net(x_s), net.stride, y.shape[1:]), y)
                   for net in (one, two))
    def L_dis():
        return (one(x_t).softmax(1) - two(x_t).softmax(1)).abs().mean()
    for step in range(1, 4):
        x_s, x_t, y = draw(2, (29, 44))
        torch.manual_seed(step)
        noise_t, noise_s = (cfg.selfens.noise_std * torch.randn_like(x_t) for _ in range(2))
        torch.manual_seed(step)
        batch, alpha = {"x_s": x_s, "x_t": x_t, "y_s": y}, 1 - 1 / step
        ours = mcd.mcd_step(nets, batch, cfg.selfens, 2, delta_con, alpha, CAST)
        gap = one(x_t + noise_s).softmax(1) - teacher(x_t + noise_t).softmax(1)
        theirs = {"L_sup": L_sup(), "L_con": gap.square().sum(1).mean(), "delta_con": delta_con}
        update(theirs["L_sup"] + (delta_con or 0) * theirs["L_con"], opt_f, opt_g)
        theirs["L_dis"] = L_dis()
        update(L_sup() - theirs["L_dis"], opt_f)
        for _ in range(2):
            theirs["L_dis/C"] = L_dis()
            update(theirs["L_dis/C"], opt_g)
        for t, s in zip(teacher.parameters(), one.parameters(), strict=True):
            t.data = alpha * t + (1 - alpha) * s.data
        compare(ours, theirs if delta_con else {k: v for k, v in theirs.items() if "con" not in k})
    for a, b in ((nets.student, one), (nets.F, heads), (nets.teacher, teacher)):
        compare(a.state_dict(), b.state_dict(), 1e-6)


def test_dcan_aligns_and_translates_by_the_formulas():
    """Aligned maps have the target's statistics; T's and the segmenter's losses and gradients on them."""
    torch.manual_seed(0)
    f_s, f_t = torch.randn(2, 3, 9, 8).double(), 3 + 2 * torch.randn(2, 3, 5, 6).double()
    for mean, deviation in (dcan.statistics(dcan.align(f_s, f_t)), dcan.statistics(f_t)):
        assert torch.allclose(mean, f_t.mean((2, 3)), rtol=1e-9)
        assert torch.allclose(deviation, f_t.std((2, 3), correction=0), rtol=2e-5)
    assert torch.allclose(dcan.align(f_s, f_s), f_s)
    pair, (x_s, x_t, y) = selfens_nets(cfg := config()), draw(2, (29, 44))
    T, phi = prepared(dcan.Translator(4, 2, 1)), copy.deepcopy(pair.student.trunk).requires_grad_(False)
    nets = SimpleNamespace(T=T, phi=phi, opt=torch.optim.SGD(T.parameters(), 0.0), lambda_style=3.0)
    terms, (g, s, t) = dcan.translator_step(nets, x_s, x_t, False, CAST), map(phi, (T(x_s, x_t), x_s, x_t))
    aligned = {l: dcan.align(s[l], t[l]) for l in s}
    ours, theirs = ([m for l in (4, 8, 16) for m in dcan.statistics(maps[l])] for maps in (g, t))
    pairs = zip([g[8], *ours], [aligned[8], *theirs], strict=True)
    L_content, *L_style = (((a - b) ** 2).sum() / (b**2).sum() for a, b in pairs)
    compare(terms, {"L_content": L_content, "L_style": sum(L_style)})
    grads = torch.autograd.grad(L_content + 3 * sum(L_style), [*T.parameters()])
    compare(of(T), dict(zip(of(T), grads, strict=True)))
    student = copy.deepcopy(pair.student)
    aligned = {l: dcan.align(f, t[l]) for l, f in student.trunk(x_s).items()}
    student.trunk.forward = lambda x: aligned
    L_sup = plain.cross_entropy(plain.bilinear(student(x_s), student.stride, y.shape[1:]), y)
    L_sup.backward()
    batch = {"x_g": x_s, "x_t": x_t, "y_s": y}
    compare(dcan.dcan_step(pair, batch, cfg.selfens, None, 0.5, CAST), {"L_sup": L_sup})
    compare(of(pair.student), of(student))


@pytest.mark.parametrize("variant, cuts", [
    ("mcd", ["mcd_step"]), ("mcd_se", ["mcd_step"]), ("dcan", ["dcan_step"]),
    ("dcan_se", ["translator_step", "random_generator", "dcan_step"])])
def test_a_run_by_the_command_line_and_one_cut_by_power_failures(variant, cuts, tmp_path, stage, monkeypatch):
    """The cuts change no bit; last.pt is a segmenter's; the target's training labels are not read."""
    roots = make_carla(tmp_path / "carla"), make_camvid(tmp_path / "camvid", bad_train_labels=True)
    method, _, se = variant.partition("_")
    config = write_config(tmp_path, source__root=str(roots[0]), target__root=str(roots[1]))
    args = [config, *["--se"] * bool(se)]
    folders = tmp_path / "out/run/baselines", tmp_path / "run/baselines"
    run = shell(f"baselines/{method}.py", *args)
    assert run.returncode == 0 and "--checkpoint" in run.stdout, run.stderr[-3000:]
    for function in cuts:
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            cut_power(patch, sys.modules[method], function, 7 if function == "random_generator" else 3)
            stage(method, *args, f"output={tmp_path}")
    stage(method, *args, f"output={tmp_path}")
    files = [f / variant / "last.pt" for f in folders]
    one, two = (load_checkpoint(file, "", ("student", "teacher")) for file in files)
    logs = [file.with_name("log.jsonl").read_text() for file in files]
    images = [{p.name: p.read_bytes() for p in f.glob("dcan/images/*.png")} for f in folders]
    assert all(torch.equal(x, tensors(two)[name]) for name, x in tensors(one).items())
    assert logs[0] == logs[-1] and images[0] == images[-1] and len(images[0]) == 12 * (method == "dcan")
    names = {"L_sup": True, "L_dis": method == "mcd", "L_con": bool(se)}
    assert {n: f'"{n}"' in logs[0] for n in names} == names and one["variant"] == variant
    net, _ = load_net(files[0], "teacher", build_segmenter, one["classes"], "cpu")
    assert net(torch.zeros(1, 3, 32, 48)).shape == (1, len(one["classes"]), 8, 12)
    if method == "dcan":
        items = "name=new", "augment.method=folder", f"augment.folder={folders[0] / 'dcan/images'}"
        stage("augment", args[0], *items, "augment.styles_per_image=1")
