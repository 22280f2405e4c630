"""Stage 3, self-ensembling: a student and its mean teacher learn from source, augmented and target images.

    python train_selfens.py
    python train_selfens.py cfg.yaml selfens.variant=source_only seed=1
    python train_selfens.py cfg.yaml --restart                 begin anew; the old folder is kept aside

Reads the labelled source, the unlabelled target, OUTPUT/NAME/augmented/ (variants tgcf_da and tgcf_da_se) and the
target's training labels (variant target_only, the upper bound, alone). Writes OUTPUT/NAME/selfens/VARIANT/: last.pt,
log.jsonl, TensorBoard events and image sheets. A run that was stopped continues from its last checkpoint.

The variants differ in the terms of one objective, L = L_sup + delta_con * L_con:
    source_only        L_sup = CE(f_S(x_s), y_s)
    self_ensembling    L_sup = CE(f_S(x_s), y_s),                      with L_con
    tgcf_da            L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s)
    tgcf_da_se         L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s),  with L_con
    target_only        L_sup = CE(f_S(x_t), y_t)
"""

import copy

from runtime import (
    Run, autocast, average_gradients, command_line, heat, load_optimiser, load_weights, make_sheet, run_main, seed_torch,
    set_lr, to_uint8,
)  # fmt: skip

# isort: split
import numpy as np
import torch
from torch import nn

from datasets import Augmented, Batches, Scenes, colourise, has_labels, to_float
from losses import class_weights, consistency, cross_entropy, poly, sigmoid_ramp_up
from models import build_segmenter

BATCH_NORMS = (nn.BatchNorm2d,)

class MovingAverage:
    """The teacher: t_i = alpha * t_(i-1) + (1 - alpha) * s_i over weights and batch-norm statistics; counters are copied.

    Without the statistics the teacher would normalise by those of a network that it no longer is. The lists of tensors
    are made once (collecting them takes longer than averaging them), so both networks must keep their storage.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module):
        ours, theirs = teacher.state_dict(), student.state_dict()
        assert ours.keys() == theirs.keys()
        pairs = [(t, theirs[name]) for name, t in ours.items()]
        self.averaged = [*zip(*((t, s) for t, s in pairs if t.is_floating_point()), strict=True)]
        self.copied = [*zip(*((t, s) for t, s in pairs if not t.is_floating_point()), strict=True)]

    @torch.no_grad()
    def update(self, ema_decay: float) -> None:
        """One step with alpha = ema_decay, 0 to 1: a kernel over all tensors where the device has one."""
        torch._foreach_lerp_(*self.averaged, 1 - ema_decay)
        if self.copied:  # batch norm's
            torch._foreach_copy_(*self.copied)


def track_statistics(model: nn.Module, on: bool) -> None:
    """Whether a pass in training mode moves batch norm's running statistics; it normalises by the batch's own either way."""
    for m in model.modules():
        if isinstance(m, BATCH_NORMS):
            m.momentum = 0.1 if on else 0.0


class DomainPasses(nn.Module):
    """The student's passes of one step as one module, so that whatever wraps it sees one forward and one backward.

    With batch norm each domain is normalised by its own batch statistics. The running ones, which the teacher and the
    evaluation use, are those of the last domain: of target images wherever there are any. Domains of one size pass
    together, the normalisation alone being divided, which is faster, most of all at batch 1 (README, Speed). Others pass
    one after the other.

    borrows: the last domain is normalised by the running statistics, and these are those of the domain before it.
    """

    def __init__(self, net: nn.Module, borrows: bool = False):
        super().__init__()
        self.net, self.layers, self.borrows = net, [m for m in net.modules() if hasattr(m, "domains")], borrows
        self.norms = [m for m in net.modules() if isinstance(m, BATCH_NORMS)]
        for m in self.norms:
            m.borrows = borrows

    def forward(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """One (N, 3, H, W) batch per domain -> the logits of each, (N, classes, ceil(H/8), ceil(W/8))."""
        if len({x.shape for x in batches}) > 1:
            return self.one_by_one(batches)
        for m in self.layers:
            m.domains = len(batches)
        logits = self.net(torch.cat(batches)).chunk(len(batches))
        for m in self.layers:
            m.domains = 1
        return [*logits]

    def one_by_one(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same from a pass per domain."""
        logits = []
        for k, x in enumerate(batches, 1):
            last = k == len(batches)
            track_statistics(self.net, k == len(batches) - self.borrows)
            for m in self.norms:
                m.train(not (self.borrows and last))
            logits.append(self.net(x))
        for m in self.norms:
            m.train()
        return logits


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: list[torch.Tensor], autocast_context) -> None:
    """Sets batch norm's running statistics to their mean over these batches of (N, 3, H, W) images, without dropout.

    Averaged weights are a network of their own, whose activations no running average of the student's describes exactly
    (Izmailov et al. 2018, stochastic weight averaging); and the student's come from images with noise added.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    if not norms:
        return
    model.eval()
    for m in norms:
        m.train()
        m.reset_running_stats()
        m.momentum = None  # a cumulative mean
    with autocast_context:
        for x in batches:
            model(x)
    model.train()
    track_statistics(model, False)


def selfens_step(passes, average, optimiser, x, y_s, c, delta_con, alpha, weight, cast) -> dict:
    """One update of the student and of its mean. Returns {L, L_sup} and, with target images, L_con and delta_con."""
    def noisy(x_t):
        noise = torch.empty_like(x_t)
        noise.permute(0, 2, 3, 1).normal_()
        return x_t + c.noise_std * noise

    x = x | ({"x_t": noisy(x["x_t"]), "seen_by_teacher": noisy(x["x_t"])} if "x_t" in x else {})
    seen_by_teacher = x.pop("seen_by_teacher", None)
    optimiser.zero_grad()
    with cast:
        logits = dict(zip(x, passes([*x.values()]), strict=True))
    # L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s)
    L_sup = sum(cross_entropy(passes.net.upsample(logits[name], y_s.shape[-2:]), y_s, weight) for name in x if name != "x_t")
    terms = {"L_sup": L_sup}
    # L = L_sup + delta_con * L_con;  L_con = mean (softmax f_S(x_t + n) - softmax f_T(x_t + n'))^2
    if seen_by_teacher is not None:
        with torch.inference_mode(), cast:
            teacher_logits = average.teacher(seen_by_teacher)
        terms |= {"L_con": consistency(logits["x_t"], teacher_logits.clone()), "delta_con": torch.tensor(delta_con)}
    loss = L_sup + delta_con * terms.get("L_con", 0)
    loss.backward()
    average_gradients(passes)
    optimiser.step()
    average.update(alpha)
    return {"L": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


@torch.inference_mode()
def write_sheet(run: Run, step: int, student, teacher, val: Scenes, noise_std: float) -> None:
    """Sheet of target images with what student and teacher read there and where they differ."""
    shown = np.linspace(0, len(val) - 1, 4).astype(int)
    x_t = to_float(torch.stack([val.image(i) for i in shown]), run.device)
    for net in (student, teacher):
        net.eval()
    with autocast(run.device, run.precision):
        z_s, z_t = (net(x_t + noise_std * torch.randn_like(x_t)) for net in (student, teacher))
    for net in (student, teacher):
        net.train()
    # Half the squared distance of two softmaxes lies in [0, 1]; the root makes small ones visible.
    gap = ((z_s.float().softmax(1) - z_t.float().softmax(1)).square().sum(1, keepdim=True) / 2).sqrt()
    gap = student.upsample(gap, x_t.shape[-2:])[:, 0]
    readings = [student.upsample(z, x_t.shape[-2:]).argmax(1).cpu() for z in (z_s, z_t)]
    rows = [[to_uint8(x_t[k]), *(colourise(y[k], val.classes) for y in readings), heat(gap[k]),
             colourise(val.label(i), val.classes)] for k, i in enumerate(shown)]
    run.sheet(step, "consistency", make_sheet(["target (val)", "student", "teacher", "inconsistency", "label"], rows))


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}))
    c, variant = cfg.selfens, cfg.selfens.variant
    # Target labels are read by target_only and by nobody else.
    labelled = Scenes(cfg, "target" if variant == "target_only" else "source", "train", labels=True)
    domains = {"source": labelled}
    if variant in ("tgcf_da", "tgcf_da_se"):
        domains["augmented"] = Augmented(cfg, labelled)
    if variant in ("self_ensembling", "tgcf_da_se"):
        domains["target"] = Scenes(cfg, "target", "train", labels=False)
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    sections = ("", "source", "target", *["augment"] * ("augmented" in domains), "selfens")
    data = {f"{name} train": scenes.digest for name, scenes in domains.items()}
    run = Run(cfg, f"selfens/{variant}", sections, data, c.steps, args.restart)
    if run.finished():
        return
    seed_torch(cfg.seed, "selfens", "init")
    student = build_segmenter(cfg, len(labelled.classes), "none" if run.state else c.pretrained)
    student = student.to(run.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False)
    groups = [{"params": student.parameters(), "base_lr": c.lr}]
    optimiser = torch.optim.Adam(groups, c.lr, weight_decay=c.weight_decay, fused=True)
    if run.state:
        load_weights(student, run.state["student"], run.path)
        load_weights(teacher, run.state["teacher"], run.path)
        load_optimiser(optimiser, run.state["optimiser"], run.path)
    if cfg.compile:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    weight = class_weights(labelled.pixels, cfg.balance).to(run.device) if cfg.balance else None
    batches = Batches(cfg, "selfens", domains, rare=cfg.rare)
    passes, cast, average = DomainPasses(student), autocast(run.device, run.precision), MovingAverage(teacher, student)
    average.teacher = teacher
    only = {"target": domains["target"]} if "target" in domains else domains
    few = Batches(cfg, "selfens", only, rare=cfg.rare if "source" in only else 0)
    name = "x_t" if "target" in domains else "x_g" if "augmented" in domains else "x_s"
    sample = [few[k][name] for k in range(32)]

    def mode():
        student.train()
        teacher.train()
        track_statistics(teacher, False)

    mode()
    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        seed_torch(cfg.seed, "selfens", step)  # noise and dropout
        set_lr(optimiser, poly(step, c.steps))
        x = {k: to_float(batch[k], run.device) for k in ("x_s", "x_g", "x_t") if k in batch}
        y_s = batch["y_s"].to(run.device).long()
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps)
        alpha = min(c.ema_decay, 1 - 1 / step)
        terms = selfens_step(passes, average, optimiser, x, y_s, c, delta_con, alpha, weight, cast)
        run.log(step, terms)
        if run.due("sheet", step):
            estimate_statistics(teacher, [to_float(x, run.device) for x in sample], cast)
            write_sheet(run, step, student, teacher, val, c.noise_std)
            mode()
        if run.due("save", step):
            estimate_statistics(teacher, [to_float(x, run.device) for x in sample], cast)
            mode()
            run.save(step, student=student.state_dict(), teacher=teacher.state_dict(), optimiser=optimiser.state_dict(),
                     classes=list(labelled.classes), variant=variant)
    run.close()
    print(f"selfens: {run.folder} is finished; next: python evaluate.py {args.items} --split val")


if __name__ == "__main__":
    run_main(main)
