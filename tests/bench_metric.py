"""What the metric costs on 2048x1024, beside cityscapesScripts on the same files and beside the network's inference.

    python tests/bench_metric.py                   one core, about a minute; writes runs/bench_metric.json
    python tests/bench_metric.py --device cuda     network, up-sampling and confusion on the GPU, mapping on the CPU

Makes its own label and prediction files. Times are the medians over files of the fastest of several repeats, because
other processes only ever add time. `mapping` is raw ids to train ids with the search for unknown ids, `confusion` the
count of one image (and, on a GPU, the label's way to it).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official  # noqa: E402

from datasets import Scenes, to_float  # noqa: E402
from evaluate import classify, confusion_matrix  # noqa: E402
from models import DeepLabVGG16  # noqa: E402
from runtime import autocast, environment, get_device, get_precision, load_config, make_folder, write_json  # noqa: E402


def regions(rng, size, ids) -> np.ndarray:
    """(H, W) uint8: smooth random regions of all the ids, as labels have them."""
    best, label = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8)
    for i in ids:
        field = torch.from_numpy(rng.standard_normal((1, 1, 12, 24), np.float32))
        field = F.interpolate(field, size, mode="bicubic", align_corners=False)[0, 0]
        label[field > best] = int(i)
        best = torch.maximum(best, field)
    return label.numpy()


def make_files(root: Path, size, count: int) -> list[Path]:
    """A Cityscapes val folder of `count` images below root; returns a prediction file of label ids for each."""
    rng, predictions = np.random.default_rng(0), []
    evaluated = [label.id for label in official.labels if not label.ignoreInEval]
    for i in range(count):
        name = f"town_{i:06d}_000019"
        label = regions(rng, size, range(34))
        wrong = regions(rng, size, evaluated)
        ignored = ~np.isin(label, evaluated)
        prediction = np.where(ignored | (regions(rng, size, (0, 1)) == 1), wrong, label)
        for path, array in ((root / f"leftImg8bit/val/town/{name}_leftImg8bit.png", np.repeat(label[..., None], 3, -1)),
                            (root / f"gtFine/val/town/{name}_gtFine_labelIds.png", label),
                            (root / f"pred/{name}.png", prediction)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        predictions.append(path)
    return predictions


def fastest(call, repeats: int, device=None):
    """(seconds of the fastest of `repeats` calls after a first one, what it returns)."""
    times, value = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        value = call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:] or times), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), help="height and width of the labels")
    parser.add_argument("--input", type=int, nargs=2, default=(512, 1024), help="height and width of the network's input")
    parser.add_argument("--width", type=float, default=1.0, help="network width relative to the published one")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="runs/bench_metric.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # cityscapesScripts uses one core, too

    with tempfile.TemporaryDirectory() as folder:
        predictions = make_files(Path(folder), tuple(args.size), args.files)
        cfg = load_config(None, ["source.dataset=cityscapes", "target.dataset=cityscapes", "classes=cityscapes19",
                                 f"source.root={folder}", f"target.root={folder}", f"target.size={list(args.input)}",
                                 f"device={args.device}"])
        device = get_device(cfg)
        precision = get_precision(cfg, device)
        scenes = Scenes(cfg, "target", "val", labels=True)
        classes = len(scenes.classes)
        official.args.evalInstLevelScore = False  # it would cost more; it is not what is compared
        matrix, total = official.generateMatrix(official.args), torch.zeros(classes, classes, dtype=torch.int64)
        rows = []
        for i, path in enumerate(predictions):
            label_path = scenes.samples[i].label
            t_label, _ = fastest(lambda p=label_path: np.array(Image.open(p)), args.repeats)
            t_pred, raw = fastest(lambda p=path: np.array(Image.open(p)), args.repeats)
            t_read, label = fastest(lambda k=i: scenes.native_label(k), args.repeats)
            t_pair, _ = fastest(lambda p=path, q=label_path: official.evaluatePair(
                str(p), q, official.generateMatrix(official.args), None, {}, official.args), args.repeats)
            official.evaluatePair(str(path), label_path, matrix, None, {}, official.args)
            prediction = torch.from_numpy(scenes.table[raw]).byte().to(device)  # as classify gives it
            t_count, counts = fastest(lambda y=label, p=prediction: confusion_matrix(
                torch.from_numpy(y).to(device), p, classes), args.repeats, device)
            total += counts.cpu()
            rows.append({"mapping": max(t_read - t_label, 0), "confusion": t_count, "official pair": t_pair,
                         "official counting": t_pair - t_label - t_pred, "label file": t_read, "prediction file": t_pred})

        net = DeepLabVGG16(classes, args.width).to(device, memory_format=torch.channels_last).eval()
        x = to_float(scenes.image(0)[None], device)

        @torch.inference_mode()
        def forward():
            with autocast(device, precision):
                return net(x)

        t_network, logits = fastest(forward, 5 if device.type == "cuda" else 0, device)
        with torch.inference_mode():
            t_up, _ = fastest(lambda: classify(net.upsample(logits, x.shape[-2:])[0], args.size), args.repeats, device)

    evaluated = [label.id for label in official.labels if not label.ignoreInEval]
    if not (np.array(matrix, np.int64)[np.ix_(evaluated, evaluated)] == total.numpy()).all():
        sys.exit("the two confusion matrices differ: the times compare different things")
    ms = {name: 1000 * float(np.median([row[name] for row in rows])) for name in rows[0]}
    ms |= {"network": 1000 * t_network, "up-sampling and argmax": 1000 * t_up}
    metric, inference = ms["mapping"] + ms["confusion"], ms["network"] + ms["up-sampling and argmax"]
    ratios = {
        "mapping + confusion / cityscapesScripts' pair (which reads its two files)": metric / ms["official pair"],
        "mapping + confusion / cityscapesScripts' pair less its file reading": metric / max(ms["official counting"], 1e-9),
        "mapping + confusion / inference (network, up-sampling, argmax)": metric / inference,
    }
    for name, ratio in ratios.items():
        print(f"{ratio:8.4f}  {name}")
    path = "its compiled path" if official.CSUPPORT else "its Python path (PyPI's package does not hold the compiled one)"
    about = {"cityscapesScripts": f"{path}, instance-level scores off", "labels": list(args.size), "input": list(args.input),
             "network": f"DeepLab VGG-16, width {args.width:g}, batch 1, {precision}", "files": args.files}
    print(f"\nms per image: {', '.join(f'{name} {value:.1f}' for name, value in ms.items())}")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    out = Path(args.json)
    make_folder(out.parent)
    write_json(out, {"ratios": ratios, "ms": ms, "about": about, "environment": environment(cfg, device, precision)})
    print(f"written: {out}")


if __name__ == "__main__":
    main()
