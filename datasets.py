"""Data sets as declarative tables, the check of what lies on disk, and the batches that the training stages draw.

Adding a data set is adding a `Table` to TABLES: where images and labels are, how an id is read from a label, and which
ids make up which class of which class list. (`streets` is drawn in streets.py; `folder` is a table in the config.)
Source and target are read onto one common class list. Train ids are positions in that list; everything that is known
but not in it is IGNORE; an unknown id is an error.

    python datasets.py CFG            checks the data: all files' headers, and the pixels of a sample
    python datasets.py CFG --full     decodes every file, on all cores

The check counts pairs, names every file that cannot be used (exit status 2 if there is one), prints each class's share
of the pixels per domain, and writes OUTPUT/NAME/check/sheet.png, images with their labels over them. It reads what
training reads: the target's training labels are looked at for selfens.variant=target_only alone.
"""

import difflib
import hashlib
import inspect
import json
import math
import os
import re
import sys
import threading
import time
import uuid
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import PIL.features
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from losses import IGNORE
from runtime import (
    UserError, atomic_write, command_line, make_folder, make_sheet, one_line, prefetch, random_generator, rank, run_main, shown,
    world,
)  # fmt: skip
from streets import streets_scene

# ------------------------------------------------------------------------------------------------------ class lists

# name -> {class: RGB colour}; the order of the classes gives their train ids.
CLASS_LISTS = {
    "streets": {
        "road": (128, 64, 128), "pavement": (244, 35, 232), "building": (70, 70, 70), "fence": (190, 153, 153),
        "pole": (153, 153, 153), "sign": (220, 220, 0), "vegetation": (107, 142, 35), "sky": (70, 130, 180),
        "person": (220, 20, 60), "car": (0, 0, 142),
    },
    "camvid10": {
        "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
        "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign": (192, 128, 128), "fence": (64, 64, 128),
        "car": (64, 0, 128), "pedestrian": (64, 64, 0),
    },
    "cityscapes19": {
        "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
        "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
        "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
        "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
        "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
    },
    "idd_camvid7": {
        "drivable": (128, 64, 128), "non-drivable": (244, 35, 232), "living thing": (220, 20, 60), "vehicle": (0, 0, 142),
        "roadside object": (220, 220, 0), "far object": (70, 70, 70), "sky": (70, 130, 180),
    },
}  # fmt: skip
# The classes that SYNTHIA has in common with Cityscapes.
CLASS_LISTS["cityscapes16"] = {name: colour for name, colour in CLASS_LISTS["cityscapes19"].items()
                               if name not in ("terrain", "truck", "train")}


# ----------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """One data set.

    files: split -> (pattern of the images, pattern of the labels or None), below the root. `*`, `?` and `**/` must
        stand for the same text in both: that is what makes a pair. A `*` at the very end leaves out the suffix. The
        split "all" is divided into train and val by `group`.
    read: "index" (the value of a one-channel or palette PNG), "red" (the red channel of an RGB or RGBA PNG), "red16"
        (the same, 16 bits per channel) or "rgb" (the colour; an id is then 65536 R + 256 G + B).
    known: every id that the data set's labels may hold.
    ids: class list -> {class: ids}; known ids in none of its classes are IGNORE. The first list that source and target
        share is the one that `classes: auto` takes.
    group: image paths in order -> a group number for each; the held-out split is made of whole groups, because
        neighbouring frames of one drive are near-duplicates.
    val_every: of the groups, the 4th and every val_every-th after it are held out (the last if there are fewer than 4).
    """

    files: dict
    read: str
    known: tuple
    ids: dict
    group: object = None
    val_every: int = 7


def groups_by_gap(names: list[str], gap: int = 100) -> list[int]:
    """Groups of frames with numeric names: a step of more than `gap` between neighbours starts a new one."""
    numbers = [int(re.sub(r"\D", "", Path(name).stem) or 0) for name in names]
    return list(np.cumsum([False] + [b - a > gap for a, b in zip(numbers, numbers[1:], strict=False)]))


def groups_by_folder(names: list[str]) -> list[int]:
    """One group per folder, numbered in the order in which the folders appear."""
    numbers = {}
    return [numbers.setdefault(Path(name).parent, len(numbers)) for name in names]


def groups_by_block(names: list[str], size: int = 100) -> list[int]:
    """Contiguous blocks of about `size` frames; seven blocks where there are too few frames for that."""
    n = len(names)
    blocks = min(n, max(7, n // size))
    return [i * blocks // n for i in range(n)]


# Label id of each Cityscapes class. The other 15 ids (0 to 6, 9, 10, 14 to 16, 18, 29, 30) are known and ignored; a
# licence plate is -1 in cityscapesScripts' list and is not drawn into labelIds.png.
CITYSCAPES_IDS = {
    "road": [7], "sidewalk": [8], "building": [11], "wall": [12], "fence": [13], "pole": [17], "traffic light": [19],
    "traffic sign": [20], "vegetation": [21], "terrain": [22], "sky": [23], "person": [24], "rider": [25], "car": [26],
    "truck": [27], "bus": [28], "train": [31], "motorcycle": [32], "bicycle": [33],
}  # fmt: skip
CITYSCAPES = {name: {c: CITYSCAPES_IDS[c] for c in CLASS_LISTS[name]} for name in ("cityscapes19", "cityscapes16")}

TABLES = {
    "streets": Table(files={}, read="index", known=tuple(range(10)),
                     ids={"streets": {name: [i] for i, name in enumerate(CLASS_LISTS["streets"])}}),
    "carla": Table(
        files={"all": ("CameraRGB/*", "CameraMask/*.png")},
        read="red",
        known=tuple(range(23)),
        ids={"camvid10": {
            "sky": [13], "building": [1, 11, 15], "pole": [5], "road": [6, 7], "pavement": [8], "tree": [9, 22],
            "sign": [12, 18], "fence": [2, 17], "car": [10], "pedestrian": [4],
        }},
        group=groups_by_gap,
    ),
    "camvid": Table(
        files={split: (f"{split}/*", f"{split}annot/*.png") for split in ("train", "val", "test")},
        read="index",
        known=tuple(range(12)),
        ids={
            "camvid10": {name: [i] for i, name in enumerate(CLASS_LISTS["camvid10"])},  # 10 bicyclist, 11 void
            "idd_camvid7": {"drivable": [3], "non-drivable": [4], "living thing": [9, 10], "vehicle": [8],
                            "roadside object": [2, 6, 7], "far object": [1, 5], "sky": [0]},
        },
    ),
    "cityscapes": Table(
        files={split: (f"leftImg8bit/{split}/*/*_leftImg8bit.png", f"gtFine/{split}/*/*_gtFine_labelIds.png")
               for split in ("train", "val", "test")},
        read="index",
        known=tuple(range(34)),
        ids=CITYSCAPES,
    ),
    # "Playing for Data". The palette's index is the Cityscapes label id: initLabels.m, which comes with the data, lists
    # the 34 names of Cityscapes in its order and, at index 34, the licence plate. Two in a hundred frames are held out,
    # about as many as Cityscapes' val split has: they only say how good f_seg is.
    "gta5": Table(
        files={"all": ("images/*", "labels/*.png")},
        read="index",
        known=tuple(range(35)),
        ids=CITYSCAPES,
        group=groups_by_block,
        val_every=50,
    ),
    # SYNTHIA-RAND-CITYSCAPES. 0 void, 13 parking slot, 14 road work, 16 terrain, 18 truck, 20 train and 22 lane marking
    # are in none of the 16 common classes. The id_to_trainid of public adaptation code (descendants of AdaptSegNet and
    # ADVENT, with 16 and with 19 classes) agrees on every entry; where it names 22, it ignores it.
    "synthia": Table(
        files={"all": ("RGB/*", "GT/LABELS/*.png")},
        read="red16",
        known=tuple(range(23)),
        ids={"cityscapes16": {
            "road": [3], "sidewalk": [4], "building": [2], "wall": [21], "fence": [5], "pole": [7], "traffic light": [15],
            "traffic sign": [9], "vegetation": [6], "sky": [1], "person": [10], "rider": [17], "car": [8], "bus": [19],
            "motorcycle": [12], "bicycle": [11],
        }},
        group=groups_by_block,
        val_every=50,
    ),
    "idd_lite": Table(
        files={"all": ("leftImg8bit/train/*/*_image.jpg", "gtFine/train/*/*_label.png")},
        read="index",
        known=(*range(7), 255),
        ids={"idd_camvid7": {name: [i] for i, name in enumerate(CLASS_LISTS["idd_camvid7"])}},
        group=groups_by_folder,
    ),
}  # fmt: skip

VALUES = {"index": 1 << 8, "red": 1 << 8, "red16": 1 << 16, "rgb": 1 << 24}  # ids that each way of reading can give


# ---------------------------------------------------------------------------------------------- tables in the config


def _colour(value, key: str) -> int:
    """[R, G, B] as the number 65536 R + 256 G + B. Raises UserError that names the key."""
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, int) and 0 <= v < 256 for v in value):
        raise UserError(f"{key}: a colour is [R, G, B], each 0 to 255, not {shown(value)}")
    return value[0] << 16 | value[1] << 8 | value[2]


def _config_ids(cfg, role: str, read: str) -> tuple[dict, set]:
    """`ROLE.ids` as ({class list: {class: ids}}, all ids in it). Raises UserError for what fits no class list."""
    ids, owner = {}, {}
    for name, value in getattr(cfg, role).ids.items():
        key, values = f"{role}.ids: {name}", value if isinstance(value, list) else [value]
        if read == "rgb":
            single = values and all(isinstance(v, int) for v in values)
            values = [_colour(v, key) for v in ([values] if single else values)]
        for v in values:
            if not isinstance(v, int) or not 0 <= v < VALUES[read]:
                raise UserError(f"{key}: an id read by '{read}' is a whole number, 0 to {VALUES[read] - 1}, not {shown(v)}")
            if owner.setdefault(v, name) != name:
                raise UserError(f"{key}: {_id_text(v, read)} belongs to '{owner[v]}' already")
        ids[name] = values
    lists = {"own": cfg.class_colours} if cfg.class_colours else CLASS_LISTS
    unfit = {list_name: [c for c in ids if c not in classes and c != "ignore"] for list_name, classes in lists.items()}
    offers = {n: {c: ids.get(c, []) for c in lists[n]} for n in lists if not unfit[n] and any(ids.get(c) for c in lists[n])}
    if not offers:
        best = min(unfit, key=lambda n: len(unfit[n]))
        wrong = f"'{unfit[best][0]}' is not a class of '{best}', the nearest list" if unfit[best] else "no class has an id"
        raise UserError(f"{role}.ids: {wrong}; set class_colours to a list of your own")
    return offers, set(owner)


def _config_files(part, role: str) -> dict:
    """`ROLE.files` as Table.files. Raises UserError that names the key and the split."""
    files = {}
    for split, value in part.files.items():
        key, patterns = f"{role}.files: {split}", value if isinstance(value, list) else [value]
        if split not in ("train", "val", "test"):
            raise UserError(f"{key}: unknown split; known are train, val and test")
        if len(patterns) not in (1, 2) or not all(isinstance(p, str) for p in patterns):
            raise UserError(f"{key}: must be [pattern of the images, pattern of the labels], or the first alone, not "
                            f"{shown(value)}")
        for p in patterns:
            parts = p.split("/")
            whole = all(part == "**" or "**" not in part for part in parts) and parts[-1] != "**"
            if {"", ".", ".."} & {*parts} or re.search(r"[\[\0]", p) or not whole or not 1 <= len(_stars(p)) <= 32:
                raise UserError(f"{key}: {shown(p)} must be a pattern below root, with *, ? or **/ (1 to 32 of them) for what "
                                "differs; no '..' or '['")
        if _stars(patterns[0]) != _stars(patterns[-1]):
            raise UserError(f"{key}: {patterns[0]!r} and {patterns[1]!r} need the same *, ? and **/ in the same order, because "
                            "what they stand for makes the pair")
        files[split] = (patterns[0], patterns[1] if len(patterns) == 2 else None)
    return files if "val" in files or "train" not in files else {"all": files.pop("train"), **files}


def get_table(cfg, role: str) -> Table:
    """The table of `role` ("source" or "target"). Raises UserError for an unknown data set and for a wrong `folder` key."""
    part = getattr(cfg, role)
    if cfg.class_colours:
        if "ignore" in cfg.class_colours or len(cfg.class_colours) > IGNORE:
            raise UserError(f"class_colours: at most {IGNORE} classes, and none with the name 'ignore'")
        for name, colour in cfg.class_colours.items():
            _colour(colour, f"class_colours: {name}")
    if part.dataset == "folder":
        if not part.files:
            raise UserError(f"{role}.files: {role}.dataset=folder needs it: {{train: [pattern of images, pattern of labels]}}")
        table = Table(_config_files(part, role), part.read, (), {}, groups_by_block, 50)
        if any(labels for _, labels in table.files.values()) and not (part.read and part.ids):
            raise UserError(f"{role}.{'ids' if part.read else 'read'}: {role}.files names labels, and these are read by it")
    elif part.dataset in TABLES:
        table = TABLES[part.dataset]
        for leaf in ("files", "read"):
            if getattr(part, leaf) is not None:
                raise UserError(f"{role}.{leaf}: only for {role}.dataset=folder; {part.dataset} has its own in datasets.py")
    else:
        near = difflib.get_close_matches(part.dataset, [*TABLES, "folder"], 1)
        raise UserError(f"{role}.dataset={part.dataset}: unknown{f', did you mean {near[0]}' if near else ''}; known are "
                        f"{', '.join(TABLES)} and folder")
    if part.ids and table.read:
        ids, known = _config_ids(cfg, role, table.read)
        table = replace(table, ids=ids, known=tuple(sorted(known.union(table.known))))
    return table


def has_labels(cfg, role: str, split: str) -> bool:
    """Whether the data set of `role` has labels in `split` at all (only a `folder` may have none)."""
    table = get_table(cfg, role)
    return part_of(table, split)[1] is not None if table.files else True


def part_of(table: Table, split: str) -> tuple:
    """(pattern of the images, pattern of the labels or None) of a split; (None, None) where there is no such split."""
    return table.files.get(split) or (table.files.get("all") if split in ("train", "val") else None) or (None, None)


def class_list(cfg) -> tuple[str, dict]:
    """The (name, {class: colour}) that source and target share. Raises UserError where there is none."""
    tables = {role: get_table(cfg, role) for role in ("source", "target")}
    # A domain without any label fits every class list.
    offers = [list(table.ids) for table in tables.values() if table.ids]
    shared = [name for name in (offers[0] if offers else []) if name in offers[-1]]
    if cfg.classes != "auto":
        if cfg.classes not in shared:
            raise UserError(f"classes={cfg.classes}: {cfg.source.dataset} and {cfg.target.dataset} share {shared or 'none'}")
        shared = [cfg.classes]
    if len(shared) > 1 and cfg.classes == "auto" and (cfg.source.ids or cfg.target.ids):
        raise UserError(f"classes: {' and '.join(shared)} fit equally; name one, or set class_colours to a list of your own")
    if not shared:
        words = [f"{role}.dataset={getattr(cfg, role).dataset} ({', '.join(table.ids) or 'no labels'})"
                 for role, table in tables.items()]
        raise UserError(f"{' and '.join(words)} have no class list in common; class_colours, source.ids, target.ids make one")
    if cfg.class_colours and shared[0] != "own":
        raise UserError("class_colours: not used, because neither source.ids nor target.ids maps onto it; remove or set them")
    return shared[0], ({k: tuple(v) for k, v in cfg.class_colours.items()} if shared[0] == "own" else CLASS_LISTS[shared[0]])


def train_id_table(dataset: str | Table, classes: str) -> np.ndarray:
    """(VALUES[read],) int16: raw id -> train id, IGNORE for known ids outside the class list, -1 for unknown ones."""
    table = TABLES[dataset] if isinstance(dataset, str) else dataset
    lookup = np.full(VALUES[table.read], -1, np.int16)
    lookup[list(table.known)] = IGNORE
    for train_id, name in enumerate(CLASS_LISTS.get(classes, table.ids[classes])):
        lookup[table.ids[classes].get(name, [])] = train_id
    return lookup


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Sample:
    """One image: its name (path below the split's folder, no suffix), and where image and label are read from."""

    name: str
    image: str
    label: str | None


STREETS_VAL = 100  # scenes in each domain's val split
SUFFIXES = (".png", ".jpg", ".jpeg")
WILD = re.compile(r"(\*\*/|\*|\?)")


def _stars(pattern: str) -> list[str]:
    return WILD.findall(pattern)


def _match(root: Path, path: Path, pattern: str) -> tuple | None:
    """What the wildcards of `pattern` stand for in a path below root; None where it does not match."""
    # A pattern that ends in * takes any suffix, which is no part of a pair's name.
    words = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
    regex = "".join(words.get(w) or re.escape(w) for w in WILD.split(pattern)) + (r"\.[^./]+" * pattern.endswith("*"))
    found = re.fullmatch(regex, path.relative_to(root).as_posix())
    return found and found.groups()


def _find(root: Path, pattern: str, suffixes: tuple, but: str | None = None) -> dict:
    """{what the wildcards stand for: path} of the files below root that match, and do not match `but`, sorted by path."""
    found = {}
    for path in sorted(p for p in {*root.glob(pattern)} if p.suffix.lower() in suffixes):
        key = _match(root, path, pattern)
        if key is None or (but and _match(root, path, but)):
            continue
        if key in found:
            raise UserError(f"{path}: a second file for the same name as {found[key]}; remove one of them")
        found[key] = path
    return found


def _fill(pattern: str, key: tuple) -> str:
    """The path that `pattern` has with `key` in place of its wildcards."""
    words = iter(key)
    return WILD.sub(lambda _: next(words), pattern) + (".*" if pattern.endswith("*") else "")


def _name(pattern: str, key: tuple) -> str:
    """A sample's name: its path below the last folder without wildcards, without suffix."""
    return str(Path(_fill(pattern, key).removeprefix(re.match(r"(?:[^*?]*/)?", pattern).group())).with_suffix(""))


def links_out(paths, root) -> dict[str, str]:
    """{path: where it really lies} of the paths below `root` that links lead out of it. `root` may be a link itself."""
    inside, folders, out = os.path.join(os.path.realpath(root), ""), {}, {}
    for path in map(str, paths):
        folder, name = os.path.split(path)
        if folder not in folders:  # resolved once: on a network disk every part of a path costs a look
            folders[folder] = os.path.realpath(folder)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
        if not real.startswith(inside):
            out[path] = real
    return out


def find_samples(cfg, role: str, split: str, labels: bool) -> tuple[list[Sample], list[tuple[str, str]]]:
    """(samples in a fixed order, problems) of `role` ("source" or "target") and `split` ("train" or "val").

    labels: whether label files are looked for. A problem is (sample name, what is wrong): an image without label, a
    label without image, or a link out of root (that sample is not in the list: it must not be opened). Raises UserError
    for an unknown data set, a missing folder or split, an empty split, and a name in `exclude` that does not exist.
    """
    part, table = getattr(cfg, role), get_table(cfg, role)
    excluded = set(part.exclude or ())
    if part.dataset == "streets":
        count = STREETS_VAL if split == "val" else part.images or 500
        samples = [Sample(f"{i:06d}", f"streets:{role}/{split}/{i}", f"streets:{role}/{split}/{i}" if labels else None)
                   for i in range(count)]
        if excluded - {f"{i:06d}" for i in range(max(part.images or 500, STREETS_VAL))}:
            raise UserError(f"{role}.exclude: no scene {min(excluded)!r}; they are called '000000' and so on")
        return [s for s in samples if s.name not in excluded], []
    if part.root is None or not Path(part.root).is_dir():
        raise UserError(f"{role}.root={part.root}: no such folder; set it to where {part.dataset} lies (README: Data)")
    root = Path(part.root)
    pattern, label_pattern = part_of(table, split)
    if pattern is None:
        raise UserError(f"{role}.dataset={part.dataset}: has no {split} split")
    if labels and label_pattern is None:
        raise UserError(f"{role}.files: {split} has no pattern of labels, and labels are needed here")

    images = _find(root, pattern, SUFFIXES, label_pattern)  # x.png and its label x_ids.png may lie side by side
    keys = list(images)
    if split not in table.files and keys:
        groups = table.group([path.relative_to(root).as_posix() for path in images.values()])
        first = min(3, groups[-1]) or 3  # a single group cannot be divided: all of it is for training
        keys = [k for k, g in zip(keys, groups, strict=True) if (g % table.val_every == first) == (split == "val")]
    found = _find(root, label_pattern, (".png",)) if labels else {}
    unknown = excluded - {_name(pattern, k) for k in (*images, *found)}
    if unknown:  # in another split, or a label without image where labels are not looked for
        names = [_name(p[0], k) for p in table.files.values() for q in p if q for k in _find(root, q, SUFFIXES)]
        unknown -= set(names)
    if unknown:
        near = difflib.get_close_matches(min(unknown), names, 1)
        raise UserError(f"{role}.exclude: no sample {min(unknown)!r} in {root}{f'; did you mean {near[0]!r}' if near else ''}")
    keys = [k for k in keys if _name(pattern, k) not in excluded]
    if not keys:
        raise UserError(f"{role}.root={part.root}: no {split} images of {part.dataset} ({pattern}) in it (README: Data)")
    if split == "train":
        keys = keys[: part.images]

    samples = [Sample(_name(pattern, k), str(images[k]), str(found[k]) if k in found else None) for k in keys]
    problems = []
    if labels:
        problems = [(s.name, f"{root / _fill(label_pattern, k)}: no such label, for the image {s.image}; add it")
                    for s, k in zip(samples, keys, strict=True) if s.label is None]
        problems += [(_name(pattern, k), f"{path}: a label without its image {root / _fill(pattern, k)}; add or remove")
                     for k, path in found.items() if k not in images and _name(pattern, k) not in excluded]
    if not part.follow_links:
        out = links_out([path for s in samples for path in (s.image, s.label) if path], root)
        problems += [(s.name, f"{path}: leads to {out[path]}, outside {role}.root; put the file itself there, or set "
                      f"{role}.follow_links=true") for s in samples for path in (s.image, s.label) if path in out]
        samples = [s for s in samples if s.image not in out and s.label not in out]
    return samples, problems


def refuse(role: str | None, problems: list[tuple[str, str]]) -> None:
    """Raises UserError with the first of the problems, if there is one, how many there are, and how to leave a pair out."""
    if problems:
        name, text = problems[0]
        more = f" ({len(problems) - 1} more; python datasets.py CFG names them)" if len(problems) > 1 and role else ""
        raise UserError(text + (f"; or list {json.dumps(name)} in {role}.exclude" if role else "") + more)


def list_samples(cfg, role: str, split: str, labels: bool) -> list[Sample]:
    """`find_samples` where every problem is an error: nothing is left out in silence."""
    samples, problems = find_samples(cfg, role, split, labels)
    refuse(role, problems)
    return samples


# ---------------------------------------------------------------------------------------------------------- reading


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error in _open, and no second line beside it


@lru_cache(maxsize=8)
def _scene(address: str):
    domain, split, index = address.removeprefix("streets:").split("/")
    return streets_scene(domain, split, int(index))


def _png_depth(path: str) -> tuple[int, int]:
    """(bits per channel, colour type) from a PNG's own header; (8, 2), which is 8-bit colour, for any other file."""
    with open(path, "rb") as file:
        head = file.read(26)
    return (head[24], head[25]) if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) == 26 else (8, 2)


def _open(path: str, load: bool = True, bits: int = 8) -> Image.Image:
    """A PNG or JPEG file as Pillow gives it. load: decode it, not only its header; bits: per channel, 8 or 16.

    Pillow cuts 16-bit colour down to 8 bits without a word, so the depth is taken from the file's own header. Pillow's
    other formats are not tried, whatever the file's name: some of them run programs.
    """
    try:
        if not os.path.getsize(path):
            raise UserError(f"{path}: the file is empty (0 bytes); replace it")
        depth = _png_depth(path)[0]
        image = Image.open(path, formats=("PNG", "JPEG"))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns here, and refuses from twice as many
            raise UserError(f"{path}: {image.width}x{image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are "
                            "read; scale it down")
        if load:
            image.load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image (its content is neither PNG nor JPEG); replace the file") from None
    except Exception as error:  # a decoder raises whatever the bytes make it trip over
        raise UserError(f"{path}: not a readable image ({' '.join(str(error).split())}); replace the file") from None
    if (16 if depth == 16 else 8) != bits:
        raise UserError(f"{path}: {24 - bits} bits per channel where {bits} are expected; "
                        + ("save it with 8" if bits == 8 else "take the published file, a copy may have lost the ids"))
    return image


# EXIF's orientation -> what sets the image upright. (ImageOps.exif_transpose also writes the EXIF anew, and some break it.)
TURNS = dict(enumerate((Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE, Image.ROTATE_270,
                        Image.TRANSVERSE, Image.ROTATE_90), 2))  # fmt: skip


def _orientation(image: Image.Image, path: str) -> int:
    """EXIF's orientation, 1 (upright) to 8."""
    if "exif" not in image.info:  # asking a PNG without EXIF for it would decode the file
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a parser of foreign bytes
        raise UserError(f"{path}: its EXIF block cannot be read, so it may have to be turned; save it without") from None


def read_image(path: str) -> Image.Image:
    """An image file, or a `streets:DOMAIN/SPLIT/INDEX` address, as RGB. Raises UserError that names the file.

    Greyscale becomes three equal channels, CMYK is converted, an alpha channel is dropped, and EXIF's orientation is
    applied, so that the network sees what an image viewer shows.
    """
    if path.startswith("streets:"):
        return Image.fromarray(_scene(path)[0])
    image = _open(path)
    turn = TURNS.get(_orientation(image, path))
    return (image if turn is None else image.transpose(turn)).convert("RGB")


def header_size(path: str, bits: int = 8) -> tuple[int, int]:
    """(width, height) as `read_image` would give it, from the file's header. Raises UserError as `read_image` does."""
    with _open(path, False, bits) as image:
        return image.size[::-1] if _orientation(image, path) in (5, 6, 7, 8) else image.size


def _id_text(value: int, read: str) -> str:
    return f"colour [{value >> 16}, {value >> 8 & 255}, {value & 255}]" if read == "rgb" else f"id {value}"


def read_label(path: str, read: str, table: np.ndarray) -> np.ndarray:
    """A label file (or address) as (H, W) uint8 train ids, pixels as they are stored (EXIF is not looked at).

    read: as in Table; table: from `train_id_table`. Raises UserError for a file that cannot hold ids read that way, and
    for ids that the table does not know, with the number of pixels of each.
    """
    if path.startswith("streets:"):
        raw = _scene(path)[1]
    else:
        image = _open(path, bits=16 if read == "red16" else 8)
        mode = image.mode
        if read == "red16":
            import cv2  # half a second that only SYNTHIA's labels need; torchvision's own reader is to be removed

            try:
                pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            except cv2.error:
                pixels = None
            raw = pixels[..., 2] if pixels is not None and pixels.ndim == 3 else None  # blue, green, red
        elif read == "rgb":
            channels = np.asarray(image.convert("RGB"), np.int32) if mode in ("RGB", "RGBA", "P", "L") else None
            raw = None if channels is None else channels @ np.array([1 << 16, 1 << 8, 1], np.int32)
        else:
            raw = np.asarray(image)
            raw = raw[..., 0] if read == "red" and raw.ndim == 3 else raw
            # Pillow stretches greyscale of 2 and 4 bits to 0 ... 255: what it gives are no longer the ids.
            raw = raw if raw.ndim == 2 and raw.dtype == np.uint8 and _png_depth(path) not in ((2, 0), (4, 0)) else None
        if raw is None or image.format != "PNG":
            raise UserError(f"{path}: {image.format} of mode {mode} and {_png_depth(path)[0]} bits cannot be a label read by "
                            f"'{read}'; save it as such a PNG")
    if raw.dtype == np.uint8:  # a table of bytes over bytes: a third of the time of indexing; 254 stands for an unknown id
        lut = np.where(table[:256] < 0, 254, table[:256]).astype(np.uint8).tobytes()
        train_ids = np.frombuffer(bytearray(raw).translate(lut), np.uint8).reshape(raw.shape)
        if not (train_ids == 254).any():
            return train_ids
    ids = table[raw]
    if (ids < 0).any():
        unknown, pixels = np.unique(raw[ids < 0], return_counts=True)
        words = [f"{_id_text(int(v), read)} ({n} pixels)" for v, n in zip(unknown[:8], pixels[:8], strict=True)]
        raise UserError(f"{path}: unknown label {', '.join(words)}"
                        + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
                        + "; add it to the data set's table in datasets.py, or to 'ids' of a folder")
    return ids.astype(np.uint8)


def examine(sample: Sample, read: str, table: np.ndarray | None, decode: bool) -> tuple[list[str], np.ndarray | None]:
    """([what is wrong with the pair], (256,) pixels per train id or None). decode: read the pixels, not only headers."""
    if sample.image.startswith("streets:") and not decode:
        return [], None
    problems, sizes, pixels = [], [], None
    try:
        sizes.append(read_image(sample.image).size if decode else header_size(sample.image))
    except UserError as error:
        problems.append(str(error))
    try:
        if sample.label and decode:
            label = read_label(sample.label, read, table)
            sizes.append(label.shape[::-1])
            pixels = np.bincount(label.ravel(), minlength=256)
        elif sample.label:
            with _open(sample.label, False, 16 if read == "red16" else 8) as image:
                sizes.append(image.size)
    except UserError as error:
        problems.append(str(error))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        problems.append(f"{sample.image}: {sizes[0][0]}x{sizes[0][1]} pixels, but its label {sample.label} has "
                        f"{sizes[1][0]}x{sizes[1][1]}; replace one of them")
    return problems, pixels


CACHE_BYTES = 2 << 30  # resized images that one data set keeps, over all of its processes, to decode each file once
_ROOM = threading.Lock()  # around what is left of it; not in Scenes, which are copied into reading processes


class DiskCache:
    """Resized images and labels as files, FOLDER/KIND-HEIGHTxWIDTH-SETTINGS/CONTENT, which later runs read again.

    SETTINGS is a digest of what the pixels depend on beside the file: label table, the code that reads, and the libraries.
    CONTENT is a SHA-256 of the file's bytes, taken once per file and process. Path, size and time would be quicker, but a
    file can be replaced within the clock's tick by one as long, or copied with its time; and hashing costs a small part of
    decoding (tests/bench_stages.py). So nothing here can be of another image or of other settings.

    A file is renamed into place: processes may share the folder, and a kill leaves a temporary file at most. It is not
    flushed to the disk, which may take longer than decoding does; a checksum at its end tells what a power cut tore, and
    that is made again. Nothing is removed: every data set, size and label table takes height * width * 3 bytes an image
    and a third of that a label, and old ones can be deleted at any time.
    """

    unwritable = set()  # folders that this process has given up, with one warning

    def __init__(self, folder: str):
        self.folder, self.folders, self.contents = Path(folder), {}, {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache={folder}: cannot be made ({error.strerror}); set 'cache' to a folder you may write, or to "
                            "null") from None

    def add(self, kind: str, shape: tuple, *settings) -> None:
        """Says what all values of a kind depend on. shape: theirs, of which the last two are height and width."""
        versions = PIL.__version__, PIL.features.version("jpg"), np.__version__
        digest = hashlib.sha256(repr((settings, versions)).encode()).hexdigest()[:16]
        self.folders[kind] = shape, self.folder / f"{kind}-{shape[-2]}x{shape[-1]}-{digest}"
        for left in self.folders[kind][1].glob(".*.tmp"):  # of a process that was killed, if no other writes it now
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()

    @staticmethod
    def content(path: str) -> str:
        """What tells the source of one image from all others. Raises OSError for a file that cannot be read."""
        if path.startswith("streets:"):
            return hashlib.sha256((path + _code("streets")).encode()).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def get(self, kind: str, path: str, make) -> Tensor:
        """The value of `kind` for an image or label file (or address); make() gives it where it is not here yet."""
        try:
            content = self.contents.get(path) or self.content(path)
        except OSError:
            return make()  # which says what is wrong with it
        shape, folder = self.folders[kind]
        value = self._read(folder / content, shape)
        if value is None:
            value = make()
            try:
                if self.content(path) != content:  # replaced while it was read
                    return value
            except OSError:
                return value
            self._write(folder / content, value)
        self.contents[path] = content
        return value

    @staticmethod
    def _read(file: Path, shape: tuple) -> Tensor | None:
        """None where there is no such file, or not a whole one."""
        size = math.prod(shape)
        try:
            data = np.fromfile(file, np.uint8, size + 5)
        except OSError:
            return None
        if data.size != size + 4 or zlib.crc32(data[:size]) != int.from_bytes(data[size:].tobytes(), "little"):
            return None
        return torch.from_numpy(data[:size].reshape(shape))

    def _write(self, file: Path, value: Tensor) -> None:
        if self.folder in self.unwritable:
            return
        temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")  # threads, and machines with equal process numbers
        try:
            file.parent.mkdir(exist_ok=True)
            try:
                data = value.numpy().tobytes()
                temporary.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
                os.replace(temporary, file)
            finally:
                with suppress(OSError):
                    temporary.unlink()
        except OSError as error:  # a full disk: the run has its images all the same, and hours of work not to lose
            self.unwritable.add(self.folder)
            print(f"warning: cache={self.folder}: cannot be written ({error.strerror}); what is not in it yet is decoded "
                  "again by every run", file=sys.stderr)


@lru_cache
def _code(module: str, first: str = "", last: str = "") -> str:
    """SHA-256 of a module's text, from the heading `first` to the heading `last`."""
    text = inspect.getsource(sys.modules[module])
    text = text.split(f"- {first}\n")[1].split(f"- {last}\n")[0] if first else text
    return hashlib.sha256(text.encode()).hexdigest()


class Scenes:
    """The images of one domain and split, resized, with labels as train ids where asked for.

    role: "source" or "target"; split: "train" or "val"; labels: without it no label file is looked for or opened;
    cache: keep resized images in memory for a second reading (the folder that `cfg.cache` names is used either way).
    At the start every file's header is read, and a few files whole, so that what is wrong stops before training.
    """

    _disk = None  # generated images have none: they lie there at this size, and would take styles_per_image times as much

    def __init__(self, cfg, role: str, split: str, labels: bool, cache: bool = True):
        part, table = getattr(cfg, role), get_table(cfg, role)
        self.role, self.size, self.dataset, self.read = role, tuple(part.size), part.dataset, table.read
        self.class_list, self.classes = class_list(cfg)
        self.samples = list_samples(cfg, role, split, labels)
        self.table = train_id_table(table, self.class_list) if table.read else None  # a camera without any label
        self._cache, self._room = {}, CACHE_BYTES if cache else 0
        if cfg.cache is not None:
            self._disk, code = DiskCache(cfg.cache), _code(__name__, "reading", "batches")
            self._disk.add("image", (3, *self.size), code)
            if labels:
                self._disk.add("label", self.size, code, self.read, hashlib.sha256(self.table.tobytes()).hexdigest())
        self._check(16)

    def _check(self, count: int) -> None:
        few = [self.samples[i] for i in np.unique(np.linspace(0, len(self) - 1, count).astype(int))]
        for samples, decode in ((self.samples, False), (few, True)):
            with ThreadPoolExecutor(8) as pool:  # headers on a network disk are a matter of waiting
                found = list(pool.map(lambda s, decode=decode: examine(s, self.read, self.table, decode)[0], samples))
            refuse(self.role, [(s.name, text) for s, texts in zip(samples, found, strict=True) for text in texts])

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """Number of samples, and a SHA-256 of their names and file sizes: what a resumed run must find again."""
        sizes = [[None if p is None or p.startswith("streets:") else os.path.getsize(p) for p in (s.image, s.label)]
                 for s in self.samples]
        listed = json.dumps([[s.name, *size] for s, size in zip(self.samples, sizes, strict=True)])
        return f"{len(self)} samples {hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    @cached_property
    def pixels(self) -> np.ndarray:
        """(images, classes) number of labelled pixels, at the size of training. Reads every label."""
        return np.array([np.bincount(self.label(i).flatten().numpy(), minlength=IGNORE + 1)[: len(self.classes)]
                         for i in tqdm(range(len(self)), "labels", mininterval=1, leave=False, disable=rank() > 0)])

    @property
    def shares(self) -> np.ndarray:
        """(images, classes) each class's part of the image's labelled pixels."""
        return self.pixels / self.pixels.sum(1, keepdims=True).clip(min=1)

    def _cached(self, kind: str, i: int, path: str | None, make) -> Tensor:
        """The value of `kind` for sample i, from memory, from the disk cache or from make(), which reads `path`."""
        value = self._cache.get((kind, i))
        if value is None:
            value = self._disk.get(kind, path, make) if self._disk and path else make()
            worker = torch.utils.data.get_worker_info()  # each of the processes has a part of the room
            with _ROOM:
                room = self._room - (CACHE_BYTES * (1 - 1 / worker.num_workers) if worker else 0)
                if value.nbytes <= room and (kind, i) not in self._cache:
                    self._room -= value.nbytes
                    self._cache[kind, i] = value
        return value

    def image(self, i: int) -> Tensor:
        """(3, h, w) uint8, resized with an antialiasing bilinear filter."""
        def make():
            image = read_image(path)
            if image.size != self.size[::-1]:
                image = image.resize(self.size[::-1], Image.BILINEAR)
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
        path = self.samples[i].image
        return self._cached("image", i, path, make)

    def native_label(self, i: int) -> np.ndarray:
        """(H, W) uint8 train ids at the label's own resolution."""
        return read_label(self.samples[i].label, self.read, self.table)

    def label(self, i: int) -> Tensor:
        """(h, w) uint8 train ids, resized by nearest neighbour; all IGNORE where labels were not asked for."""
        def make():
            if self.samples[i].label is None:
                return torch.full(self.size, IGNORE, dtype=torch.uint8)
            label = Image.fromarray(self.native_label(i))
            return torch.from_numpy(np.asarray(label.resize(self.size[::-1], Image.NEAREST)).copy())
        return self._cached("label", i, self.samples[i].label, make)


class Augmented(Scenes):
    """The generated images of a manifest: image s * n + i is source image i in its s-th style. They have no labels of
    their own; the source's label i is theirs. generator: digest of what made them; folder: the manifest's."""

    def __init__(self, source: Scenes, files: list[Path], generator: str, folder: Path | None = None):
        self.generator, self.folder = generator, folder
        self.role, self.size, self.read, self.table, self._cache, self._room = None, source.size, None, None, {}, CACHE_BYTES
        self.samples = [Sample(p.stem, str(p), None) for p in files]
        self.digest = f"{len(files)} samples of generator {generator}"
        self._check(16)


# ---------------------------------------------------------------------------------------------------------- batches


def photometric_jitter(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Changes colour, light, sharpness and texture of an image, never its geometry.

    x: (3, H, W) float in [0, 1] -> the same. strength: 0 nothing, 1 strong. Brightness, contrast, gamma and a colour
    cast by factors of up to exp(+-0.7), any hue, saturation 0 to 2, blur of up to 1.2 pixels, white noise, and random
    fields from fine grain to broad shade, because a generator hides in whatever f_seg has never been shown.
    """
    def factor(spread):
        return float(np.exp(rng.uniform(-spread, spread) * strength))

    x = TF.adjust_hue(x, float(rng.uniform(-0.5, 0.5) * min(strength, 1)))
    x = TF.adjust_saturation(x, float(1 + rng.uniform(-1, 1) * min(strength, 1)))
    x = x * torch.tensor([factor(0.35) for _ in range(3)]).view(3, 1, 1)
    x = TF.adjust_gamma(x.clamp(0, 1), factor(0.7))
    x = TF.adjust_contrast(x, factor(0.7))
    x = TF.adjust_brightness(x, factor(0.5))
    if rng.random() < 0.5 * min(strength, 1):
        x = TF.gaussian_blur(x, 5, float(rng.uniform(0.1, 1.2)))
    for cells in (2, 8, 3 * x.shape[-2] // 8, x.shape[-2]):  # broad shade, blotches, texture, grain
        amplitude = rng.uniform(0, 0.12) * strength
        field = torch.from_numpy(rng.standard_normal((1, rng.choice([1, 3]), cells, 2 * cells), np.float32))
        x = x + amplitude * F.interpolate(field, x.shape[-2:], mode="bilinear", align_corners=False)[0]
    return x.clamp(0, 1)


@lru_cache(maxsize=16)
def _order(*key, n: int) -> np.ndarray:
    return random_generator(*key).permutation(n)


def images_by_class(source: Scenes, rare: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rare-class sampling (Hoyer, Dai, Van Gool 2022, DAFormer): a class is drawn, then one of the images that have it.

    rare: temperature T of P(c) ~ exp((1 - f_c) / T), f_c the class's share of the labelled pixels -> (P (C,), for each class
    the indices of the images in which it has 1 pixel in 1,000 or more). A class that no image has so much of has P = 0.
    """
    images = [np.flatnonzero(some >= source.size[0] * source.size[1] / 1000) for some in source.pixels.T]
    there = np.array([len(some) > 0 for some in images])
    if not there.any():
        raise UserError("rare: no source image has a class in 1 pixel of 1,000; set it to 0")
    share = source.pixels.sum(0) / source.pixels.sum()
    p = there * np.exp(np.minimum(0, share[there].min() - share) / rare)  # divided by the greatest, which might overflow
    return p / p.sum(), images


def images_like(source: Scenes, shares: np.ndarray, least: float) -> np.ndarray:
    """Probabilities of source images under which their content is like another domain's: entropy balancing (Hainmueller 2012).

    shares: (C,) of the classes in the other domain, sum 1. The p_i ~ exp(lambda . z_i), z_i an image's shares less these, in
    standard deviations, with the lambda that minimises log sum_i exp(lambda . z_i) + rho / 2 |lambda|^2: at rho = 0 the p
    nearest to uniform under which the mean share of each class is the other domain's, if there is one. rho is the least for
    which the effective number of images, 1 / sum p^2, is `least` of all or more. -> (N,), sum 1.
    """
    spread = source.shares.std(0)
    z = ((source.shares - shares) / np.where(spread > 0, spread, 1))[:, spread > 0]  # what no image has cannot be weighed

    def solve(rho, weight):  # Newton's method, damped: the function is convex
        def value(weight):
            e = z @ weight
            return e.max() + np.log(np.exp(e - e.max()).sum()) + rho / 2 * (weight @ weight)

        for _ in range(200):
            p = np.exp(z @ weight - (z @ weight).max())
            p = (p / p.sum()).clip(min=1e-15)
            mean = p @ z
            gradient = mean + rho * weight
            if np.abs(gradient).max(initial=0) < 1e-9:
                break
            curvature = (z * p[:, None]).T @ z - np.outer(mean, mean) + rho * np.eye(len(mean))
            step, size = np.linalg.solve(curvature, gradient), 1.0
            while size > 1e-6 and value(weight - size * step) > value(weight) - 1e-4 * size * (gradient @ step):
                size /= 2
            weight = weight - size * step
        return p / p.sum(), weight

    p, weight = solve(1e-4, np.zeros(z.shape[1]))
    if 1 / (p**2).sum() >= least * len(z):
        return p
    nearest, low, high = np.full(len(z), 1 / len(z)), -4.0, 4.0  # rho's powers of ten
    for _ in range(30):
        p, weight = solve(10 ** ((low + high) / 2), weight)
        if 1 / (p**2).sum() >= least * len(z):
            nearest, high = p, (low + high) / 2
        else:
            low = (low + high) / 2
    return nearest


class Batches(torch.utils.data.Dataset):
    """Item `step` (0, 1, ...) is the whole batch of that step, a function of (seed, stage, step) alone.

    So neither the number of loader workers nor a resumed run changes what is drawn. Every domain goes through its
    images in a new random order each epoch; with `STAGE.rare`, source images are drawn by class (see images_by_class), with
    `weights`, (N,), by these probabilities. Of several processes, each gets its own N images of the step's batch. The batch is
    a dictionary of uint8 tensors:
        x_s (N, 3, h, w), y_s (N, h, w)   source images and labels
        x_g (N, 3, h, w)                  an augmented version of the same source images, flipped and cropped with them
        x_t (N, 3, h, w)                  target images
        content, style                    with `guides`: x_s before the jitter, and for each a guide, a whole image

    jitter: strength of `photometric_jitter` on x_s and x_g.
    """

    def __init__(self, cfg, stage: str, batch: int, crop, source: Scenes = None, augmented: Scenes = None,
                 target: Scenes = None, jitter: float = 0.0, weights: np.ndarray | None = None, guides: Scenes = None):
        self.seed, self.stage, self.batch, self.crop, self.flip = cfg.seed, stage, batch, crop, cfg.flip
        accumulate = getattr(cfg, stage).accumulate if hasattr(cfg, stage) else 1
        if batch % (world() * accumulate):
            raise UserError(f"{stage}.batch={batch}: {f'{world()} processes' if world() > 1 else 'one process'} with {stage}."
                            f"accumulate={accumulate} cannot share it evenly; make it a multiple of {world() * accumulate}")
        self.part = range(rank() * batch // world(), (rank() + 1) * batch // world())
        self.source, self.augmented, self.target, self.jitter = source, augmented, target, jitter
        self.weights, self.guides = weights, guides
        rare = getattr(getattr(cfg, stage, None), "rare", 0)
        self.by_class = images_by_class(source, rare) if rare and source is not None else None
        for scenes in (source, target):
            if crop and scenes is not None and (crop[0] > scenes.size[0] or crop[1] > scenes.size[1]):
                raise UserError(f"{stage}.crop={list(crop)}: larger than {scenes.role}.size={list(scenes.size)}; lower it, "
                                "or set it to null for whole images")

    def _index(self, domain: str, position: int, n: int) -> int:
        if domain == "source" and (self.by_class or self.weights is not None):
            rng, some = random_generator(self.seed, self.stage, "rare", position), np.arange(n)
            if self.by_class:
                p, images = self.by_class
                some = images[rng.choice(len(p), p=p)]
            p = None if self.weights is None else self.weights[some] / self.weights[some].sum()
            return int(rng.choice(some, p=p))
        return int(_order(self.seed, self.stage, domain, position // n, n=n)[position % n])

    def _geometry(self, rng, *tensors: Tensor) -> list[Tensor]:
        """One flip and one crop for all of the tensors."""
        if self.flip and rng.random() < 0.5:
            tensors = [t.flip(-1) for t in tensors]
        if self.crop:
            h, w = self.crop
            top = rng.integers(tensors[0].shape[-2] - h + 1)
            left = rng.integers(tensors[0].shape[-1] - w + 1)
            tensors = [t[..., top : top + h, left : left + w] for t in tensors]
        return list(tensors)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = {}
        for position in (step * self.batch + k for k in self.part):
            if self.source is not None:
                rng = random_generator(self.seed, self.stage, "source", position)
                i = self._index("source", position, len(self.source))
                names, tensors = ["x_s", "y_s"], [self.source.image(i), self.source.label(i)]
                if self.augmented is not None:
                    style = int(rng.integers(len(self.augmented) // len(self.source)))
                    names.append("x_g")
                    tensors.append(self.augmented.image(style * len(self.source) + i))
                tensors = self._geometry(rng, *tensors)
                if self.guides is not None:
                    guide = random_generator(self.seed, self.stage, "guide", position).integers(len(self.guides))
                    names += ["content", "style"]
                    tensors += [tensors[0], self.guides.image(int(guide))]
                for k in (0, 2)[: names.count("x_g") + 1] if self.jitter else ():  # x_s and, each by its own draw, x_g
                    tensors[k] = (photometric_jitter(tensors[k] / 255, self.jitter, rng) * 255).round().byte()
                for name, tensor in zip(names, tensors, strict=True):
                    batch.setdefault(name, []).append(tensor)
            if self.target is not None:
                rng = random_generator(self.seed, self.stage, "target", position)
                x_t = self.target.image(self._index("target", position, len(self.target)))
                batch.setdefault("x_t", []).append(self._geometry(rng, x_t)[0])
        return {name: torch.stack(tensors) for name, tensors in batch.items()}

    def loader(self, start: int, steps: int, workers: int):
        """Batches of steps start ... steps - 1, in order, read ahead: 2 by a thread, or 2 by each of the worker processes.

        Raises UserError for a file that cannot be read, when its batch is due.
        """
        if workers == 0:
            pin, threads = torch.cuda.is_available(), torch.get_num_threads()
            device = torch.cuda.current_device() if pin else None

            def begin():
                _one_thread()
                if pin:  # pinning is a matter of the thread's own device, which is 0 at first
                    torch.cuda.set_device(device)

            def read(step):
                return {name: x.pin_memory() if pin else x for name, x in self[step].items()}

            # One thread for the jitter's sums, as in a worker process, or their last bits would depend on `workers`. torch
            # keeps the number for each thread, and the one set last for threads that have not asked: so it is set back.
            for batch in prefetch(range(start, steps), read, 2, start=begin):
                torch.set_num_threads(threads)
                yield batch
            return
        loader = torch.utils.data.DataLoader(self, batch_size=None, sampler=range(start, steps), num_workers=workers,
                                             prefetch_factor=2, pin_memory=torch.cuda.is_available())
        try:
            yield from loader
            return
        except UserError as error:  # one that comes from a worker has the worker's traceback around its line
            line, error.__traceback__ = str(error).rstrip().rpartition("UserError: ")[2], None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            line = (f"{self.stage}: a process that reads images died, out of memory perhaps "
                    f"({str(error).splitlines()[0]}); lower 'workers'")
            error.__traceback__ = None
        # Here, and without that traceback: it holds the loader in a cycle, and the collector would take 5 s to end each
        # process, because it takes their queues first.
        raise UserError(line)


def _one_thread() -> None:
    """For the calling thread alone, once another has set its own number again."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # or the first sum would take the other thread's number


def to_float(x: Tensor, device) -> Tensor:
    """(N, 3, h, w) uint8 -> float32 in [-1, 1] on the device, channels last."""
    return x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def colourise(ids, classes: dict) -> np.ndarray:
    """(H, W) train ids -> (H, W, 3) uint8 in the class colours; IGNORE is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = list(classes.values())
    return palette[np.asarray(ids, np.uint8)]


# ------------------------------------------------------------------------------------------------------------ check

SAMPLE = 64  # files per split that the check decodes where --full does not ask for all


def _start_worker(*job) -> None:
    global _job
    _job = job
    torch.set_num_threads(1)


def _decode_in_worker(sample: Sample):
    return examine(sample, *_job, True)


def check_split(cfg, role: str, split: str, labels: bool, full: bool):
    """Checks one split and prints a line on it.

    Returns (problems as in `find_samples`, (256,) int64 pixels per train id, the decoded samples without a problem).
    """
    samples, problems = find_samples(cfg, role, split, labels)
    part, table, title = getattr(cfg, role), get_table(cfg, role), f"{role} {split}"
    job = table.read, train_id_table(table, class_list(cfg)[0]) if labels else None
    spread = np.unique(np.linspace(0, len(samples) - 1, SAMPLE).astype(int))
    few = samples if full or not samples else [samples[i] for i in spread]
    if full:
        with ProcessPoolExecutor(os.cpu_count(), initializer=_start_worker, initargs=job) as pool:
            decoded = list(tqdm(pool.map(_decode_in_worker, few, chunksize=8), title, len(few), mininterval=1, leave=False))
    else:  # decoding a file reads its header as well
        for sample in tqdm(samples, f"{title}, headers", mininterval=1, leave=False):
            problems += [(sample.name, text) for text in examine(sample, *job, False)[0]]
        decoded = [examine(s, *job, True) for s in tqdm(few, title, mininterval=1, leave=False)]
    problems += [(sample.name, text) for sample, (texts, _) in zip(few, decoded, strict=True) for text in texts]
    problems = list(dict.fromkeys(problems))
    print(f"{title:<13}{part.dataset:<11}{len(samples):>6} images, "
          + (f"{sum(s.label is not None for s in samples)} with label" if labels else "labels not looked at")
          + (f", the first {part.images} ({role}.images)" if split == "train" and len(samples) == part.images else "")
          + f", {'all' if full else len(few)} decoded, {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    bad = {name for name, _ in problems}
    pixels = sum((counts for _, counts in decoded if counts is not None), np.zeros(256, np.int64))
    return problems, pixels, [s for s in few if s.name not in bad]


def _overlay(cfg, role: str, sample: Sample, list_name: str, classes: dict, height: int = 180) -> list[np.ndarray]:
    """[image, image with its label over it, ignored pixels dark], both (height, w, 3) uint8."""
    image = read_image(sample.image)
    image = np.asarray(image.resize((max(1, image.width * height // image.height), height)))
    if sample.label is None:
        return [image, np.full_like(image, 255)]
    table = get_table(cfg, role)
    label = Image.fromarray(read_label(sample.label, table.read, train_id_table(table, list_name)))
    colours = colourise(label.resize(image.shape[1::-1], Image.NEAREST), classes)
    return [image, (0.4 * image + 0.6 * colours).astype(np.uint8)]


def main() -> None:
    def arguments(parser):
        parser.add_argument("--full", action="store_true", help="decode every file, on all cores")

    cfg, args = command_line(__doc__, ("", "source", "target"), arguments)
    folder = make_folder(Path(cfg.output, cfg.name, "check"))
    list_name, classes = class_list(cfg)
    print(f"classes: {len(classes)} of {list_name}, for {cfg.source.dataset} and {cfg.target.dataset}")
    if not args.full:
        print(f"a sample: every file's header is read, {SAMPLE} files of each split are decoded; --full decodes all")
    problems, pixels, good = [], {}, {}
    for role in ("source", "target"):
        pixels[role], good[role] = np.zeros(256, np.int64), []
        for split in ("train", "val"):
            labels = cfg.selfens.variant == "target_only" if split == "train" else has_labels(cfg, role, split)
            labels = labels or role == "source"
            try:
                found, counts, samples = check_split(cfg, role, split, labels, args.full)
            except UserError as error:
                print(f"{role} {split:<6} cannot be read")
                found, counts, samples = [(None, str(error))], 0, []
            problems += [(role, name, text) for name, text in found]
            pixels[role] += counts
            good[role] += samples

    problems = list(dict.fromkeys(problems))  # a label without image belongs to no split, and shows in both
    for role in ("source", "target"):
        if excluded := getattr(cfg, role).exclude:
            print(f"left out by {role}.exclude: {', '.join(excluded)}")

    shares = {role: 100 * counts[: len(classes)] / max(1, counts[: len(classes)].sum()) for role, counts in pixels.items()}
    print(f"\n{'share of labelled pixels, %':<30}{'source':>8}{'target':>8}")
    for k, name in enumerate(classes):
        print(f"{name:<30}" + "".join(f"{s[k]:>8.2f}" if pixels[role].any() else f"{'-':>8}" for role, s in shares.items()))
    print(f"{'ignored, of all pixels':<30}" + "".join(
        f"{100 * counts[IGNORE] / counts.sum():>8.2f}" if counts.any() else f"{'-':>8}" for counts in pixels.values()))
    for role, counts in pixels.items():
        absent = [name for k, name in enumerate(classes) if not counts[k]]
        if absent and counts.any():
            ids = get_table(cfg, role).ids[list_name]
            print(f"note: {role} has no pixel of {', '.join(f'{n}' if ids.get(n) else f'{n} (no id)' for n in absent)}"
                  + ("" if args.full else " in the sample"))

    rows, picks = [], {}
    for role, samples in good.items():
        samples = [s for s in samples if s.label] or samples
        if samples:
            picks[role] = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, 5).astype(int))]
    for i in range(max(map(len, picks.values()), default=0)):
        cells = [_overlay(cfg, role, s[i % len(s)], list_name, classes) for role, s in picks.items()]
        rows.append([picture for pair in cells for picture in pair])
    if rows:
        sheet = make_sheet([f"{role}: {word}" for role in picks for word in ("image", "label over it")], rows)
        atomic_write(folder / "sheet.png", lambda file: sheet.save(file, "PNG"))
        print(f"\nwritten: {folder / 'sheet.png'}")

    if problems:
        print("\n" + "\n".join(one_line(f"{role}: {text}") for role, _, text in problems))
        for role in ("source", "target"):
            names = sorted({name for r, name, _ in problems if r == role and name})
            if names:
                print(f"to leave out what cannot be mended: {role}.exclude: {json.dumps(names)}")
        raise UserError(f"data check: {len(problems)} problem{'s' * (len(problems) != 1)}, each named above")
    print("data check: no problem" + ("" if args.full else " in the sample"))


if __name__ == "__main__":
    run_main(main)
