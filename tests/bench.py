"""What a training step costs, and how much of that is the networks' own passes.

    python tests/bench.py                        cfg.yaml's settings, a few minutes on 2 cores
    python tests/bench.py --munit                also the GAN's step at MUNIT's widths against the plain one
    python tests/bench.py configs/gta5_cityscapes.yaml --precisions float32,bfloat16,bfloat16+compile --sizes 256x512,512x512

Prints ratios first, and writes all of it to --out, by default OUTPUT/NAME/bench.json. Images are random; no data set is
needed. For f_seg, GAN and self-ensembling (all of its terms) it gives

- step / bare passes: the stage's own step, with its losses, updates, average and copies to the device, over the network
  passes that it cannot do without, at the same shapes and precision: self-ensembling, the student forward and backward for
  each domain and the teacher forward; GAN, G forward and backward, D forward and backward on real and generated images,
  D and f_seg forward and back to the image;
- steps per second, milliseconds per part, peak memory (on a GPU allocated; on a CPU the whole process's), FLOPs, and their
  rate as a share of the device's peak, the better of a large matrix product and a large convolution timed in the same run;
- the same for other sizes, batches and precisions (--sizes, --batches, --precisions: lists with commas, sizes HxW);
- data wait: how long a step waits for its batch with the settings' `workers`, reading PNGs of GTA5's size made for this: in
  the first pass over the files, in later ones, and in the first pass of a run that finds the folder `cache` filled;
- one pass of the student for all domains, batch norm alone divided, as the stage has it, over a pass per domain ("joined").

What a ratio compares takes turns, round by round; a ratio is the median of the rounds' ratios, a time the median of the
rounds' times. The first rounds are not counted.
"""

import contextlib
import copy
import ctypes
import gc
import io
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference_steps import PlainGAN  # noqa: E402

from datasets import Batches, Scenes, class_list, to_float  # noqa: E402
from models import FCN8s, build_discriminator, build_generator, build_segmenter  # noqa: E402
from runtime import (  # noqa: E402
    Run, UserError, autocast, command_line, environment, get_device, get_precision, make_folder, nested, run_main, seed_torch,
    set_lr, write_json,
)
from train_gan import fseg_step, gan_step  # noqa: E402
from train_selfens import DomainPasses, MovingAverage, selfens_step, track_statistics  # noqa: E402

STAGES = {"fseg": "f_seg", "gan": "GAN", "selfens": "self-ensembling"}
MUNIT = {"gan.width": 64, "gan.style_dim": 8, "gan.mlp_dim": 256, "gan.downsamples": 2, "gan.res_blocks": 4, "gan.d_width": 64,
         "gan.d_layers": 4, "gan.d_scales": 3}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- timing


class Clock:
    """Times of consecutive parts; on a GPU by events, so that nothing waits until the times are read."""

    def __init__(self, device):
        self.cuda, self.names, self.marks = device.type == "cuda", [], []
        if self.cuda:
            torch.cuda.synchronize()
        self("")

    def __call__(self, part: str) -> None:
        """`part` ends here."""
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.names.append(part)
        self.marks.append(mark)

    def times(self) -> dict:
        """{part: milliseconds}, in order."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = zip(self.marks, self.marks[1:], strict=False)
        ms = [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in spans]
        return dict(zip(self.names[1:], ms, strict=True))


def take_turns(device, rounds: int, warm_up: int, **calls) -> dict:
    """{name: [{part: ms} of each round]} of functions that take a Clock, called one after the other in each round."""
    times = {name: [] for name in calls}
    for k in range(warm_up + rounds):
        for name, call in calls.items():
            clock = Clock(device)
            call(clock)
            found = clock.times()
            if k >= warm_up:
                times[name].append(found)
    return times


def median(values) -> float:
    return float(np.median([*values]))


def total(times: dict) -> float:
    return sum(times.values())


def ratio(above: list, below: list) -> float:
    """Median over the rounds of one call's time over another's."""
    return median(total(a) / total(b) for a, b in zip(above, below, strict=True))


def measure_peak(device, precision, peaks: dict) -> None:
    """Raises peaks[precision], {name: FLOP/s} of a large matrix product and a large convolution, where they are faster now.

    (Called before each measurement: on a machine that others use as well, one time would not do.)
    """
    big = device.type == "cuda"
    n, channels, side, batch = (8192, 512, 128, 8) if big else (2048, 256, 48, 4)
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    if precision == "bfloat16":
        a, b, x, w = (t.bfloat16() for t in (a, b, x, w))

    def product(clock):
        a @ b
        clock("")

    def convolution(clock):
        F.conv2d(x, w, padding=1)
        clock("")

    with torch.no_grad():
        times = take_turns(device, 4, 2, product=product, convolution=convolution)
    flops, best = {"product": 2 * n**3, "convolution": 2 * x.numel() * channels * 9}, peaks.setdefault(precision, {})
    for name, found in times.items():
        best[name] = max(best.get(name, 0.0), flops[name] / (min(map(total, found)) / 1000))


def reset_memory(device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):  # Linux: free memory goes back, and the peak begins anew
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------------------------------------ stages


def backward(outputs) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def build(stage: str, cfg, size, batch: int, precision: str, compiled: bool, device) -> SimpleNamespace:
    """A stage's networks and optimisers as the stage makes them, with random images, and what is timed:

    step(clock), the body of the stage's loop; passes(clock), the bare passes, part by part; updates(clock), optimisers and
    average, after `passes` has left gradients. Learning rates are 0, so that the weights stay what they are.
    """
    seed_torch(cfg.seed, "bench")
    c, classes, cast = getattr(cfg, stage), len(class_list(cfg)[1]), autocast(device, precision)

    def ready(net):
        return net.to(device, memory_format=torch.channels_last)

    def adam(net, *betas):
        return torch.optim.Adam(net.parameters(), 0.0, *betas, weight_decay=1e-4, fused=True)

    def check(terms):  # what Run.check does
        if device.type == "cpu":
            assert all(np.isfinite(float(v)) for v in terms.values())

    images = {name: torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8) for name in ("x_s", "x_g", "x_t")}
    images["y_s"] = torch.randint(0, classes, (batch, *size), dtype=torch.uint8)
    if device.type == "cuda":
        images = {name: x.pin_memory() for name, x in images.items()}
    x = {name: to_float(images[name], device) for name in ("x_s", "x_g", "x_t")}

    def arrived(*names):
        for optimiser in optimisers:
            set_lr(optimiser, 0.0, c.schedule, 1, c.steps)
        seed_torch(cfg.seed, stage, 1)
        return [images[n].to(device, non_blocking=True).long() if n == "y_s" else to_float(images[n], device) for n in names]

    f_seg = ready(FCN8s(classes, cfg.fseg.width, cfg.fseg.batch_norm, cfg.fseg.dropout))
    if stage == "fseg":
        nets, optimisers = {"f_seg": f_seg.train()}, [adam(f_seg)]

        def step(clock):
            fseg_step(f_seg, *optimisers, *arrived("x_s", "y_s"), cast, check)
            clock("step")

        def passes(clock):
            with cast:
                logits = f_seg(x["x_s"])
            clock("f_seg forward")
            backward([logits])
            clock("f_seg backward")

    elif stage == "gan":
        f_seg.eval().requires_grad_(False)
        G, D = ready(build_generator(cfg)), ready(build_discriminator(cfg))
        nets, optimisers = {"G": G, "D": D, "f_seg": f_seg}, [adam(net, (0.5, 0.999)) for net in (G, D)]

        def step(clock):
            x_s, x_t, y_s = arrived("x_s", "x_t", "y_s")
            gan_step(G, D, f_seg, *optimisers, x_s, x_t, y_s, c.lambda_sem, cast, check)
            clock("step")

        def passes(clock):
            with cast:
                x_g = G(x["x_s"], x["x_t"])
            clock("G forward")
            D.train().requires_grad_(True)
            with cast:
                real, fake = D(x["x_t"], x_g.detach())
            clock("D forward, real and generated")
            backward([*real, *fake])
            clock("D backward")
            D.eval().requires_grad_(False)
            image = x_g.detach().requires_grad_()
            with cast:
                scores = D(image)
            clock("D forward, for G")
            backward(scores)
            clock("D backward to the image")
            with cast:
                logits = f_seg(image)
            clock("f_seg forward")
            backward([logits])
            clock("f_seg backward to the image")
            x_g.backward(image.grad)
            clock("G backward")

    else:
        student = ready(build_segmenter(cfg, classes)).train()
        teacher = copy.deepcopy(student).requires_grad_(False)
        track_statistics(teacher, False)
        nets, optimisers, joined = {"student": student, "teacher": teacher}, [adam(student)], DomainPasses(student)
        average = MovingAverage(teacher, student)

        def step(clock):
            *inputs, y_s = arrived("x_s", "x_g", "x_t", "y_s")
            named = dict(zip(("x_s", "x_g", "x_t"), inputs, strict=True))
            selfens_step(joined, teacher, average, *optimisers, named, y_s, c.noise_std, c.delta_con, c.ema_decay, cast, check)
            clock("step")

        def passes(clock):
            with cast:
                logits = joined([*x.values()])
            clock("student forward, three domains")
            with torch.inference_mode(), cast:
                teacher(x["x_t"])
            clock("teacher forward")
            backward(logits)
            clock("student backward")

    def updates(clock):
        for optimiser in optimisers:
            optimiser.step()
        clock("optimiser")
        if stage == "selfens":
            average.update(c.ema_decay)
            clock("EMA")
        for net in nets.values():
            net.zero_grad()

    def state():
        return {name: part.state_dict() for name, part in (*nets.items(), *((f"opt_{k}", o) for k, o in enumerate(optimisers)))}

    with FlopCounterMode(display=False) as counter:  # before compiling: it counts torch's own calls
        step(Clock(device))
    if compiled:
        for net in nets.values():
            net.compile(dynamic=False)
    return SimpleNamespace(step=step, passes=passes, updates=updates, state=state, nets=nets, x=x, cast=cast,
                           flops=counter.get_total_flops())


def measure(stage: str, cfg, size, batch, precision, device, peaks, rounds) -> tuple[dict, SimpleNamespace]:
    """All of one stage's numbers at one setting, and what `build` made."""
    arithmetic, _, compiled = precision.partition("+")
    measure_peak(device, arithmetic, peaks)
    reset_memory(device)
    work = build(stage, cfg, size, batch, arithmetic, bool(compiled), device)
    times = take_turns(device, rounds, 3, step=work.step, passes=work.passes, updates=work.updates)
    step_ms, bare_ms = (median(map(total, times[call])) for call in ("step", "passes"))
    parts = {part: median(t[part] for t in times[call]) for call in ("passes", "updates") for part in times[call][0]}
    row = {
        "stage": stage, "size": [*size], "batch": batch, "precision": precision,
        "step / bare passes": ratio(times["step"], times["passes"]),
        "update / step": ratio(times["updates"], times["step"]),
        **({"EMA / step": median(u["EMA"] / total(s) for u, s in zip(times["updates"], times["step"], strict=True))}
           if stage == "selfens" else {}),
        "steps per second": 1000 / step_ms, "ms": {"step": step_ms, "bare passes": bare_ms, **parts},
        "GFLOP per step": work.flops / 1e9, "FLOP per second": work.flops / (step_ms / 1000),
        "peak memory, MiB": peak_memory(device) / 2**20,
    }  # fmt: skip
    if stage == "selfens" and not compiled:
        row["joined / a pass per domain"] = measure_grouping(work, device, rounds)
    return row, work


# ---------------------------------------------------------------------------------------------------------- other parts


def measure_grouping(work, device, rounds) -> float:
    """The student's passes forward and backward: one for all domains over one for each."""
    student, images = work.nets["student"], [*work.x.values()]
    joined = DomainPasses(student)

    def each(clock):
        with work.cast:
            logits = joined.one_by_one(images)
        backward(logits)
        clock("")
        student.zero_grad()

    def all_at_once(clock):
        with work.cast:
            logits = joined(images)
        backward(logits)
        clock("")
        student.zero_grad()

    times = take_turns(device, rounds, 2, each=each, joined=all_at_once)
    return ratio(times["joined"], times["each"])


def measure_writing(work, cfg, device, folder: Path) -> dict:
    """{logging, checkpoint: ms each time}, with a stage's own Run in a temporary folder."""
    run = Run(nested(cfg.flat | {"output": str(folder)}), "bench", folder / "bench", ("",))
    terms, found = {name: torch.rand((), device=device) for name in ("L_D", "L_GAN", "L_sem")}, []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for step, _ in run.progress([{}] * 6, 6, "bench"):
            clock = Clock(device)
            run.log(step, **terms)
            clock("logging")
            run.save(step, **work.state())
            clock("checkpoint")
            found.append(clock.times())
        run.close()
    return {part: median(t[part] for t in found[1:]) for part in found[0]}


def make_gta5(root: Path, count: int) -> Path:
    """GTA5's layout and size, 1914x1052, with images that PNG compresses about as well as the game's."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = torch.from_numpy(rng.standard_normal((1, 3, 64, 116), np.float32))
        image = 110 + 40 * F.interpolate(coarse, (1052, 1914), mode="bicubic")[0] + torch.randn(3, 1052, 1914) * 2.5
        label = F.interpolate(torch.from_numpy(rng.integers(0, 34, (1, 1, 16, 29)).astype(np.float32)), (1052, 1914))[0, 0]
        for name, array in (("images", image.clamp(0, 255).byte().permute(1, 2, 0).numpy()), ("labels", label.byte().numpy())):
            make_folder(root / name)
            Image.fromarray(array).save(root / name / f"{i + 1:05d}.png")
    return root


def measure_waiting(cfg, stage: str, work, device, root: Path, steps: int) -> dict:
    """How long a stage's step waits for its batch: {first pass, later passes, ...: {wait, step: ms, wait / step}}."""
    flat = cfg.flat | {"classes": "cityscapes19", "class_colours": None, "cache": None}
    for role in ("source", "target"):
        flat |= {f"{role}.{key}": None for key in ("files", "read", "ids", "exclude", "images")}
        flat |= {f"{role}.dataset": "gta5", f"{role}.root": str(root)}
    c, cached, passes = getattr(cfg, stage), {"cache": str(root / "cache")}, {}

    def read(more, count):
        """[(wait, step) in ms] of a run's first steps, all but the very first, and the steps of its first pass."""
        there = nested(flat | more)
        scenes = {"source": Scenes(there, "source", "train", labels=True)}
        if stage != "fseg":
            scenes["target"] = Scenes(there, "target", "train", labels=False)
        loader = Batches(there, stage, c.batch, c.crop, **scenes, jitter=c.jitter if stage == "fseg" else 0.0)
        first, found = -(-len(scenes["source"]) // c.batch), []
        batches = loader.loader(0, first + count, cfg.workers)
        for _ in range(first + count):
            start = time.perf_counter()
            next(batches)
            wait = time.perf_counter() - start
            work.step(Clock(device))
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append((1000 * wait, 1000 * (time.perf_counter() - start - wait)))
        batches.close()
        return found[1:], max(1, first - 1)

    found, first = read({}, steps)
    passes["first pass"], passes["later passes"] = found[:first], found[first:]
    read(cached, 0)
    passes["first pass with a filled cache"] = read(cached, 0)[0] or found[:1]
    return {name: {"wait, ms": median(w for w, _ in part), "step, ms": median(s for _, s in part),
                   "data wait / step": median(w / s for w, s in part)} for name, part in passes.items()}  # fmt: skip


def measure_munit(cfg, device, rounds: int) -> dict:
    """The GAN's step at MUNIT's widths, 128x128, batch 1: {precision: times as fast as the plain step in float32}."""
    there, faster = nested(cfg.flat | MUNIT), {}
    for precision in dict.fromkeys((get_precision(cfg, device), "float32")):
        work = build("gan", there, (128, 128), 1, precision, False, device)
        plain = PlainGAN(*work.nets.values(), 0.0, 0.0, 1e-4, cfg.gan.lambda_sem)
        x_s, x_t = (work.x[name].contiguous() for name in ("x_s", "x_t"))
        y_s = torch.randint(0, 3, (1, 128, 128), device=device)

        def reference(clock, plain=plain, batch=(x_s, x_t, y_s)):
            plain.step(*batch)
            clock("step")

        times = take_turns(device, rounds, 2, plain=reference, ours=work.step)
        faster[precision] = ratio(times["plain"], times["ours"])
    return faster


# ------------------------------------------------------------------------------------------------------------ report


def numbers(text: str, what: str) -> list:
    try:
        found = [[int(n) for n in item.split("x")] for item in text.split(",")]
    except ValueError:
        found = [[]]
    if any(len(item) != (2 if what == "--sizes" else 1) or min(item) < 1 for item in found):
        kind = "sizes such as 96x160" if what == "--sizes" else "whole numbers"
        raise UserError(f"command line: {what} {text}: must be {kind}, with commas between them")
    return found if what == "--sizes" else [n for n, in found]


def main() -> None:
    def arguments(parser):
        parser.add_argument("--out", help="JSON file; default OUTPUT/NAME/bench.json")
        parser.add_argument("--rounds", type=int, default=15, help="rounds of the main measurements; default 15")
        parser.add_argument("--sizes", help="further image sizes, HxW with commas; default half of source.size and source.size")
        parser.add_argument("--batches", default="1,4", help="further batches; default 1,4")
        parser.add_argument("--precisions", help="float32, bfloat16, bfloat16+compile, with commas; default the config's")
        parser.add_argument("--munit", action="store_true", help="also the GAN at MUNIT's widths against the plain step")
        parser.add_argument("--images", type=int, default=24, help="PNGs of GTA5's size to read, for data wait; default 24, "
                            "which is left out where it makes less than 3 batches")

    cfg, args = command_line(__doc__, ("", "source", "fseg", "gan", "selfens"), arguments)
    device = get_device(cfg)
    own = get_precision(cfg, device) + ("+compile" if cfg.compile else "")
    precisions = args.precisions.split(",") if args.precisions else [own]
    unknown = {*precisions} - {"float32", "bfloat16", "float32+compile", "bfloat16+compile"}
    if unknown:
        raise UserError(f"command line: --precisions {min(unknown)}: must be float32 or bfloat16, '+compile' behind it or not")
    height, width = cfg.source.size
    sizes = numbers(args.sizes, "--sizes") if args.sizes else [[height // 2, width // 2], [height, width]]
    batches = numbers(args.batches, "--batches")
    ratios, rows, sweep, waiting, peaks = {}, [], [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        root = make_gta5(Path(folder, "gta5"), args.images) if args.images else None
        for stage, title in STAGES.items():
            c = getattr(cfg, stage)
            row, work = measure(stage, cfg, c.crop or cfg.source.size, c.batch, own, device, peaks, args.rounds)
            row["ms"] |= measure_writing(work, cfg, device, Path(folder, stage))
            ratios[f"{title} step / its bare passes"] = row["step / bare passes"]
            ratios[f"{title} update / step"] = row["update / step"]
            if stage == "selfens":
                ratios["EMA / self-ensembling step"] = row["EMA / step"]
                if "joined / a pass per domain" in row:
                    ratios["student's passes, joined / a pass per domain"] = row["joined / a pass per domain"]
            if root and args.images >= 3 * c.batch:
                waiting[stage] = measure_waiting(cfg, stage, work, device, root, 12)
                for name, found in waiting[stage].items():
                    ratios[f"{title} data wait / step, {name}"] = found["data wait / step"]
            for what in ("logging", "checkpoint"):
                every = cfg.log_every if what == "logging" else cfg.save_every
                ratios[f"{title} {what} (every {every} steps) / step"] = row["ms"][what] / every / row["ms"]["step"]
            rows.append(row)
            work = None  # its memory is not the next one's
    if args.munit:
        for precision, faster in measure_munit(cfg, device, args.rounds).items():
            ratios[f"GAN at MUNIT's widths, 128x128, batch 1, {precision}: times as fast as the plain float32 step"] = faster

    for stage in STAGES:
        for precision in precisions:
            for size in sizes:
                for batch in batches:
                    sweep.append(measure(stage, cfg, size, batch, precision, device, peaks, max(3, args.rounds // 3))[0])
    for row in (*rows, *sweep):
        row["share of peak"] = row["FLOP per second"] / max(peaks[row["precision"].partition("+")[0]].values())

    print("ratios")
    for name, value in ratios.items():
        print(f"{value:9.4f}  {name}")
    print(f"\n{'':<17}{'size':>9}{'batch':>6}  {'precision':<17}{'step/bare':>10}{'of peak':>9}{'steps/s':>9}{'images/s':>10}"
          f"{'GFLOP':>9}{'MiB':>8}{'joined':>8}")

    for row in (*rows, *sweep):
        images = row["batch"] * {"fseg": 1, "gan": 2, "selfens": 3}[row["stage"]]
        print(f"{STAGES[row['stage']]:<17}{row['size'][0]:>5}x{row['size'][1]:<4}{row['batch']:>5}  {row['precision']:<17}"
              f"{row['step / bare passes']:>10.3f}{row['share of peak']:>9.3f}{row['steps per second']:>9.2f}"
              f"{images * row['steps per second']:>10.1f}{row['GFLOP per step']:>9.1f}{row['peak memory, MiB']:>8.0f}"
              + (f"{row['joined / a pass per domain']:>8.3f}" if "joined / a pass per domain" in row else ""))

    print("\nms per part")
    for row in rows:
        print(f"{STAGES[row['stage']]}: " + ", ".join(f"{part} {ms:.1f}" for part, ms in row["ms"].items()))
    for precision, found in peaks.items():
        print(f"{precision}: " + ", ".join(f"{name} {flops / 1e12:.3f} TFLOP/s" for name, flops in found.items()))
    print(f"f_seg's width {cfg.fseg.width:g}, batch norm {'on' if cfg.fseg.batch_norm else 'off'}; student's width "
          f"{cfg.selfens.width:g}, batch norm {'on' if cfg.selfens.batch_norm else 'off'}")

    out = Path(args.out or Path(cfg.output, cfg.name, "bench.json"))
    make_folder(out.parent)
    write_json(out, {"ratios": ratios, "stages": rows, "sweep": sweep, "data": waiting, "peak": peaks, "config": cfg.flat,
                     "environment": environment(cfg, device, own)})  # fmt: skip
    print(f"written: {out}")


if __name__ == "__main__":
    run_main(main)
