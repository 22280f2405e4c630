"""What a training step costs. Not a test: run it by hand on an idle machine.

    python tests/bench.py [CFG key=value ...]              training steps over their bare passes; GPU memory
    python tests/bench.py [CFG key=value ...] --count      parameters, FLOPs and memory of each step, not run
    python tests/bench.py [CFG key=value ...] --translators    TGCF-DA's, CycleGAN's, CUT's and DCAN's
    python tests/bench.py [CFG key=value ...] --munit DIR  the GAN's step against MUNIT's, DIR a clone of it

The first prints ratios of things that took turns. The last two run each method in a process of its own, on
one thread of the CPU, in float32; minutes count each step of the warm-up as one of both players; --munit at
MUNIT's published widths (synthia2cityscape, without its perceptual loss), 128x256, batch 1.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import autocast, command_line, get_device, get_precision, nested, run_main  # noqa: E402

# isort: split
import torch  # noqa: E402
import yaml  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from baselines import cut, cyclegan, dcan  # noqa: E402
from datasets import class_list  # noqa: E402
from models import (  # noqa: E402
    adamw, build_discriminator, build_fseg, build_generator, build_segmenter,
)  # fmt: skip
from train_gan import fseg_step, gan_step  # noqa: E402
from train_selfens import selfens_step  # noqa: E402

MUNIT = {"gan.width": 64, "gan.style_dim": 8, "gan.mlp_dim": 256, "gan.downsamples": 2, "gan.res_blocks": 4,
         "gan.d_width": 64, "gan.d_layers": 4, "gan.d_scales": 3, "gan.batch": 1, "gan.crop": [128, 256],
         "gan.lambda_rec": 0.0}  # fmt: skip
TRANSLATORS = ("TGCF-DA", "CycleGAN", "CUT", "FastCUT", "DCAN")


def images(n: int, size, device):
    """(n, 3, *size) in [-1, 1], channels last."""
    return torch.rand(n, 3, *size, device=device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)


def seconds(functions: dict, rounds: int) -> dict:
    """{name: median seconds} of functions that take turns; on a CPU its own, whatever else runs there."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def fseg(cfg, classes: int, device, cast):
    """(a step of f_seg, its bare passes) as functions."""
    x, net = images(cfg.fseg.batch, cfg.fseg.crop or cfg.source.size, device), build_fseg(cfg, classes)
    y = torch.randint(0, classes, (len(x), *x.shape[-2:]), device=device)
    optimiser = adamw(net.to(device, memory_format=torch.channels_last), 1e-4, 10.0, 0.01)

    def passes():
        net.zero_grad()
        with cast:
            logits = net(x)
        logits.float().sum().backward()

    return lambda: fseg_step(net, optimiser, x, y, None, cast), passes


def gan(cfg, classes: int, device, cast):
    """(a step of the GAN, its bare passes) as functions, and its networks."""
    c = cfg.gan
    nets = SimpleNamespace(f_seg=build_fseg(cfg, classes), G=build_generator(cfg), D=build_discriminator(cfg))
    for net in (nets.f_seg, nets.G, nets.D):
        net.to(device, memory_format=torch.channels_last)
    nets.f_seg.eval().requires_grad_(False)
    for name, net in (("opt_g", nets.G), ("opt_d", nets.D)):
        setattr(nets, name, torch.optim.Adam(net.parameters(), 1e-4, fused=True))
    x_s, x_t = (images(c.batch, c.crop or cfg.source.size, device) for _ in range(2))
    y_s = torch.randint(0, classes, (c.batch, *x_s.shape[-2:]), device=device)

    def passes():
        nets.G.zero_grad()
        nets.D.zero_grad()
        with cast:
            x_g = nets.G(x_s, x_t)
            scores = nets.D.requires_grad_(True)(torch.cat([x_t, x_g.detach()]))
        sum(s.float().sum() for s in scores).backward()
        with cast:
            scores, logits = nets.D.requires_grad_(False)(x_g), nets.f_seg(x_g)
            more = nets.G(x_t, x_t).float().sum() if c.lambda_rec else 0
        (sum(s.float().sum() for s in scores) + logits.float().sum() + more).backward()

    return lambda: gan_step(nets, x_s, x_t, y_s, c, cast), passes, nets


def selfens(cfg, classes: int, device, cast):
    """(a step of tgcf_da_se, its bare passes) as functions."""
    c = cfg.selfens
    student, teacher = (build_segmenter(cfg, classes) for _ in range(2))
    for net in (student, teacher.requires_grad_(False)):
        net.to(device, memory_format=torch.channels_last)
    optimiser = adamw(student, 1e-4, 10.0, 0.01)
    nets = SimpleNamespace(student=student, teacher=teacher, weight=None, optimiser=optimiser)
    batch = {name: images(c.batch, c.crop or cfg.source.size, device) for name in ("x_s", "x_g", "x_t")}
    y_s = torch.randint(0, classes, (c.batch, *batch["x_s"].shape[-2:]), device=device)

    def passes():
        student.zero_grad()
        for x in batch.values():
            with cast:
                logits = student(x)
            logits.float().sum().backward()
        with cast, torch.no_grad():
            teacher(batch["x_t"])

    return lambda: selfens_step(nets, batch | {"y_s": y_s}, c, 1.0, 0.99, cast), passes


def count(cfg, classes: int) -> None:
    """Prints of each step parameters, TFLOP, and GiB that the backward pass keeps in float32, on paper."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    print(f"{'step':<10}{'10^6 parameters':>16}{'TFLOP':>10}{'GiB kept':>10}{'steps':>9}{'PFLOP in all':>14}")
    with torch.device("meta"):
        cast, device = autocast(torch.device("cpu"), "float32"), torch.device("meta")
        both = [build_generator(cfg), build_discriminator(cfg)]
        rows = [("f_seg", fseg(cfg, classes, device, cast)[1], cfg.fseg.steps, [build_fseg(cfg, classes)]),
                ("gan", gan(cfg, classes, device, cast)[1], cfg.gan.steps, both),
                ("selfens", selfens(cfg, classes, device, cast)[1], cfg.selfens.steps,
                 [build_segmenter(cfg, classes)])]  # fmt: skip
        for name, function, steps, nets in rows:
            kept.clear()
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with FlopCounterMode(display=False) as flops, hooks:
                function()
            tflop = flops.get_total_flops() / 1e12
            gib = sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30
            million = sum(p.numel() for net in nets for p in net.parameters()) / 1e6
            print(f"{name:<10}{million:>16.1f}{tflop:>10.3f}{gib:>10.2f}{steps:>9}"
                  f"{tflop * steps / 1e3:>14.2f}")


def munit_step(clone: str):
    """MUNIT's own dis_update and gen_update as one function. It names modules that no longer exist."""
    sys.path.insert(0, clone)
    sys.modules["torch.utils.serialization"] = ModuleType("serialization")
    sys.modules["torch.utils.serialization"].load_lua = None
    torch.Tensor.cuda = lambda self, *_: self
    from trainer import MUNIT_Trainer

    hyper = yaml.safe_load(Path(clone, "configs/synthia2cityscape_folder.yaml").read_text())
    hyper |= {"vgg_w": 0, "display_size": 1, "new_size": 128}
    trainer, (a, b) = MUNIT_Trainer(hyper), (torch.rand(1, 3, *MUNIT["gan.crop"]) * 2 - 1 for _ in range(2))

    def step():
        trainer.dis_update(a, b, hyper)
        trainer.gen_update(a, b, hyper)

    return step


def translator(cfg, name: str, cast):
    """(a step, a function that translates a batch of images of the training's size, the networks)."""
    cpu, c = torch.device("cpu"), cfg.gan
    run = SimpleNamespace(device=cpu, load=lambda parts: None, folder=Path(name))
    x, y = (images(c.batch, c.crop or cfg.source.size, cpu) for _ in range(2))
    whole, guides = images(cfg.inference_batch, cfg.source.size, cpu), images(1, cfg.target.size, cpu)
    guides = guides.expand(len(whole), -1, -1, -1)
    if name == "TGCF-DA":
        step, _, nets = gan(cfg, len(class_list(cfg)[1]), cpu, cast)
        return step, lambda: nets.G(whole, guides), nets
    if name == "CycleGAN":
        nets = cyclegan.build_nets(cfg, run)
        return lambda: cyclegan.cyclegan_step(nets, x, y, 10.0, 0.5, cast), lambda: nets.G(whole), nets
    if name == "DCAN":
        nets = dcan.build_nets(cfg, 1.0, run)
        return lambda: dcan.translator_step(nets, x, y, False, cast), lambda: nets.T(whole, guides), nets
    nets = cut.build_nets(cfg, run)
    return lambda: cut.cut_step(nets, x, y, 1.0, name == "FastCUT", cast), lambda: nets.G(whole), nets


def contestant(cfg, name: str) -> None:
    """Prints what a step of a method costs, or of the MUNIT cloned to `name`; in a process of its own."""
    torch.set_num_threads(1)
    cast, found = autocast(torch.device("cpu"), "float32"), {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "ours":
        step = gan(nested(cfg.flat | MUNIT), 19, torch.device("cpu"), cast)[0]
    elif name in TRANSLATORS:
        step, paint, nets = translator(cfg, name, cast)
        trained = [net for net in vars(nets).values() if isinstance(net, torch.nn.Module)]
        found["parameters"] = sum(p.numel() for net in trained for p in net.parameters() if p.requires_grad)
    else:
        step = munit_step(name)
    found["s/step"] = seconds({"step": step}, 5)["step"]
    found["MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if name in TRANSLATORS:
        with torch.inference_mode():
            found["s/image"] = seconds({"paint": paint}, 5)["paint"] / cfg.inference_batch
    print(json.dumps(found))


def costs(names) -> list[dict]:
    """What `contestant` prints of each."""
    found = []
    for name in names:
        command = [sys.executable, *(a for a in sys.argv if a != "--translators"), "--contestant", name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(text.splitlines()[-1]))
    return found


def main() -> None:
    flags = ("--rounds", {"type": int, "default": 10}), ("--count", {"action": "store_true"})
    flags += ("--translators", {"action": "store_true"}), ("--munit", {}), ("--contestant", {})
    cfg, args = command_line(*flags)
    classes = len(class_list(cfg)[1])
    if args.contestant:
        return contestant(cfg, args.contestant)
    if args.count:
        return count(cfg, classes)
    if args.translators:
        print("           10^6 parameters   s/step  s/image    MiB    minutes of training")
        for name, cost in zip(TRANSLATORS, costs(TRANSLATORS), strict=True):
            print(f"{name:<10}{cost['parameters'] / 1e6:>16.2f}{cost['s/step']:>9.2f}{cost['s/image']:>9.3f}"
                  f"{cost['MiB']:>7.0f}{cost['s/step'] * cfg.gan.steps / 60:>23.1f}")
        return
    if args.munit:
        ours, munit = costs(["ours", args.munit])
        print(f"MUNIT's step takes {munit['s/step'] / ours['s/step']:.2f} times ours ({munit['s/step']:.1f}, "
              f"{ours['s/step']:.1f} s); ours needs {ours['MiB'] / munit['MiB']:.2f} of the memory "
              f"({ours['MiB']:.0f}, {munit['MiB']:.0f} MB)")
        return
    device = get_device(cfg)
    cast = autocast(device, get_precision(cfg, device))
    for name, make in (("f_seg", fseg), ("GAN", gan), ("self-ensembling", selfens)):
        step, passes, *_ = make(cfg, classes, device, cast)
        took = seconds({"step": step, "passes": passes}, args.rounds)
        gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0  # so far
        print(f"{name}: a step takes {took['step'] / took['passes']:.3f} of its bare passes "
              f"({1000 * took['step']:.0f} and {1000 * took['passes']:.0f} ms)"
              + f", at most {gib:.1f} GiB of the GPU" * (gib > 0))


if __name__ == "__main__":
    run_main(main)
