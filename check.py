"""Checks the data before anything is trained on it.

    python check.py CFG            reads every file's header, and the pixels of a sample
    python check.py CFG --full     decodes every file, on all cores
    python check.py --init SIMULATOR CAMERA mine.yaml    writes a config for two folders to begin with

Counts the pairs, names every file that cannot be used (exit status 2 if there is one), says what is not used,
prints each class's share of the pixels, and writes OUTPUT/NAME/check/sheet.png, images with their labels over
them. It reads what training reads: the target's training labels only for selfens.variant=target_only and
target.labelled. The config of --init is complete but for the names of the classes.
"""

import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

from runtime import UserError, atomic_write, command_line, run_main

# isort: split
import numpy as np

from datasets import IGNORE, SUFFIXES, Scenes, class_list, colourise, has_labels, make_sheet
from pairs import open_image, read_image


def check_split(cfg, role: str, split: str, full: bool, seen: dict) -> Scenes:
    """Prints a line on a split. seen: {image file: (role, split)}, to which this split is added."""
    labels = role == "source" or has_labels(cfg, role, split)
    if (role, split) == ("target", "train"):
        labels = cfg.selfens.variant == "target_only" or cfg.target.labelled > 0
    scenes = Scenes(cfg, role, split, labels, math.inf if full else 64, strict=False)
    for _, image, _ in scenes.samples:
        first = seen.setdefault(os.path.realpath(image), (role, split))
        if first != (role, split) and os.path.exists(image):
            scenes.problems.append(("", f"{image}: is in {' '.join(first)}, too; narrow {role}.files"))
    note = "" if labels else ", labels not looked at"
    print(f"{role} {split:<7}{len(scenes):>6} images{note}, {len(scenes.whole)} decoded, "
          f"{len(scenes.problems)} problems")
    return scenes


def print_unused(cfg, role: str, splits: list[Scenes]) -> None:
    """Says which image files none of the splits has."""
    root = getattr(cfg, role).root
    used = {os.path.relpath(p, root) for scenes in splits for s in scenes.samples for p in s[1:] if p}
    if unused := sorted({file for scenes in splits for file in scenes.unused} - used):
        print(f"note: {len(unused)} image files are not used, such as {unused[0]}: not in {role}.files")


def overlays(splits: list[Scenes]) -> list[list[np.ndarray]]:
    """[image, image with its label over it, ignored pixels dark] of 5 sound samples."""
    rows, bad = [], {name for scenes in splits for name, _ in scenes.problems}
    whole = [(scenes, i) for scenes in splits for i in sorted(scenes.whole)]
    sound = [(scenes, i) for scenes, i in whole if scenes.samples[i].name not in bad]
    sound = [(scenes, i) for scenes, i in sound if scenes.samples[i].label] or sound
    for scenes, i in sound[:: max(1, len(sound) // 5)][:5]:
        image, label = scenes.image(i).permute(1, 2, 0).numpy(), colourise(scenes.label(i), scenes.classes)
        rows.append([image, (0.4 * image + 0.6 * label).astype(np.uint8)])
    return rows


def print_shares(classes: dict, pixels: dict) -> None:
    """Each class's share of the labelled pixels of each role, and notes on what has none."""
    print(f"\n{'share of labelled pixels, %':<30}" + "".join(f"{role:>8}" for role in pixels))
    known = [p[: len(classes)] for p in pixels.values()]
    for k, name in enumerate(classes):
        print(f"{name:<30}" + "".join(f"{100 * p[k] / max(1, p.sum()):>8.2f}" for p in known))
    ignored = [100 * p[IGNORE] / max(1, p.sum()) for p in pixels.values()]
    print(f"{'ignored, of all pixels':<30}" + "".join(f"{share:>8.2f}" for share in ignored))
    for role, p in zip(pixels, known, strict=True):
        if absent := [name for name, count in zip(classes, p, strict=True) if not count]:
            print(f"note: {role} has no labelled pixel of {', '.join(absent) if p.any() else 'any class'}")


# ----------------------------------------------------------------------------------- a config to begin with
INIT = """# Written by check.py --init. Give each class its name, everywhere in this file: class_1 is what the
# labels call 1. Classes may be joined: road: [7, 8]. Then: python check.py FILE
name: NAME
class_colours:            # in the order of the train ids; [R, G, B], for pictures alone
COLOURS
source:
  dataset: folder
  root: SIMULATOR
  size: SOURCE_SIZE
  files: {train: SOURCE_FILES}
  read: READ
  ids:                    # and their share of the pixels in LABELS label files; ignore: what is of no class
IDS
target:
  dataset: folder
  root: CAMERA
  size: TARGET_SIZE
  files: {train: TARGET_FILES}    # with labelled images: val: [images, labels], and ids as above
fseg: {steps: 500, crop: CROP}    # for two CPU cores and an hour or two; with a GPU, more of everything
gan: {steps: 1200, warmup_steps: 400, crop: CROP}
selfens: {steps: 600}
"""


def families(root: str) -> dict[str, list[Path]]:
    """{pattern: its image files} below root: those whose folder and end of name are alike."""
    found = defaultdict(list)
    for path in sorted(Path(root).rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            folders = path.relative_to(root).parent.parts
            folders = ["*"] * len(folders[:-1]) + [*folders[-1:]]
            tail = re.search(r"\D*$", path.stem)[0] if re.search(r"\d", path.stem) else ""
            found["/".join([*folders, f"*{tail}{path.suffix}"])].append(path)
    if not found:
        raise UserError(f"--init: {root}: no such folder, or no PNG or JPEG in it")
    return found


def look_at(paths: list[Path]) -> tuple[str, Counter]:
    """(how such a label is `read`, pixels of each id; of an image: of each colour), of up to 20 files."""
    ids, read = Counter(), "index"
    images = [open_image(str(path)) for path in paths[:: -(-len(paths) // 20)]]
    flat = {image.mode for image in images} <= {"L", "P"}
    for image in images:
        x = np.asarray(image if flat else image.convert("RGB"))
        if not flat:
            read = "rgb" if x[..., 1:3].any() or read == "rgb" else "red"
            x = x.astype(int) @ [1 << 16, 1 << 8, 1]
        ids.update(dict(zip(*(v.tolist() for v in np.unique(x, return_counts=True)), strict=True)))
    return read, Counter({v >> 16: n for v, n in ids.items()}) if read == "red" else ids


def write_config(simulator: str, camera: str, file: str) -> None:
    """A config for a folder of images with labels and a folder of photos. Raises UserError."""
    if os.path.exists(file):
        raise UserError(f"--init: {file} exists; give another name")
    seen = {pattern: (paths, *look_at(paths)) for pattern, paths in families(simulator).items()}
    labels = {p: v for p, v in seen.items() if len(v[2]) <= 100 and v[0][0].suffix.lower() == ".png"}
    images = {p: v for p, v in seen.items() if p not in labels}
    if not labels or not images:
        raise UserError(f"--init: {simulator}: {', '.join(seen)}: not images and labels (PNG, few colours); "
                        "write 'files' yourself, as README shows")
    image, label = (max(some, key=lambda p: len(some[p][0])) for some in (images, labels))
    paths, read, ids = labels[label]
    photos, photo_paths = max(families(camera).items(), key=lambda item: len(item[1]))
    sizes = []
    for path in (images[image][0][0], photo_paths[0]):
        w, h = read_image(str(path)).size
        sizes.append([144, max(8, round(144 * w / h / 16) * 16)])
    rgb, colours, lines = read == "rgb", [], []
    for v, count in ids.most_common():
        colour = [v >> 16, v >> 8 & 255, v & 255] if rgb else [37 * v % 256, 91 * v % 256, 151 * v % 256]
        name = f"class_{v:06x}" if rgb else f"class_{v}"
        colours.append(f"  {name}: {colour}")
        part = 100 * count / ids.total()
        lines.append(f"    {name}: {colour if rgb else v}".ljust(26) + f"# {part:.2f} %")
    words = {
        "SIMULATOR": json.dumps(simulator), "SOURCE_SIZE": sizes[0],
        "SOURCE_FILES": json.dumps([image, label]), "READ": read, "LABELS": min(20, len(paths)),
        "CAMERA": json.dumps(camera), "TARGET_SIZE": sizes[1], "TARGET_FILES": json.dumps([photos]),
        "CROP": [80, min(112, sizes[0][1], sizes[1][1])],
        "NAME": json.dumps(re.sub(r"[^\w-]", "_", Path(file).stem)),
        "COLOURS": "\n".join(colours), "IDS": "\n".join(lines), "FILE": file,
    }  # fmt: skip
    text = re.sub("|".join(words), lambda match: str(words[match[0]]), INIT)
    atomic_write(Path(file), lambda f: f.write(text.encode()))
    print(f"written: {file}: {image} with labels {label}, {len(ids)} ids; photos {photos}\n"
          f"next: give the classes in {file} their names, then python check.py {shlex.quote(file)}")


def main() -> None:
    cfg, args = command_line(("--full", {"action": "store_true"}), ("--init", {"nargs": 3}))
    if args.init:
        return write_config(*args.init)
    name, classes = class_list(cfg)
    print(f"classes: {len(classes)} of {name}")
    seen = {}
    splits = {role: [check_split(cfg, role, split, args.full, seen) for split in ("train", "val")]
              for role in ("source", "target")}  # fmt: skip
    for role, checked in splits.items():
        print_unused(cfg, role, checked)
    print_shares(classes, {role: train.counts + val.counts for role, (train, val) in splits.items()})
    if rows := [s + t for s, t in zip(overlays(splits["source"]), overlays(splits["target"]), strict=False)]:
        columns = [f"{role}: {word}" for role in splits for word in ("image", "label over it")]
        path = Path(cfg.output, cfg.name, "check", "sheet.png")
        atomic_write(path, lambda file: make_sheet(columns, rows).save(file, "PNG"))
        print(f"\nwritten: {path}")
    problems = {role: train.problems + val.problems for role, (train, val) in splits.items()}
    for role, found in problems.items():
        for text in dict.fromkeys(text for _, text in found):
            print(f"{role}: {text}")
        if found:
            names = sorted({name for name, _ in found if name})
            print(f"to leave out what cannot be mended: {role}.exclude: {json.dumps(names)}")
    if any(problems.values()):
        raise UserError("data check: problems, each named above")
    more = "" if args.full else " in the sample"
    print(f"data check: no problem{more}; next: python train_gan.py {args.items}")


if __name__ == "__main__":
    run_main(main)
