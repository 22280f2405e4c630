"""Stage 4: per-class IoU of the last step's teacher on the target's labelled val split; predictions as files.

Reads OUTPUT/NAME/selfens/VARIANT/last.pt and the target data set; writes OUTPUT/NAME/eval/VARIANT_MODEL_SPLIT.json
and a sheet of images, labels and predictions beside it. The network sees images resized to target.size; its logits are
up-sampled bilinearly (align_corners=False: pixel centres at half-integers) to each label's, or image's, own size.

    python evaluate.py --split val                                     the teacher of selfens.variant
    python evaluate.py configs/carla_camvid.yaml selfens.variant=source_only --model student
    python evaluate.py --split val --export predictions                and label-id PNGs, as benchmark servers take them
    python evaluate.py --images DIR --out DIR                          predict any folder of images, no labels needed
    python evaluate.py --split val --curve                             the teachers that selfens.snapshot_every kept
    python evaluate.py --augmented JUDGE.pt                            do augmented images keep labels and follow guides?
    python evaluate.py --compare A.json B.json                         two results side by side, per class
    python evaluate.py --table runs/streets-0 runs/streets-1           mean and deviation over finished runs
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from augment import open_augmented, read_manifest
from datasets import Scenes, class_list, colourise, header_size, links_out, read_image, to_float
from losses import IGNORE, style_statistics
from models import FCN8s, build_segmenter
from runtime import (
    THREADS, UserError, VARIANTS, all_sum, atomic_write, autocast, behind, command_line, environment, gather, get_device,
    get_precision, load_checkpoint, load_weights, make_folder, make_sheet, prefetch, rank, refuse_changes, run_main,
    shown, stage_config, weights_digest, world, write_json,
)  # fmt: skip

NOT_IN_13 = ("wall", "fence", "pole")  # of cityscapes16, left out of mIoU*, which the papers on SYNTHIA report beside mIoU

# ---------------------------------------------------------------------------------------------------------- metric


def confusion_matrix(label: torch.Tensor, prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """label, prediction: integer tensors of one shape -> (classes, classes) int64, row = label, column = prediction.

    label: 0 ... classes - 1, or IGNORE for pixels that do not count; prediction: 0 ... classes - 1.
    """
    # IGNORE is counted as a row like any other and cut off: cheaper than selecting pixels, and no wait for the device.
    # Two bytes hold every pair of up to 127 classes, and a pass over them is what this costs.
    dtype = torch.int16 if classes < 128 else torch.int32
    pairs = label.to(dtype) * classes + prediction.to(dtype)
    return torch.bincount(pairs.view(-1), minlength=(IGNORE + 1) * classes).view(-1, classes)[:classes]


def iou_from_confusion(confusion) -> np.ndarray:
    """(C, C) counts -> (C,) float64 IoU = TP / (TP + FP + FN); NaN for a class in neither label nor prediction."""
    confusion = np.asarray(confusion, np.int64)
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


# ------------------------------------------------------------------------------------------------------ prediction


def load_network(cfg, which: str, classes: dict, device, precision: str, path: Path | None = None):
    """The trained network: (predict, the checkpoint). path: of the checkpoint or snapshot; None is the last step's.

    predict(x: (N, 3, h, w) in [-1, 1]) yields each image's logits (C, h, w), one at a time: up-sampled logits of a batch
    at 2048x1024 would take gigabytes. Raises UserError for a checkpoint of other classes, config or architecture.
    """
    parts = {"classes", "config", which} if path else {"classes", "config", "teacher", "student"}
    path = path or Path(cfg.output, cfg.name, "selfens", cfg.selfens.variant, "last.pt")
    mend = f"train it first: python train_selfens.py CFG selfens.variant={cfg.selfens.variant}"
    state = load_checkpoint(path, mend)
    if not parts <= state.keys():
        raise UserError(f"{path}: not a checkpoint of train_selfens.py; {mend}")
    if state["classes"] != list(classes):
        raise UserError(f"{path}: trained on other classes ({shown(state['classes'])}) than the config's "
                        f"({', '.join(classes)}); use the data sets and 'classes' that it was trained with")
    refuse_changes(state["config"], stage_config(cfg, ("selfens",)), path)
    model = build_segmenter(cfg, len(classes)).to(device, memory_format=torch.channels_last).eval()
    load_weights(model, state[which], path)

    def predict(x):
        with autocast(device, precision):
            logits = model(x)
        for k in range(len(x)):
            yield model.upsample(logits[k : k + 1], x.shape[-2:])[0]

    return predict, state


@torch.inference_mode()
def predictions(predict, read, indices, batch: int, device, title: str, alone: bool = False):
    """Yields (i, logits (C, h, w) float32, more) for each of the indices, in order.

    Several processes take turns, batch by batch, so that every image is in the same batch whatever their number; alone:
    this process takes all.

    read(i): ((3, h, w) uint8, more), called in threads up to two batches ahead of the network; more: whatever else belongs
    to the image. predict(x: (N, 3, h, w) in [-1, 1]): each image's logits.
    """
    batches = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    batches = batches if alone else batches[rank() :: world()]
    ready = prefetch((i for some in batches for i in some), read, 2 * batch, THREADS)
    for some in tqdm(batches, title, mininterval=1, leave=False, disable=rank() > 0):
        images, more = zip(*islice(ready, len(some)), strict=True)
        x = to_float(torch.stack(images), device)
        yield from ((i, z.float(), m) for i, z, m in zip(some, predict(x), more, strict=True))


def classify(z: torch.Tensor, size) -> torch.Tensor:
    """z: (C, h, w) logits -> (H, W) uint8 train ids: resized bilinearly (align_corners=False), then the argmax."""
    if z.shape[-2:] != tuple(size):
        z = F.interpolate(z[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return z.argmax(0).byte()


def evaluate_model(predict, scenes: Scenes, batch: int, device, title: str, seen=None) -> torch.Tensor:
    """Confusion matrix (C, C) int64 of `predict` (see predictions) over all scenes, each at its label's own size.

    It is summed on the device image by image, then over the processes. seen(i, prediction (H, W)), where given, is
    called for each image of this process.
    """
    def read(i):
        return scenes.image(i), torch.from_numpy(scenes.native_label(i))

    classes = len(scenes.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for i, z, label in predictions(predict, read, range(len(scenes)), batch, device, title):
        label = label.to(device)
        prediction = classify(z, label.shape)
        confusion += confusion_matrix(label, prediction, classes)
        if seen:
            seen(i, prediction)
    return all_sum(confusion).cpu()


def output_folder(path: str, data: str | None, option: str) -> Path:
    """Makes the folder that `option` names, and tries it now, because hours of prediction may come before the first file.

    data: a folder of inputs in which nothing may be written, or None.
    """
    folder = Path(path)
    if data is not None and folder.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{option} {path}: lies in {data}, whose files it could overwrite; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set {option} to a folder you may write") from None
    return folder


def save_png(path: Path, picture) -> None:
    """(H, W) or (H, W, 3) uint8 array, or an image, to a PNG, all or nothing, its folder made."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    make_folder(path.parent)
    atomic_write(path, lambda file: picture.save(file, "PNG"))


def label_ids(scenes: Scenes) -> np.ndarray:
    """(C,) uint8: for each train id the data set's own label id, the smallest where a class is made up of several."""
    table = np.full(1, -1) if scenes.table is None else scenes.table
    ids = [next(iter(np.flatnonzero(table == k)), 256) for k in range(len(scenes.classes))]
    if max(ids) > 255:  # a class that the target's labels never have, or labels that are colours
        raise UserError(f"--export: {scenes.dataset} has no label id of 8 bits for '{list(scenes.classes)[np.argmax(ids)]}', "
                        "which may be predicted; choose another class list with 'classes', or use --images")
    return np.array(ids, np.uint8)


def predict_folder(predict, cfg, classes: dict, device, images: str, out: str) -> None:
    """Every PNG and JPEG below `images` -> OUT/train_ids/, OUT/colour/ and OUT/overlay/, under its own path and name."""
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"--images {images}: no such folder")
    found = sorted(root.rglob("*"))
    if out_of_it := links_out(found, root):  # a linked folder is in `found` itself; rglob does not go into it
        path, real = min(out_of_it.items())
        raise UserError(f"{path}: leads to {real}, outside --images {images}; copy it there, or predict that place by itself")
    files = [p for p in found if p.is_file()]
    paths = [p for p in files if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not paths:
        raise UserError(f"--images {images}: no PNG or JPEG in it")
    names = {}
    for path in paths:
        name = path.relative_to(root).with_suffix(".png")
        if names.setdefault(name, path) != path:
            raise UserError(f"{path}: its prediction would be {name}, as that of {names[name]}; rename one of them")
    for path in paths:  # what is no image at all stops it now and not after hours
        header_size(str(path))
    kinds = [output_folder(Path(out, kind), images, "--out") for kind in ("train_ids", "colour", "overlay")]

    def read(i):
        picture = read_image(str(paths[i]))
        small = np.asarray(picture.resize(cfg.target.size[::-1], Image.BILINEAR))
        return torch.from_numpy(small.transpose(2, 0, 1).copy()), picture.size[::-1]

    def write(i, ids):
        picture = read_image(str(paths[i]))  # again, at its own size: keeping those of the batches would take memory
        colour = colourise(ids, classes)
        overlay = Image.blend(picture, Image.fromarray(colour), 0.5)
        for folder, result in zip(kinds, (ids, colour, overlay), strict=True):
            save_png(folder / paths[i].relative_to(root).with_suffix(".png"), result)

    with behind(2 * THREADS) as submit:
        for i, z, size in predictions(predict, read, range(len(paths)), cfg.eval.batch, device, "predict"):
            submit(write, i, classify(z, size).cpu().numpy())
    gather(None)
    other = len(files) - len(paths)
    print(f"written: {out}/train_ids, colour and overlay of {len(paths)} images"
          + (f"; {other} files in {images} are neither PNG nor JPEG and were left out" if other else ""))
    print("train ids: " + ", ".join(f"{k} {name}" for k, name in enumerate(classes)))


# ------------------------------------------------------------------------------------------------------- reporting


def percent(iou: float | None) -> str:
    return "absent" if iou is None else f"{100 * iou:.2f}"


def print_table(result: dict) -> None:
    """Fixed-width per-class table and the line that says how the numbers came about."""
    print(f"\n{'class':<14}{'IoU %':>8}{'pixels %':>10}")
    rows = np.asarray(result["confusion"]).sum(1)
    for (name, iou), pixels in zip(result["per_class"].items(), rows, strict=True):
        print(f"{name:<14}{percent(iou):>8}{100 * pixels / max(rows.sum(), 1):>10.2f}")
    print(f"{'mIoU':<14}{percent(result['miou']):>8}")
    if "miou13" in result:
        print(f"{'mIoU*':<14}{percent(result['miou13']):>8}   over 13 classes, without {', '.join(NOT_IN_13)}")
    absent = [name for name, iou in result["per_class"].items() if iou is None]
    if absent:
        print(f"excluded from the mean, in neither label nor prediction: {', '.join(absent)}")
    print(f"protocol: {result['protocol']}\n")


RESULT = {"miou", "per_class", "classes", "split", "model", "variant", "step", "protocol", "config"}


def read_result(path, keys=RESULT, mend="give the JSON that it writes to RUN/eval/") -> dict:
    """A JSON that evaluate.py wrote, with these keys. Raises UserError for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a result ({getattr(error, 'strerror', 0) or error}); {mend}") from None
    if not isinstance(result, dict) or not keys <= result.keys():
        raise UserError(f"{path}: not a result of evaluate.py; {mend}")
    return result


def compare(paths: list[str]) -> None:
    """Prints two results side by side with the difference. Raises UserError where they do not measure the same."""
    a, b = map(read_result, paths)
    for what, one, other in (("classes", a["classes"], b["classes"]), ("split", a["split"], b["split"]),
                             ("target.dataset", a["config"].get("target.dataset"), b["config"].get("target.dataset"))):
        if one != other:
            raise UserError(f"{paths[1]}: {what} is {other}, but {one} in {paths[0]}; compare results of one {what}")
    print(f"\nA: {paths[0]}\n   {a['protocol']}\nB: {paths[1]}\n   {b['protocol']}\n")
    print(f"{'IoU %':<14}{'A':>8}{'B':>8}{'B - A':>8}")
    means = [(name, a[key], b[key]) for name, key in (("mIoU", "miou"), ("mIoU*", "miou13")) if key in a and key in b]
    for name, x, y in [(name, a["per_class"][name], b["per_class"][name]) for name in a["classes"]] + means:
        print(f"{name:<14}{percent(x):>8}{percent(y):>8}{'' if None in (x, y) else f'{100 * (y - x):+.2f}':>8}")
    differ = [name for name in a["classes"] if (a["per_class"][name] is None) != (b["per_class"][name] is None)]
    if differ:
        print(f"the means are over different classes: only one of A and B has {', '.join(differ)}")


def table(folders: list[str]) -> None:
    """Prints mean and sample deviation over run folders for each variant, model and split found in their eval/.

    Runs whose names differ in the seed at their end alone (NAME-SEED) are one row. "gap" is the share of the way from
    source_only to target_only, in %, of the first name that has both.
    """
    rows, names = {}, []
    for folder in folders:
        found = sorted(Path(folder, "eval").glob("*.json"))
        if not found:
            raise UserError(f"{folder}: no eval/*.json in it; run evaluate.py with its config first")
        for path in found:
            result = read_result(path)
            run = str(result["config"].get("name")).removesuffix(f"-{result['config'].get('seed')}")
            rows.setdefault((result["split"], result["model"], run, result["variant"]), []).append(result)
            names = names or result["classes"]
            if result["classes"] != names:
                raise UserError(f"{path}: other classes than in {folders[0]}; tabulate runs of one class list")
    runs = list(dict.fromkeys(key[2] for key in rows))  # in the order of the folders
    wide = max(map(len, [*runs, "run"])) + 2 if len(runs) > 1 else 0
    stars = all("miou13" in result for results in rows.values() for result in results)
    print("\nIoU in %, mean ± sample deviation over runs\n" + "run".ljust(wide) * (wide > 0)
          + f"{'variant':<16}{'model':<8}{'split':<6}{'runs':>4}{'mIoU':>14}{'gap':>6}"
          + f"{'mIoU*':>14}" * stars + "".join(f"{name[:10]:>11}" for name in names))

    def means(key, mean="miou"):
        return [100 * r[mean] for r in rows.get(key, ()) if r[mean] is not None]

    for key in sorted(rows, key=lambda k: (k[0], k[1], runs.index(k[2]), VARIANTS.index(k[3]))):
        ends = next((e for run in runs if all(e := [means((*key[:2], run, v)) for v in ("source_only", "target_only")])), None)
        cells = []
        for mean in ("miou", "miou13")[: 1 + stars]:
            values = means(key, mean)
            spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "–"
            cells.append(f"{np.mean(values):>8.2f} ±{spread:>5}" if values else f"{'absent':>14}")
        low, high = (np.mean(e) for e in ends) if ends else (0, 0)
        closed = 100 * (np.mean(means(key)) - low) / (high - low) if high > low and means(key) else None
        cells.insert(1, f"{'' if closed is None else round(closed):>6}")
        for name in names:
            ious = [r["per_class"][name] for r in rows[key] if r["per_class"][name] is not None]
            cells.append(f"{100 * np.mean(ious):>11.2f}" if ious else f"{'absent':>11}")
        print(key[2].ljust(wide) * (wide > 0) + f"{key[3]:<16}{key[1]:<8}{key[0]:<6}{len(rows[key]):>4}" + "".join(cells))


# ------------------------------------------------------------------------------- kept teachers, augmented images


def write_curve(cfg, scenes: Scenes, split: str, device, precision: str) -> None:
    """mIoU of every teacher that was kept -> OUTPUT/NAME/eval/curves/VARIANT_SPLIT.json and the screen. To be looked at, not
    chosen from: the network to use is the last step's."""
    variant = cfg.selfens.variant
    folder = Path(cfg.output, cfg.name, "selfens", variant)
    paths = sorted(folder.glob("teacher-*.pt"))
    if not paths:
        raise UserError(f"{folder}: no teachers were kept; train with selfens.snapshot_every=N")
    out = output_folder(Path(cfg.output, cfg.name, "eval", "curves"), None, "'output'") / f"{variant}_{split}.json"
    curve = {"variant": variant, "split": split, "seed": cfg.seed, "classes": list(scenes.classes)}
    curve |= {"step": [], "miou": [], "iou": []}
    for path in paths:
        predict, state = load_network(cfg, "teacher", scenes.classes, device, precision, path)
        iou = iou_from_confusion(evaluate_model(predict, scenes, cfg.eval.batch, device, path.name))
        curve["step"].append(state["step"])
        curve["miou"].append(float(np.nanmean(iou)))
        curve["iou"].append([None if np.isnan(v) else float(v) for v in iou])
    if rank() == 0:
        write_json(out, curve)
        print(f"\n{variant}, {split}\n{'step':>8}{'mIoU':>8}" + "".join(f"{name[:10]:>11}" for name in scenes.classes))
        for step, miou, ious in zip(curve["step"], curve["miou"], curve["iou"], strict=True):
            print(f"{step:>8}{percent(miou):>8}" + "".join(f"{percent(iou):>11}" for iou in ious))
        print(f"written: {out}")


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, of each column of two (K, M) tensors, over the rows; the mean of the M. A constant column counts as 0."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-6)).mean())


def load_fseg(path, classes, device) -> tuple[FCN8s, str]:
    """A trained f_seg, in eval mode, and the digest of its weights. Raises UserError for another file or other classes."""
    state = load_checkpoint(path, "that is the last.pt of a gan/fseg folder, which train_gan.py writes", ("f_seg",))
    if state.get("classes") != list(classes):
        raise UserError(f"{path}: f_seg of classes {shown(state.get('classes'))}, not the config's {list(classes)}")
    f_seg = FCN8s(len(classes), state["config"]["fseg.width"], state["config"]["fseg.batch_norm"])
    load_weights(f_seg, state["f_seg"], path)
    return f_seg.to(device, memory_format=torch.channels_last).eval(), weights_digest(state["f_seg"])


@torch.inference_mode()
def class_shares(f_seg: FCN8s, scenes: Scenes, batch: int, device, precision: str) -> np.ndarray:
    """(C,) f_seg's mean probabilities over all pixels of these images: what it takes their content to be. Sum 1."""
    total = 0
    for first in tqdm(range(0, len(scenes), batch), "content", mininterval=1, leave=False, disable=rank() > 0):
        x = torch.stack([scenes.image(i) for i in range(first, min(first + batch, len(scenes)))])
        with autocast(device, precision):
            p = f_seg(to_float(x, device))
        total = total + p.float().softmax(1).mean((2, 3)).double().sum(0).cpu().numpy()
    return gather(total / len(scenes))[0]  # of all processes the first one's: they must draw alike


@torch.inference_mode()
def judge_augmented(cfg, checkpoint: str, device, precision: str) -> None:
    """How well the augmented images keep their labels and follow their guides -> eval/augmented/METHOD.json and the screen.

    agreement: of the pixels at which an f_seg of other weights (JUDGE.pt: the last.pt of another run's gan/fseg folder)
    agrees with the label on the source image, the share at which it does on the augmented image, for each class and for
    all pixels. style distance: mean distance of the style statistics (losses.py; images in [-1, 1]) of the augmented images
    from those of their guides, beside that of the source images. style correlation: Pearson's over the images between the
    augmented image's statistic and its guide's, mean of the six, beside that of the source images.
    Raises UserError for a checkpoint that is no f_seg, or one of other classes.
    """
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    augmented, classes = open_augmented(cfg, source), list(source.classes)
    f_seg, judge = load_fseg(checkpoint, classes, device)
    own = Path(cfg.output, cfg.name, "gan", "fseg", "last.pt")
    if own.is_file() and weights_digest(load_checkpoint(own, "", ("f_seg",))["f_seg"]) == judge:
        print(f"attention: {checkpoint} is the f_seg that G was trained with; one of another seed is a fairer judge")

    guide_of = {line["file"]: line["style"] for line in read_manifest(augmented.folder, augmented.generator).values()}
    number = {sample.name: i for i, sample in enumerate(target.samples)}
    n, batch = len(source), cfg.eval.batch
    kept, right = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
    statistics = {"source": [], "augmented": [], "guide": []}

    def reading(x):
        with autocast(device, precision):
            return f_seg(x).argmax(1)

    def add(name, x):
        statistics[name].append(style_statistics(x).double().cpu())

    for first in tqdm(range(0, n, batch), "judge", mininterval=1, leave=False):
        some = range(first, min(first + batch, n))
        x_s, y_s = to_float(torch.stack([source.image(i) for i in some]), device), torch.stack([source.label(i) for i in some])
        hit = (reading(x_s).cpu() == y_s) & (y_s != IGNORE)
        for first_of_style in range(0, len(augmented), n):
            files = [augmented.samples[first_of_style + i].image for i in some]
            x_g = to_float(torch.stack([augmented.image(first_of_style + i) for i in some]), device)
            x_t = [target.image(number[guide_of[Path(f).relative_to(augmented.folder).as_posix()]]) for f in files]
            still = hit & (reading(x_g).cpu() == y_s)
            right += np.bincount(y_s[hit].numpy(), minlength=len(classes))
            kept += np.bincount(y_s[still].numpy(), minlength=len(classes))
            add("source", x_s)
            add("augmented", x_g)
            add("guide", to_float(torch.stack(x_t), device))
    s, g, t = (torch.cat(statistics[name]) for name in ("source", "augmented", "guide"))

    result = {
        "method": cfg.augment.method, "judge": judge, "generator": augmented.generator,
        "images": len(augmented), "agreement": float(kept.sum() / max(right.sum(), 1)),
        "agreement per class": {name: float(k / r) if r else None for name, k, r in zip(classes, kept, right, strict=True)},
        "style distance": float((g - t).abs().mean()), "style distance of the source": float((s - t).abs().mean()),
        "style correlation": correlation(g, t), "style correlation of the source": correlation(s, t), "config": cfg.flat,
    }
    out = output_folder(Path(cfg.output, cfg.name, "eval", "augmented"), None, "'output'") / f"{cfg.augment.method}.json"
    write_json(out, result)
    each = ", ".join(f"{n} {'absent' if v is None else f'{100 * v:.0f}'}" for n, v in result["agreement per class"].items())
    print(f"\n{cfg.augment.method}: {len(augmented)} augmented images")
    print(f"of the pixels right on the source image, right on the augmented: {100 * result['agreement']:.1f} %")
    print(f"  per class: {each}")
    for name in ("style distance", "style correlation"):
        print(f"{name} with the guide: {result[name]:.3f}, of the source image: {result[name + ' of the source']:.3f}")
    print(f"written: {out}")


# ------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    def arguments(parser):
        parser.add_argument("--split", choices=("val", "train", "test"), default="val", help="target split (default val)")
        parser.add_argument("--model", choices=("teacher", "student"), default="teacher", help="default teacher")
        task = parser.add_mutually_exclusive_group()
        task.add_argument("--export", metavar="DIR", help="write predictions as label-id PNGs, too; with --split test no "
                          "labels are read and nothing is measured, because servers keep them")
        task.add_argument("--images", metavar="DIR", help="predict the PNG and JPEG files in and below DIR instead")
        task.add_argument("--curve", action="store_true", help="measure the teachers that selfens.snapshot_every kept instead")
        task.add_argument("--augmented", metavar="JUDGE.pt", help="measure instead how well the augmented images keep their "
                          "labels, by an f_seg of other weights, and follow their guides")
        task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print two results side by side instead")
        task.add_argument("--table", nargs="+", metavar="RUN", help="print mean and deviation over these run folders instead")
        parser.add_argument("--out", metavar="DIR", help="where --images writes train-id and colour PNGs and overlays")

    cfg, args = command_line(__doc__, ("", "source", "target", "augment", "selfens", "eval"), arguments)
    if args.table:
        return table(args.table)
    if args.compare:
        return compare(args.compare)
    if (args.images is None) != (args.out is None):
        raise UserError("command line: --images DIR and --out DIR go together")
    folder, variant, split = Path(cfg.output, cfg.name), cfg.selfens.variant, args.split
    device = get_device(cfg)
    precision = get_precision(cfg, device)
    list_name, classes = class_list(cfg)
    if args.augmented:
        return judge_augmented(cfg, args.augmented, device, precision) if rank() == 0 else None
    if args.curve:
        return write_curve(cfg, Scenes(cfg, "target", split, labels=True), split, device, precision)
    predict, state = load_network(cfg, args.model, classes, device, precision)
    if args.images is not None:
        return predict_folder(predict, cfg, classes, device, args.images, args.out)

    # The data, and the places for what will be written, before the first prediction.
    if split == "test" and cfg.target.dataset == "streets":
        raise UserError("target.dataset=streets: has no test split; use --split val")
    labels = not (split == "test" and args.export)
    scenes = Scenes(cfg, "target", split, labels, cache=False)  # every image is read once: keeping them would only grow
    export = output_folder(args.export, cfg.target.root, "--export") if args.export else None
    raw_ids = label_ids(scenes) if export else None
    if labels:
        out = output_folder(folder / "eval", None, "'output'") / f"{variant}_{args.model}_{split}.json"

    sizes = {}

    def export_ids(i, prediction):
        save_png(export / f"{scenes.samples[i].name}.png", raw_ids[prediction])

    with behind(2 * THREADS) as submit:

        def seen(i, prediction):
            sizes.setdefault(tuple(prediction.shape))
            if export:
                submit(export_ids, i, prediction.cpu().numpy())

        if labels:
            confusion = evaluate_model(predict, scenes, cfg.eval.batch, device, "evaluate", seen)
            iou = iou_from_confusion(confusion)
        else:
            def read(i):
                return scenes.image(i), header_size(scenes.samples[i].image)[::-1]

            for i, z, size in predictions(predict, read, range(len(scenes)), cfg.eval.batch, device, "predict"):
                seen(i, classify(z, size))
    for more in gather([*sizes]):
        sizes |= dict.fromkeys(more)
    if rank():
        return
    if export:
        print(f"written: {len(scenes)} label-id PNGs below {export}")
    if not labels:
        return
    if np.isnan(iou).all():
        raise UserError(f"{cfg.target.root}: no labelled pixel in the {split} split; nothing to evaluate")
    per_class = {name: None if np.isnan(v) else float(v) for name, v in zip(classes, iou, strict=True)}
    height, width = next(iter(sizes))
    own = f"{width}x{height}" + (f", one of {len(sizes)} sizes" if len(sizes) > 1 else "")
    result = {
        "miou": float(np.nanmean(iou)), "per_class": per_class,
        "confusion": confusion.tolist(), "classes": list(classes), "variant": variant, "model": args.model,
        "split": split, "step": state["step"], "images": len(scenes),
        "protocol": f"mIoU over {len(classes)} classes ({list_name}), {cfg.target.dataset} {split}, {len(scenes)} images, "
                    f"{args.model} of the last step ({state['step']}), input {scenes.size[1]}x{scenes.size[0]}, logits "
                    f"up-sampled bilinearly (align_corners=False) to the label's own size ({own}), "
                    f"label {IGNORE} ignored, one scale, no flip",
        "config": cfg.flat, "environment": environment(cfg, device, precision),
    }  # fmt: skip
    if list_name == "cityscapes16":
        starred = [v for name, v in per_class.items() if v is not None and name not in NOT_IN_13]
        result["miou13"] = float(np.mean(starred)) if starred else None
    write_json(out, result)

    shown, rows = [int(i) for i in np.unique(np.linspace(0, len(scenes) - 1, 6).astype(int))], []
    for i, z, image in predictions(predict, lambda i: 2 * (scenes.image(i),), shown, 1, device, "sheet", True):
        pictures = colourise(scenes.label(i), classes), colourise(classify(z, scenes.size).cpu(), classes)
        rows.append([image.permute(1, 2, 0).numpy(), *pictures])
    save_png(out.with_suffix(".png"), make_sheet(["target image", "label", f"{variant} {args.model}"], rows))
    print_table(result)
    print(f"written: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    run_main(main)
