"""MCD, maximum classifier discrepancy (Saito, Watanabe, Ushiku, Harada, CVPR 2018, arXiv 1712.02560).

    python baselines/mcd.py cfg.yaml
    python baselines/mcd.py cfg.yaml --se --k 4                with self-ensembling; k of step C, 4 by default
    python baselines/mcd.py cfg.yaml --restart                 begin anew; the old folder is kept aside

Reads the labelled source and the unlabelled target; writes OUTPUT/NAME/baselines/mcd/ (mcd_se): last.pt with
student and teacher, log.jsonl, TensorBoard events and image sheets, as stage 3 does. A run that was stopped
continues from its last checkpoint.

A generator of features G, two classifiers F1 and F2; p_i = softmax F_i(G(x)). One step on one batch is
    A   min over G, F1, F2 of  CE(F1(G(x_s)), y_s) + CE(F2(G(x_s)), y_s)
    B   min over F1, F2    of  the same - d(p_1(x_t), p_2(x_t))      they differ where the target is unlike,
    C   min over G         of  d(p_1(x_t), p_2(x_t)), k times        and G makes it like the source
with d(p_1, p_2) = 1/K sum over the K classes of |p_1 - p_2|, mean over cells.

Ours: G is the trunk of stage 3's student, F1 its head, F2 one more with first weights of its own; d is taken
before up-sampling; AdamW in place of SGD. Class weights, sampling, dropout and the teacher, the mean of G and
F1 over the steps, are stage 3's. --se adds stage 3's delta_con L_con of G and F1 to step A, and nothing else.
"""

import copy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from runtime import (  # noqa: E402
    Run, UserError, autocast, average_gradients, command_line, run_main, seed_torch,
)  # fmt: skip

# isort: split
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from datasets import Batches, Scenes, colourise, has_labels, make_sheet, to_float, to_uint8  # noqa: E402
from losses import (  # noqa: E402
    class_weights, consistency, cross_entropy, poly, set_lr, sigmoid_ramp_up, wide,
)  # fmt: skip
from models import adamw, build_segmenter, load_trunk, upsample  # noqa: E402


def head_of(segmenter: nn.Module) -> nn.Module:
    """The segmenter without its trunk, the same weights: a network of F1's or F2's alone."""
    head = copy.copy(segmenter)
    head._modules = segmenter._modules | {"trunk": nn.Identity()}
    return head


def discrepancy(logits_1: Tensor, logits_2: Tensor) -> Tensor:
    """L_dis = d(p_1, p_2): |p_1 - p_2|, mean over classes, batch and cells; logits (N, K, h, w) -> scalar."""
    return (wide(logits_1).softmax(1) - wide(logits_2).softmax(1)).abs().mean()


def update(loss: Tensor, *parts) -> None:
    """One update of the parts, (network, optimiser) each; all else keeps its weights and its gradients."""
    for _, optimiser in parts:
        optimiser.zero_grad()
    loss.backward(inputs=[p for net, _ in parts for p in net.parameters()])
    for net, optimiser in parts:
        average_gradients(net)
        optimiser.step()


def self_ensembling(nets, x_t: Tensor, noise_std: float, cast) -> Tensor:
    """L_con of student and teacher on x_t: (N, 3, H, W) in [-1, 1], each with noise of its own -> scalar."""
    with torch.no_grad(), cast:
        teacher_logits = nets.teacher(x_t + noise_std * torch.randn_like(x_t))
    with cast:
        logits = nets.student(x_t + noise_std * torch.randn_like(x_t))
    return consistency(logits, teacher_logits)


def mcd_step(nets, batch: dict, c, k: int, delta_con, alpha: float, cast) -> dict:
    """Steps A, B and k times C, then the teacher's update. Returns the loss terms, scalars.

    nets: student (G and F1), teacher, G, F (F1 and F2), opt_g, opt_f and weight (of the classes, or None);
    batch: x_s, x_t (N, 3, H, W) in [-1, 1], y_s (N, H, W) train ids; c: the config's `selfens` section;
    delta_con: weight of L_con, None without it; alpha: the teacher's part in its average.
    """
    student, G, F, (x_s, x_t, y_s) = nets.student, nets.G, nets.F, (batch[n] for n in ("x_s", "x_t", "y_s"))

    def both(maps: dict, shape) -> list[Tensor]:
        with cast:
            return [net.head(maps, shape) for net in F]

    def supervised(maps: dict) -> Tensor:
        return sum(cross_entropy(upsample(logits, student.stride, y_s.shape[-2:]), y_s, nets.weight)
                   for logits in both(maps, x_s.shape))

    # A: L_sup = CE(F1(G(x_s)), y_s) + CE(F2(G(x_s)), y_s)
    with cast:
        maps = G(x_s)
    L_sup = supervised(maps)
    loss, terms = L_sup, {"L_sup": L_sup.detach()}
    # With --se: + delta_con L_con of F1(G(x_t + n)) and the teacher's reading of x_t + n'
    if delta_con is not None:
        L_con = self_ensembling(nets, x_t, c.noise_std, cast)
        loss, terms = loss + delta_con * L_con, terms | {"L_con": L_con.detach(), "delta_con": delta_con}
    update(loss, (G, nets.opt_g), (F, nets.opt_f))

    # B: F1 and F2 on L_sup - L_dis, of what G now makes of both domains
    with torch.no_grad(), cast:
        maps, maps_t = G(x_s), G(x_t)
    L_dis = discrepancy(*both(maps_t, x_t.shape))
    update(supervised(maps) - L_dis, (F, nets.opt_f))
    terms["L_dis"] = L_dis.detach()

    # C, k times: G on L_dis
    for _ in range(k):
        with cast:
            maps_t = G(x_t)
        L_dis = discrepancy(*both(maps_t, x_t.shape))
        update(L_dis, (G, nets.opt_g))
    update_teacher(nets.teacher, student, alpha)
    return terms | {"L_dis/C": L_dis.detach()}


@torch.no_grad()
def update_teacher(teacher, student, alpha: float) -> None:
    """t_i = alpha t_(i-1) + (1 - alpha) s_i for every weight."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - alpha)


@torch.inference_mode()
def write_sheet(run: Run, step: int, nets, val: Scenes) -> None:
    """Sheet of target images, what student and teacher read there, and labels."""
    shown, readings = range(0, len(val), -(-len(val) // 4)), []
    x_t = to_float(torch.stack([val.image(i) for i in shown]), run.device)
    for net in (nets.student, nets.teacher):
        net.eval()
        with autocast(run.device, run.precision):
            logits = net(x_t)
        net.train()
        readings.append(upsample(logits, net.stride, x_t.shape[-2:]).argmax(1).cpu())
    rows = [[to_uint8(x), *(colourise(ids, val.classes) for ids in (*ids, val.label(i)))]
            for i, x, *ids in zip(shown, x_t, *readings, strict=True)]
    run.sheet(step, "readings", make_sheet(["target (val)", "student", "teacher", "label"], rows))


def build_pair(cfg, key: str, source: Scenes, run: Run) -> SimpleNamespace:
    """Student and teacher with first weights by `key`, in training mode, and the weight of each class."""
    seed_torch(cfg.seed, key, "init")
    student = build_segmenter(cfg, len(source.classes))
    if not run.state:
        load_trunk(student, cfg, "selfens")
    student.to(run.device, memory_format=torch.channels_last).train()  # dropout
    teacher = copy.deepcopy(student).requires_grad_(False)
    weight = class_weights(source.pixels, cfg.balance).to(run.device) if cfg.balance else None
    for net in (student.trunk, teacher) if cfg.compile else ():  # in place: the names in checkpoints stay
        net.compile(dynamic=False)
    return SimpleNamespace(student=student, teacher=teacher, weight=weight)


def build_nets(cfg, source: Scenes, run: Run) -> SimpleNamespace:
    """What `mcd_step` trains, new, and the weight of each class."""
    c, nets = cfg.selfens, build_pair(cfg, "mcd", source, run)
    seed_torch(cfg.seed, "mcd", "second head", "init")
    other = build_segmenter(cfg, len(source.classes)).train()
    nets.G, nets.F2 = nets.student.trunk, head_of(other.to(run.device, memory_format=torch.channels_last))
    nets.F = nn.ModuleList([head_of(nets.student), nets.F2])
    # G alone must not be taken for a head, whose learning rate is another
    nets.opt_g = adamw(nn.ModuleDict({"trunk": nets.G}), c.lr, cfg.head_lr, cfg.weight_decay)
    nets.opt_f = adamw(nets.F, c.lr, cfg.head_lr, cfg.weight_decay)
    return nets


def main() -> None:
    switch = {"action": "store_true"}
    cfg, args = command_line(("--restart", switch), ("--se", switch), ("--k", {"type": int, "default": 4}))
    c, variant = cfg.selfens, "mcd_se" if args.se else "mcd"
    if not c.steps or args.k < 1:
        raise UserError(f"selfens.steps={c.steps}, --k {args.k}: nothing would be trained; raise it")
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    data = {"source train": source.digest, "target train": target.digest, "--k": args.k}
    sections = ("", "source", "target", "selfens")
    run = Run(cfg, f"baselines/{variant}", sections, data, c.steps, args.restart)
    if run.finished():
        return
    nets, cast = build_nets(cfg, source, run), autocast(run.device, run.precision)
    run.load(parts := {name: getattr(nets, name) for name in ("student", "teacher", "F2", "opt_g", "opt_f")})
    batches = Batches(cfg, "selfens", {"source": source, "target": target}, rare=cfg.rare)
    print(f"{variant}: {len(source)} source and {len(target)} target images, {c.steps} steps of {c.batch} "
          f"per domain, k = {args.k}")

    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        seed_torch(cfg.seed, "mcd", step)  # noise and dropout
        for optimiser in (nets.opt_g, nets.opt_f):
            set_lr(optimiser, poly(step, c.steps))
        y_s = batch.pop("y_s").to(run.device).long()
        batch = {name: to_float(x, run.device) for name, x in batch.items()} | {"y_s": y_s}
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps) if args.se else None
        alpha = min(c.ema_decay, 1 - 1 / step)  # the true mean over the first steps
        terms = mcd_step(nets, batch, c, args.k, delta_con, alpha, cast)
        run.log(step, terms | {"lr": nets.opt_g.param_groups[0]["lr"]})
        if run.due("sheet", step):
            write_sheet(run, step, nets, val)
        run.save(step, parts, classes=list(val.classes), variant=variant)
    run.close()
    how = "--split val" if val.samples[0].label else f"--images {shlex.quote(cfg.target.root)} --out seen"
    print(f"{variant}: {run.folder} is finished; next: python evaluate.py {args.items} "
          f"--checkpoint {shlex.quote(str(run.path))} {how}")


if __name__ == "__main__":
    run_main(main)
