"""What reading, computing and writing take, what overlapping them gains, and what the cache of resized images gains.

    python tests/bench_stages.py                   2 cores, about 2 minutes; writes runs/bench_stages.json

Makes its own data: PNGs of GTA5's size (1914x1052), smooth scenes with noise, so that a file is about as large as one of
GTA5. The networks are small and use one core, so that on 2 cores there is one for what overlaps with them. The serial
versions that are compared are written out here. They take turns in one process; ratios are medians, or of medians.
"""

import argparse
import contextlib
import copy
import io
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment  # noqa: E402
import train_gan  # noqa: E402
from datasets import Batches, DiskCache, Scenes, to_float  # noqa: E402
from evaluate import classify, confusion_matrix, evaluate_model, save_png  # noqa: E402
from models import build_generator, build_segmenter  # noqa: E402
from runtime import (  # noqa: E402
    THREADS, atomic_write, behind, environment, get_device, get_precision, load_config, make_folder, prefetch, to_uint8,
    write_json,
)  # fmt: skip
from train_selfens import DomainPasses, MovingAverage, selfens_step  # noqa: E402

SIZE = (1052, 1914)
clock = time.perf_counter


# ------------------------------------------------------------------------------------------------------------- data


def make_data(root: Path, count: int, noise: float) -> int:
    """A GTA5 folder with `count` training images and a Cityscapes folder with as many and 6 of val; mean bytes per image.

    Four scenes are drawn; files that repeat one differ in a byte behind the image's end, so that no two are one content.
    """
    rng, scenes = np.random.default_rng(0), []
    for _ in range(4):
        field = torch.from_numpy(rng.random((1, 3, 30, 50), np.float32)) * 220
        field = F.interpolate(field, SIZE, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()
        image = np.clip(field + rng.normal(0, noise, field.shape), 0, 255).astype(np.uint8)
        regions = torch.from_numpy(rng.standard_normal((1, 12, 20, 36), np.float32))
        regions = F.interpolate(regions, (SIZE[0] // 4, SIZE[1] // 4), mode="bicubic")[0].argmax(0).byte().numpy() + 7
        pair = []
        for picture in (image, Image.fromarray(regions).resize(SIZE[::-1], Image.NEAREST)):
            file = io.BytesIO()
            (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "PNG")
            pair.append(file.getvalue())
        scenes.append(pair)
    held = count // 6
    names = [(f"gta5/images/{i:05d}.png", f"gta5/labels/{i:05d}.png") for i in range(count + held)]
    names += [(f"cityscapes/leftImg8bit/{split}/town/town_{i:06d}_000019_leftImg8bit.png",
               f"cityscapes/gtFine/{split}/town/town_{i:06d}_000019_gtFine_labelIds.png")
              for split, n in (("train", count), ("val", 6)) for i in range(n)]
    for k, pair in enumerate(names):
        for name, data in zip(pair, scenes[k % 4], strict=True):
            make_folder((root / name).parent)
            (root / name).write_bytes(data + bytes([k]))
    return sum(len(image) for image, _ in scenes) // 4


# ------------------------------------------------------------------------------------------------------------ cache


def measure_cache(cfg_of, folder: Path) -> dict:
    """Seconds per image, of the fastest of all (much alike) files, because other processes only ever add time."""
    times = {}
    plain, cold, warm = (Scenes(cfg_of(cache), "source", "train", labels=True) for cache in (None, folder, folder))
    for i in range(len(plain)):
        found = []
        for name, scenes in (("decoded and resized", plain), ("first use of the cache", cold), ("hashed and read", warm)):
            start = clock()
            found.append(scenes.image(i))
            times.setdefault(name, []).append(clock() - start)
        warm._cache.clear()
        for name in ("read, hashed before", "from memory"):
            start = clock()
            found.append(warm.image(i))
            times.setdefault(name, []).append(clock() - start)
        start = clock()
        DiskCache.content(plain.samples[i].image)
        times.setdefault("hashing alone", []).append(clock() - start)
        assert all(torch.equal(found[0], other) for other in found)
    return {name: min(values) for name, values in times.items()}


# -------------------------------------------------------------------------------------------------------- data wait


def make_step(cfg, classes: int, device):
    """train_selfens.py's step for a student and its teacher, on a batch of source and target images."""
    student = build_segmenter(cfg, classes).to(device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False)
    passes, average = DomainPasses(student), MovingAverage(teacher, student)
    optimiser = torch.optim.Adam(student.parameters(), cfg.selfens.lr)

    def step(batch):
        x = {name: to_float(batch[name], device) for name in ("x_s", "x_t")}
        terms = selfens_step(passes, teacher, average, optimiser, x, batch["y_s"].to(device).long(), cfg.selfens.noise_std,
                             1.0, 0.99, contextlib.nullcontext(), lambda terms: None)
        return float(terms["L"])  # waits for the device

    return step


def measure_wait(cfg_of, folder: Path, device, count: int) -> dict:
    """{case: share of the steps' time in which they wait for data}, where batches are read serially and ahead.

    The first step of each epoch is left out: nothing is computed then that reading could hide behind.
    """
    cfg = cfg_of(None)
    size, step, result = cfg.selfens.batch, None, {}
    steps = count // size
    caches = {"first epoch, no cache": None, "first epoch, empty cache": "new", "first epoch, warm cache": folder}
    for case, cache in caches.items():
        for way in ("serial", "overlapped"):
            cfg = cfg_of(Path(f"{folder}-{way}") if cache == "new" else cache)
            source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
            step = step or make_step(cfg, len(source.classes), device)
            batches = Batches(cfg, "selfens", size, None, source=source, target=target)
            epochs = (case, "second epoch, memory") if cache is None else (case,)
            for epoch, name in enumerate(epochs):
                first, last = epoch * steps, (epoch + 1) * steps
                ready = (batches[k] for k in range(first, last)) if way == "serial" else batches.loader(first, last, 0)
                waits, totals = [], []
                for _ in range(steps):
                    start = clock()
                    batch = next(ready)
                    waits.append(clock() - start)
                    step(batch)
                    totals.append(clock() - start)
                result[f"{name}, {way}"] = sum(waits[1:]) / sum(totals[1:])
    return result


# ------------------------------------------------------------------------------------------- evaluation, augmentation


def serial_evaluation(predict, scenes, batch: int, device, out: Path) -> tuple[dict, torch.Tensor]:
    """({part: seconds}, confusion): each image is read, predicted and written before the next one."""
    parts, classes = dict.fromkeys(("reading", "computing", "writing"), 0.0), len(scenes.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for first in range(0, len(scenes), batch):
            some = range(first, min(first + batch, len(scenes)))
            start = clock()
            x = torch.stack([scenes.image(i) for i in some])
            parts["reading"] += clock() - start
            start = clock()
            logits = list(predict(to_float(x, device)))
            parts["computing"] += clock() - start
            for i, z in zip(some, logits, strict=True):
                start = clock()
                label = torch.from_numpy(scenes.native_label(i))
                parts["reading"] += clock() - start
                start = clock()
                prediction = classify(z.float(), label.shape)
                confusion += confusion_matrix(label.to(device), prediction, classes)
                prediction = prediction.cpu().numpy()
                parts["computing"] += clock() - start
                start = clock()
                save_png(out / f"{i}.png", prediction)
                parts["writing"] += clock() - start
    return parts, confusion.cpu()


def overlapped_evaluation(predict, scenes, batch: int, device, out: Path) -> tuple[float, torch.Tensor]:
    start = clock()
    with behind(2 * THREADS) as submit:
        confusion = evaluate_model(predict, scenes, batch, device, "overlapped", lambda i, prediction: submit(
            save_png, out / f"{i}.png", prediction.cpu().numpy()))
    return clock() - start, confusion


def serial_augmentation(cfg, device, out: Path) -> dict:
    """{part: seconds}: a batch is read, generated and written (its files at a time) before the next one."""
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    G = build_generator(cfg).to(device, memory_format=torch.channels_last).eval()
    parts, size = dict.fromkeys(("reading", "computing", "writing"), 0.0), cfg.augment.batch

    def write(i, x):
        atomic_write(out / f"{i}.png", lambda file: Image.fromarray(x).save(file, "PNG"))

    with ThreadPoolExecutor() as pool:
        for first in range(0, len(source), size):
            some = range(first, min(first + size, len(source)))
            start = clock()
            x_s, x_t = torch.stack([source.image(i) for i in some]), torch.stack([target.image(i) for i in some])
            parts["reading"] += clock() - start
            start = clock()
            with torch.inference_mode():
                x_g = [to_uint8(x) for x in G(to_float(x_s, device), to_float(x_t, device))]
            parts["computing"] += clock() - start
            start = clock()
            make_folder(out)
            list(pool.map(write, some, x_g))
            parts["writing"] += clock() - start
    return parts


def stage(module, items) -> None:
    """Runs a stage's main() in this process, without its messages."""
    sys.argv = [module.__name__, *items]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main()


def overlapped_augmentation(items) -> float:
    """Seconds that augment.py takes from its first reading to its last line of the manifest."""
    marks = []

    def reading(*arguments):
        marks.append(clock())
        return prefetch(*arguments)

    class Timed(augment.Run):
        def progress(self, *arguments, **options):
            yield from super().progress(*arguments, **options)
            marks.append(clock())

    kept = augment.prefetch, augment.Run
    augment.prefetch, augment.Run = reading, Timed
    try:
        stage(augment, items)
    finally:
        augment.prefetch, augment.Run = kept
    return marks[-1] - marks[0]


# ------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--input", type=int, nargs=2, default=(256, 512), help="height and width of the networks' input")
    parser.add_argument("--width", type=float, default=0.125, help="of the segmentation network; the generator's: 64 times")
    parser.add_argument("--files", type=int, default=12, help="training images of each domain")
    parser.add_argument("--noise", type=float, default=2.0, help="deviation of the images' noise; sets the files' size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="runs/bench_stages.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        file_bytes = make_data(root, args.files, args.noise)
        items = ["source.dataset=gta5", f"source.root={root}/gta5", f"source.size={list(args.input)}",
                 "target.dataset=cityscapes", f"target.root={root}/cityscapes", f"target.size={list(args.input)}",
                 f"device={args.device}", "precision=float32", f"output={root}/runs",
                 f"selfens.width={args.width}", "selfens.batch=2", "eval.batch=2", "augment.batch=4",
                 "augment.styles_per_image=1", f"gan.width={round(64 * args.width)}", "gan.steps=0", "gan.warmup_steps=0",
                 "gan.crop=null", "fseg.steps=0", "fseg.crop=null", "fseg.width=0.02"]  # fmt: skip

        def cfg_of(cache):
            return load_config(None, items + [f"cache={cache}"] * (cache is not None))

        cfg = cfg_of(None)
        device = get_device(cfg)
        cache = measure_cache(cfg_of, root / "cache")
        for role in ("source", "target"):
            scenes = Scenes(cfg_of(root / "cache"), role, "train", labels=role == "source")
            for i in range(len(scenes)):
                scenes.image(i), scenes.label(i)
        wait = measure_wait(cfg_of, root / "cache", device, args.files)

        scenes = Scenes(cfg, "target", "val", labels=True, cache=False)
        net = build_segmenter(cfg, len(scenes.classes)).to(device, memory_format=torch.channels_last).eval()

        def predict(x):
            logits = net(x)
            yield from (net.upsample(logits[k : k + 1], x.shape[-2:])[0] for k in range(len(x)))

        stage(train_gan, items)  # no step of training: a generator as it starts
        def evaluation(way):
            call = serial_evaluation if way == "serial" else overlapped_evaluation
            return call(predict, scenes, cfg.eval.batch, device, root / way)

        def augmentation(way, k):
            if way == "serial":
                return serial_augmentation(cfg, device, root / "generated")
            shutil.copy(root / "runs/streets/gan/last.pt", make_folder(root / f"runs/run{k}/gan"))
            return overlapped_augmentation([*items, f"name=run{k}"])

        evaluations, augmentations = [], []
        for k in range(args.repeats):
            turns = ("serial", "overlapped") if k % 2 else ("overlapped", "serial")
            done = {way: evaluation(way) for way in turns}
            assert torch.equal(done["serial"][1], done["overlapped"][1])
            parts = done["serial"][0]
            evaluations.append(parts | {"serial": sum(parts.values()), "overlapped": done["overlapped"][0]})
            done = {way: augmentation(way, k) for way in turns}
            parts = done["serial"]
            augmentations.append(parts | {"serial": sum(parts.values()), "overlapped": done["overlapped"]})

    ratios = {f"{name} / decoded and resized": cache[name] / cache["decoded and resized"] for name in (
        "first use of the cache", "hashed and read", "read, hashed before", "from memory", "hashing alone")}
    ratios |= {f"data wait / self-ensembling step: {case}": share for case, share in wait.items()}
    speeds = {}
    for name, runs, images in (("evaluation", evaluations, len(scenes)), ("augmentation", augmentations, args.files)):
        middle = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        ratios[f"{name}, images per second, overlapped / serial"] = statistics.median(
            run["serial"] / run["overlapped"] for run in runs)
        whole = sum(middle[part] for part in ("reading", "computing", "writing"))
        for part in ("reading", "computing", "writing"):
            ratios[f"{name}, {part} / all of it, serial"] = middle[part] / whole
        speeds |= {f"{name}, {way}": images / middle[way] for way in ("serial", "overlapped")}
    for name, ratio in ratios.items():
        print(f"{ratio:8.4f}  {name}")
    about = {"files": f"{SIZE[1]}x{SIZE[0]} PNG, {file_bytes / 1e6:.1f} MB each", "input": list(args.input),
             "networks": f"width {args.width:g}, float32, one core on a CPU",
             "batch": f"{cfg.selfens.batch} per domain, evaluation {cfg.eval.batch}, augmentation {cfg.augment.batch}"}
    print("\nimages per second: " + ", ".join(f"{name} {value:.1f}" for name, value in speeds.items()))
    print("ms per image: " + ", ".join(f"{name} {1000 * value:.2f}" for name, value in cache.items()))
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    out = Path(args.json)
    make_folder(out.parent)
    write_json(out, {"ratios": ratios, "images per second": speeds, "about": about,
                     "environment": environment(cfg, device, get_precision(cfg, device))})
    print(f"written: {out}")


if __name__ == "__main__":
    main()
