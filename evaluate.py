"""Stage 4: per-class IoU of the last step's teacher on the target's labelled val split; predictions as files.

    python evaluate.py --split val                                 the teacher of selfens.variant
    python evaluate.py CFG selfens.variant=source_only --model student
    python evaluate.py CFG --split val+test                        both together, and each sequence of them
    python evaluate.py CFG --checkpoint FILE                       another run's, to eval/checkpoint_...
    python evaluate.py --split val --export DIR                    and label-id PNGs, as servers take them
    python evaluate.py --split test --export DIR                   the same without labels, which servers keep
    python evaluate.py --images PATH --out DIR                     predict a photo, a folder of them, a video
    python evaluate.py --onnx FILE                                 the network for other programs
    python evaluate.py --compare A.json B.json                     two results side by side, per class
    python evaluate.py --table runs/streets-0 runs/streets-1       mean and deviation over finished runs

Reads OUTPUT/NAME/selfens/VARIANT/last.pt and the target data set; writes
OUTPUT/NAME/eval/VARIANT_MODEL_SPLIT.json and a sheet of images, labels and predictions beside it. The network
sees images resized to target.size; its logits are up-sampled bilinearly (align_corners=False) to that, and
then to each label's, or image's, own size. In Python:

    from evaluate import Segmenter
    net = Segmenter("runs/streets")
    ids = net("photo.jpg")                                         (H, W) positions in net.classes
"""

import json
import os
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

from runtime import FREE_KEYS, UserError, atomic_write, autocast, command_line, environment, get_device
from runtime import get_precision, nested, rank, read_json, run_main, write_json

# isort: split
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets import SUFFIXES, Scenes, class_list, classify, colourise, measure, predictions, read_image
from datasets import evenly, make_sheet, resized, to_float
from losses import IGNORE, iou_from_confusion
from models import build_segmenter, load_net, upsample

NOT_IN_13 = ("wall", "fence", "pole")  # of cityscapes16, left out of the mIoU* that papers on SYNTHIA report
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
VARIANTS = ("source_only", "self_ensembling", "tgcf_da", "tgcf_da_se", "target_only")
RESULT = {"miou": float, "per_class": dict, "classes": list, "split": str, "model": str, "variant": str,
          "step": int, "steps": int, "protocol": str, "config": dict, "confusion": list}  # fmt: skip
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 %, by degrees of freedom

# ------------------------------------------------------------------------------------------------------- use
class Segmenter:
    """A trained network, ready for pictures. All that it needs is in its checkpoint; no code of that is run.

    path: a last.pt, or a run's folder: of its variants the one that comes last in VARIANTS, target_only
    left out; device: as the key of cfg.yaml; precision: auto, float32 or bfloat16; model: teacher or student.
    classes: names by id; size: (height, width) at which the network sees a picture. Raises UserError for a
    file that is no such checkpoint.
    """

    def __init__(self, path, device="auto", precision="auto", model="teacher"):
        found = [Path(path, "selfens", variant, "last.pt") for variant in VARIANTS[:-1]]
        path = next((file for file in reversed(found) if file.exists()), path)
        settings = SimpleNamespace(device=device, precision=precision)
        self.path, self.device = path, get_device(settings)
        self.cast = autocast(self.device, get_precision(settings, self.device))
        self.net, self.state = load_net(path, model, build_segmenter, None, self.device)
        self.classes, self.size = self.state["classes"], self.state["config"]["target.size"]
        colours = self.state.get("colours") or [*class_list(nested(self.state["config"]))[1].values()]
        variant = str(self.state.get("variant"))  # becomes part of a file's name
        if np.shape(colours) != (len(self.classes), 3) or not variant.isidentifier():
            raise UserError(f"{path}: no variant or colours in it; use one that train_selfens.py wrote")
        self.palette = dict(zip(self.classes, colours, strict=True))

    def logits(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: (N, 3, H, W) in [-1, 1] -> a generator of each image's (C, H, W)."""
        with self.cast:
            logits = self.net(x)
        for z in logits:  # one at a time: up-sampled logits of a batch of large images would take gigabytes
            yield upsample(z[None], self.net.stride, x.shape[-2:])[0]

    @torch.inference_mode()
    def __call__(self, picture) -> np.ndarray:
        """picture: a path, PIL image or RGB array (H, W, 3) uint8 -> (H, W) uint8 ids. Raises UserError."""
        if isinstance(picture, (str, os.PathLike)):
            picture = read_image(str(picture))
        elif not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        picture = picture.convert("RGB")
        (z,) = self.logits(to_float(resized(picture, self.size)[None], self.device))
        return classify(z, picture.size[::-1]).cpu().numpy()

    def colour(self, ids) -> np.ndarray:
        """(H, W) ids -> (H, W, 3) uint8 in the colours of the classes."""
        return colourise(ids, self.palette)


def predict_video(net: Segmenter, path: Path, out: Path) -> None:
    """A video with the prediction over it, to OUT/NAME-overlay.mp4, without sound. Raises UserError."""
    import cv2  # half a second that only videos need

    video = cv2.VideoCapture(str(path))
    rate, count, *size = (video.get(p) for p in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT,
                                                 cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not video.isOpened() or not all(size):
        raise UserError(f"--images {path}: not a video that OpenCV can read; convert it to mp4")
    out.mkdir(parents=True, exist_ok=True)
    file, unfinished = out / f"{path.stem}-overlay.mp4", out / f".{path.stem}.tmp.mp4"
    writer = cv2.VideoWriter(str(unfinished), cv2.VideoWriter_fourcc(*"mp4v"), rate or 25, [*map(int, size)])
    with tqdm(total=int(count), desc="predict", mininterval=1) as bar:
        while (frame := video.read()[1]) is not None:
            picture = Image.fromarray(frame[..., ::-1])  # OpenCV has blue first
            overlay = Image.blend(picture, Image.fromarray(net.colour(net(picture))), 0.5)
            writer.write(np.ascontiguousarray(np.asarray(overlay)[..., ::-1]))
            bar.update()
    writer.release()
    if not bar.n or not unfinished.is_file():
        raise UserError(f"--images {path}: no frame of it could be read, or none written to {out}")
    os.replace(unfinished, file)
    print(f"written: {file}, {bar.n} frames")


def export_onnx(net: Segmenter, path: str) -> None:
    """The network as ONNX: "image" (1, 3, h, w) in [-1, 1] -> "logits" (1, C, h, w), h and w as in training.

    Its metadata say how an image is prepared, and name the classes. Raises UserError without the packages.
    """
    try:
        import onnxscript  # noqa: F401  by which torch writes the file
    except ImportError as error:
        raise UserError(f"--onnx: needs {error.name}; pip install onnx onnxscript") from None

    class Upsampled(torch.nn.Module):
        def forward(self, x):
            return upsample(self.net(x), self.net.stride, x.shape[-2:])

    model, (h, w) = Upsampled(), net.size
    model.net = net.net.cpu()
    names = {"input_names": ["image"], "output_names": ["logits"]}
    x = torch.zeros(1, 3, h, w)
    proto = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, **names).model_proto
    prepared = "RGB of 0 to 255, resized bilinearly with antialiasing; value / 127.5 - 1"
    for key, value in {"input": "image", "height": h, "width": w, "normalisation": prepared,
                       "classes": json.dumps(net.classes), "colours": json.dumps(net.palette)}.items():
        proto.metadata_props.add(key=key, value=str(value))
    atomic_write(Path(path), lambda file: file.write(proto.SerializeToString()))
    print(f"written: {path}; input image (1, 3, {h}, {w}), output logits")


# ------------------------------------------------------------------------------------------------- measuring
def save_png(path: Path, picture) -> None:
    """(H, W) or (H, W, 3) uint8 array, or an image, to a PNG, all or nothing."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    atomic_write(path, lambda file: picture.save(file, "PNG"))


def label_ids(scenes: Scenes) -> np.ndarray:
    """(C,) uint8: each train id's label id in the data set, the smallest where a class has several."""
    ids = [next(iter(np.flatnonzero(scenes.table == k)), 256) for k in range(len(scenes.classes))]
    if max(ids) > 255:  # a class that the target's labels never have, or labels that are colours
        name = list(scenes.classes)[np.argmax(ids)]
        raise UserError(f"--export: target.ids has no label id of 8 bits for '{name}', which may be predicted"
                        "; choose another class list with 'classes', or use --images")
    return np.array(ids, np.uint8)


def check_folder(path: str, data: str, option: str) -> Path:
    """The folder. Raises UserError if it lies in `data`, whose files it could overwrite."""
    if data and Path(path).resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{option} {path}: lies in {data}, whose files it could overwrite; choose another")
    return Path(path)


def sequences(scenes: Scenes) -> tuple[list[str], list[int]]:
    """(sequences, each image's number in them): a name's folder, or else what stands before its first "_".

    Where a name tells none, or all are of one, there is one, "all".
    """
    found = [os.path.dirname(s.name) or s.name.rpartition("_")[0].partition("_")[0] for s in scenes.samples]
    names = [*dict.fromkeys(found)]
    if "" in names or len(names) == 1:
        return ["all"], [0] * len(found)
    return names, [names.index(name) for name in found]


def evaluate(cfg, args, net: Segmenter) -> None:
    """Measures and exports one split, as args say. Raises UserError for a network of other classes."""
    labels = not (args.split == "test" and args.export)
    scenes, sizes, batch = Scenes(cfg, "target", args.split, labels), set(), cfg.inference_batch
    if net.classes != [*scenes.classes]:
        raise UserError(f"{net.path}: of the classes {net.classes}, not the config's {[*scenes.classes]}")
    if scenes.size != net.size:
        raise UserError(f"target.size={scenes.size}: {net.path} was trained at {net.size}; give that")
    if args.export:
        raw_ids, folder = label_ids(scenes), check_folder(args.export, cfg.target.root, "--export")

    def seen(i, prediction):
        sizes.add(tuple(prediction.shape))
        if args.export:
            save_png(folder / f"{scenes.samples[i].name}.png", raw_ids[prediction.cpu().numpy()])

    if labels:
        confusions = measure(net.logits, scenes, batch, net.device, sequences(scenes)[1], seen)
    else:
        for i, z in predictions(net.logits, scenes.image, len(scenes), batch, net.device):
            seen(i, classify(z, read_image(scenes.samples[i].image).size[::-1]))
    if args.export:
        print(f"written: {len(scenes)} label-id PNGs below {folder}")
    if labels and rank() == 0:
        result, variant = summarise(cfg, args, scenes, net, confusions.numpy(), sizes), net.state["variant"]
        own = net.state["config"].get("name") == cfg.name  # or it would replace this run's
        name = f"{'' if own else 'checkpoint_'}{variant}_{args.model}_{args.split}.json"
        out = Path(cfg.output, cfg.name, "eval", name)
        write_json(out, result)
        save_png(out.with_suffix(".png"), examples(net, scenes, f"{variant} {args.model}"))
        print_result(result)
        print(f"written: {out} and {out.with_suffix('.png')}")


def summarise(cfg, args, scenes: Scenes, net: Segmenter, confusions, sizes: set) -> dict:
    """What is written. confusions: (sequences, C, C) counts; sizes: the labels' (height, width)."""
    iou, config, classes = iou_from_confusion(confusions.sum(0)), net.state["config"], scenes.classes
    if np.isnan(iou).all():
        raise UserError(f"{cfg.target.root}: no labelled pixel in {args.split}; nothing to evaluate")
    names, groups = sequences(scenes)
    parts = {name: {"images": groups.count(k), "miou": float(np.nanmean(iou_from_confusion(confusions[k]))),
                    "confusion": confusions[k].tolist()}
             for k, name in enumerate(names) if confusions[k].any()}  # fmt: skip
    per_class = {n: None if np.isnan(v) else float(v) for n, v in zip(classes, iou, strict=True)}
    step, steps, (height, width) = net.state["step"], config["selfens.steps"], min(sizes)
    protocol = (
        f"mIoU over {len(classes)} classes ({scenes.class_list}), {cfg.target.dataset} {args.split}, "
        f"{len(scenes)} images, {args.model} of step {step} of {steps}, "
        f"input {scenes.size[1]}x{scenes.size[0]}, logits up-sampled bilinearly (align_corners=False) "
        f"to the label's own size ({width}x{height}{', and others' * (len(sizes) > 1)}), "
        f"label {IGNORE} ignored, one scale, no flip"
    )
    result = {
        "miou": float(np.nanmean(iou)), "variant": net.state["variant"], "model": args.model,
        "split": args.split, "step": step, "steps": steps, "seed": config["seed"], "images": len(scenes),
        "per_class": per_class, "confusion": confusions.sum(0).tolist(), "sequences": parts,
        "classes": list(classes), "protocol": protocol, "config": config,
        "environment": environment(net.device, get_precision(cfg, net.device)),
    }  # fmt: skip
    if scenes.class_list == "cityscapes16":
        starred = [v for n, v in per_class.items() if v is not None and n not in NOT_IN_13]
        result["miou13"] = float(np.mean(starred)) if starred else None
    return result


@torch.inference_mode()
def examples(net: Segmenter, scenes: Scenes, caption: str) -> Image.Image:
    """Six images of the split, evenly, with their labels and predictions."""
    shown, rows = evenly(len(scenes), 6), []
    for i in shown:
        (z,) = net.logits(to_float(scenes.image(i)[None], net.device))
        readings = (scenes.label(i), classify(z, scenes.size).cpu())
        picture = scenes.image(i).permute(1, 2, 0).numpy()
        rows.append([picture, *(colourise(ids, scenes.classes) for ids in readings)])
    return make_sheet(["target image", "label", caption], rows)


def predict_images(net: Segmenter, path: str, out: str) -> None:
    """A photo, or each PNG and JPEG below a folder, to OUT/train_ids/, OUT/colour/ and OUT/overlay/."""
    folder, unreadable = Path(path) if Path(path).is_dir() else None, []
    files = sorted(folder.rglob("*")) if folder else [Path(path)]
    paths = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and p.is_file()]
    names = [p.relative_to(folder or p.parent).with_suffix(".png") for p in paths]
    if not paths:
        raise UserError(f"--images {path}: no such file or folder, or no PNG, JPEG or video")
    if len(set(names)) < len(names):
        raise UserError(f"--images {path}: two of its images differ only in suffix")
    check_folder(out, folder or "", "--out")
    for name, file in tqdm(list(zip(names, paths, strict=True)), "predict", mininterval=1):
        try:
            picture = read_image(str(file))
        except UserError as error:
            unreadable.append(f"left out: {error}")
            continue
        ids = net(picture)
        colour = net.colour(ids)
        save_png(Path(out, "train_ids", name), ids)
        save_png(Path(out, "colour", name), colour)
        save_png(Path(out, "overlay", name), Image.blend(picture, Image.fromarray(colour), 0.5))
    print(f"written: train_ids, colour and overlay of {len(paths) - len(unreadable)} images below {out}")
    ids = ", ".join(f"{k} {name}" for k, name in enumerate(net.classes))
    print(f"train ids: {ids}", *unreadable, sep="\n")


# ------------------------------------------------------------------------------------------------- reporting
def percent(iou: float | None) -> str:
    return "absent" if iou is None else f"{100 * iou:.2f}"


def print_result(result: dict) -> None:
    """Fixed-width per-class table and the line that says how the numbers came about."""
    print(f"\n{'class':<16}{'IoU %':>8}{'pixels %':>10}")
    rows = np.asarray(result["confusion"]).sum(1)
    for (name, iou), pixels in zip(result["per_class"].items(), rows, strict=True):
        print(f"{name:<16}{percent(iou):>8}{100 * pixels / max(rows.sum(), 1):>10.2f}")
    print(f"{'mIoU':<16}{percent(result['miou']):>8}")
    if "miou13" in result:
        print(f"{'mIoU*':<16}{percent(result['miou13']):>8}   over 13, without {', '.join(NOT_IN_13)}")
    for name, part in result["sequences"].items() if len(result["sequences"]) > 1 else ():
        print(f"{name:<16}{percent(part['miou']):>8}   mIoU of this sequence's {part['images']} images")
    if absent := [name for name, iou in result["per_class"].items() if iou is None]:
        print(f"not in the mean, because in neither label nor prediction: {', '.join(absent)}")
    print(f"protocol: {result['protocol']}\n")


def read_result(path) -> dict:
    return read_json(path, RESULT, "give a JSON that evaluate.py wrote to RUN/eval/")


def compare(paths: list[str]) -> None:
    """Prints two results and their difference. Raises UserError for other classes or another split."""
    a, b = map(read_result, paths)
    for key in ("classes", "split"):
        if a[key] != b[key]:
            raise UserError(f"{paths[1]}: {key} {b[key]}, but {a[key]} in {paths[0]}; compare like with like")
    print(f"\nA: {paths[0]}\n   {a['protocol']}\nB: {paths[1]}\n   {b['protocol']}\n")
    print(f"{'IoU %':<16}{'A':>8}{'B':>8}{'B - A':>8}")
    rows = [(name, a["per_class"][name], b["per_class"][name]) for name in a["classes"]]
    for name, x, y in [*rows, ("mIoU", a["miou"], b["miou"])]:
        difference = "" if None in (x, y) else f"{100 * (y - x):+.2f}"
        print(f"{name:<16}{percent(x):>8}{percent(y):>8}{difference:>8}")
    if differ := [name for name, x, y in rows if (x is None) != (y is None)]:
        print(f"the means are over different classes: only one of A and B has {', '.join(differ)}")


def collect(folders: list[str]) -> dict:
    """{(split, model, run without its seed, variant): [result]} of run folders, each counted once.

    Raises UserError where results of one key have one seed, or differ in step or in config but for the seed.
    """
    rows, alike, free = {}, {}, {"seed", *FREE_KEYS} - {"precision"}
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        paths = sorted(folder.glob("eval/[!ac]*.json"))  # not augmented_..., and checkpoint_... of other runs
        if not paths:
            raise UserError(f"{folder}: no eval/*.json in it; run evaluate.py with its config first")
        for path in paths:
            result = read_result(path)
            config, variant = result["config"] | {"step": result["step"]}, result["variant"]
            seed = f"-{config.get('seed')}"
            key = (result["split"], result["model"], str(config.get("name")).removesuffix(seed), variant)
            # Paths may differ, too, if only in the seed, and keys of stages that the variant does not use.
            unread = () if variant.startswith(("tgcf", "dcan")) else ("gan.", "fseg.", "augment.")
            then, old = alike.setdefault(key, (config, seed))
            for k in sorted({*then} & {*config} - free):  # keys come and go
                changed = then[k] not in (config[k], re.sub(rf"{seed}\b", old, str(config[k])))
                if changed and not k.startswith(unread):
                    raise UserError(f"{path}: {k} is {config[k]!r}, but {then[k]!r} in another run of that "
                                    "name; give runs that differ in the seed alone")
            if any(r["config"].get("seed") == config.get("seed") for r in rows.setdefault(key, [])):
                raise UserError(f"{path}: another run of that name has the same seed; give one of them")
            rows[key].append(result)
            checkpoint = folder / "selfens" / variant / "last.pt"
            if checkpoint.exists() and os.path.getmtime(checkpoint) > os.path.getmtime(path):
                print(f"warning: {checkpoint} is newer than {path}; run evaluate.py again")
    runs = [k[2] for k in rows]  # in the order given
    order = sorted(rows, key=lambda k: (runs.index(k[2]), k[0], k[1], [*VARIANTS, k[3]].index(k[3])))
    return {k: rows[k] for k in order}


def table(folders: list[str]) -> None:
    """Prints a row for the runs NAME-SEED, then what rows differ in.

    gap: % of the way from their source_only to their target_only; >10: mIoU of the classes that their
    target_only reads with an IoU of more than 10 %.
    """
    rows = collect(folders)
    names = next(iter(rows.values()))[0]["classes"]
    if any(result["classes"] != names for results in rows.values() for result in results):
        raise UserError("--table: runs of different class lists; give those of one")
    wide = max(len(run) for _, _, run, _ in rows) + 2
    print("\nIoU in %, mean ± sample deviation over runs")
    print(f"{'run':<{wide}}{'variant':<17}{'model':<9}{'split':<9}{'step':>11}{'runs':>5}{'mIoU':>14}{'gap':>6}"
          f"{'>10':>7}" + "".join(f"{n[:10]:>11}" for n in names))
    means = {key: np.mean([100 * r["miou"] for r in results]) for key, results in rows.items()}
    ious = {key: {n: class_mean(results, n) for n in names} for key, results in rows.items()}
    for key, results in rows.items():
        split, model, run, variant = key
        values = [100 * r["miou"] for r in results]
        spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "–"
        low, high = (means.get((*key[:3], end), np.nan) for end in ("source_only", "target_only"))
        gap = f"{100 * (means[key] - low) / (high - low):.0f}" if high > low else ""
        upper = ious.get((*key[:3], "target_only"), {})
        read = [ious[key][n] or 0 for n in names if (upper.get(n) or 0) > 0.1]
        read = percent(np.mean(read)) if read else ""
        print(f"{run:<{wide}}{variant:<17}{model:<9}{split:<9}{results[0]['step']:>5}/{results[0]['steps']:<5}"
              f"{len(results):>5}{means[key]:>8.2f} ±{spread:>5}{gap:>6}{read:>7}"
              + "".join(f"{percent(ious[key][n]):>11}" for n in names))
    print_differences(rows)


def class_mean(results: list[dict], name: str) -> float | None:
    """Mean IoU of a class over the results that have it; None if none has."""
    ious = [r["per_class"][name] for r in results if r["per_class"][name] is not None]
    return np.mean(ious) if ious else None


def print_differences(rows: dict) -> None:
    """Paired differences in mIoU of what `collect` gives: within a run, and of a variant between runs."""
    data = [f"{role}.{key}" for role in ("source", "target") for key in ("dataset", "files", "size")]
    data = {key: [results[0]["config"].get(k) for k in data] for key, results in rows.items()}
    lines = []
    for a, b in combinations(rows, 2):
        changed = [k for k in (2, 3) if a[k] != b[k]]
        first, second = ({r["config"]["seed"]: 100 * r["miou"] for r in rows[key]} for key in (a, b))
        gains = [second[seed] - first[seed] for seed in first if seed in second]
        if a[:2] == b[:2] and len(changed) == 1 and data[a] == data[b] and len(gains) > 1:
            half = T95[min(len(gains), 10) - 2] * np.std(gains, ddof=1) / len(gains) ** 0.5
            seeds = f"{len(gains)} seeds{', not resolved' if half >= abs(np.mean(gains)) else ''}"
            what = f"  {b[2]} {b[3]} over {a[changed[0]]}, {a[0]}, {a[1]}"
            lines.append(f"{what}: {np.mean(gains):+.2f} ± {half:.2f} ({seeds})")
    if lines:
        print("\ndifference in mIoU, mean over the seeds of both, and its 95 % interval by Student's t")
        print(*lines, sep="\n")


# ------------------------------------------------------------------------------------------------------ main
def main() -> None:
    cfg, args = command_line(
        ("--split", {"choices": ("val", "train", "test", "val+test"), "default": "val"}),
        ("--model", {"choices": ("teacher", "student"), "default": "teacher"}),
        ("--checkpoint", {}), ("--export", {}), ("--images", {}), ("--out", {}), ("--onnx", {}),
        ("--compare", {"nargs": 2}), ("--table", {"nargs": "+"}),
    )  # fmt: skip
    if args.table:
        return table(args.table)
    if args.compare:
        return compare(args.compare)
    if (args.images is None) != (args.out is None):
        raise UserError("command line: --images PATH and --out DIR go together")
    path = args.checkpoint or Path(cfg.output, cfg.name, "selfens", cfg.selfens.variant, "last.pt")
    net = Segmenter(path, cfg.device, cfg.precision, args.model)
    if rank() == 0 and args.onnx:
        export_onnx(net, args.onnx)
    elif rank() == 0 and args.images and Path(args.images).suffix.lower() in VIDEOS:
        predict_video(net, Path(args.images), Path(args.out))
    elif rank() == 0 and args.images:
        predict_images(net, args.images, args.out)
    if not args.onnx and not args.images:
        evaluate(cfg, args, net)


if __name__ == "__main__":
    run_main(main)
