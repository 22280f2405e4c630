"""What lies on disk: blocks of data sets, class lists, pairs of images and labels, and how they are read.

datasets.yaml holds the published data sets and class lists, and says how to add one; `dataset: folder` is
such a block in a config. Source and target are read onto one class list. Train ids are positions in it; what
is known but not in it is IGNORE; an unknown id is an error. `python check.py CFG` shows it.
"""

import difflib
import os
import re
from collections import namedtuple
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

from runtime import HERE, UserError, read_yaml

# isort: split
import numpy as np
from PIL import Image, ImageOps

from losses import IGNORE
from streets import streets_scene

SUFFIXES = (".png", ".jpg", ".jpeg")
STREETS = {"train": 500, "val": 100}  # scenes of each domain
VALUES = {"index": 1 << 8, "red": 1 << 8, "red16": 1 << 16, "rgb": 1 << 24}  # ids that each `read` can give
WILD = re.compile(r"(\*\*/|\*|\?)")
Sample = namedtuple("Sample", "name image label")  # name: path below the pattern's plain folders, no suffix
published = cache(lambda: read_yaml(HERE / "datasets.yaml"))

# ------------------------------------------------------------------------------- data sets and class lists

def get_block(cfg, role: str) -> SimpleNamespace:
    """A role's files, read, group, every, ids {class list: {id: class}}. Raises UserError naming the key."""
    part, names = getattr(cfg, role), ["folder", *(name for name in published() if name != "class_lists")]
    if part.dataset not in names:
        near = "".join(f", did you mean {n}?" for n in difflib.get_close_matches(part.dataset, names, 1))
        raise UserError(f"{role}.dataset={part.dataset}: unknown{near}; known are {', '.join(names)}")
    own = {"files": part.files, "read": part.read, "ids": {}}
    block = {"group": "block", "every": 50} | (own if part.files else published().get(part.dataset, own))
    ids = part.ids or block["ids"]
    for split, patterns in block["files"].items():
        key = f"{role}.files: {split}"
        wild = [WILD.findall(p) for p in patterns if isinstance(p, str) and not p.startswith("/")]
        if split not in ("train", "val", "test") or len(wild) != len(patterns) or len(wild) not in (1, 2):
            raise UserError(f"{key}: must be train, val or test: [images, labels] or [images], below root")
        if not wild[0] or wild[0] != wild[-1]:  # what they stand for makes the pair
            raise UserError(f"{key}: {' and '.join(patterns)} need the same *, ? and **/ in the same order")
        if len(patterns) == 2 and not ids:
            raise UserError(f"{role}.ids: needed, because {role}.files names labels of {split}")
    if not all(isinstance(value, dict) for value in ids.values()):
        ids = {"own" if cfg.class_colours else cfg.classes: ids}
    lists, block["ids"] = class_lists(cfg), {}
    for name, mapping in ids.items():
        if name not in lists:
            raise UserError(f"classes={name}: {role}.ids needs a class list, one of {', '.join(lists)}, or "
                            "class_colours, your own")
        block["ids"][name] = read_ids(mapping, name, lists[name], block["read"], f"{role}.ids")
    return SimpleNamespace(**block)


def read_ids(mapping: dict, name: str, classes: dict, read: str, key: str) -> dict:
    """{class: id, ids, colour or colours} as {id: class}. Raises UserError for one that is none or double."""
    owner = {}
    for c, value in mapping.items():
        if c not in (*classes, "ignore"):
            raise UserError(f"{key}: '{c}' is not a class of '{name}' ({', '.join(classes)})")
        several = isinstance(value, list) and (read != "rgb" or any(isinstance(v, list) for v in value))
        for v in value if several else [value]:
            v = colour_id(v, f"{key}: {c}") if read == "rgb" else v
            if type(v) is not int or not 0 <= v < VALUES[read] or owner.setdefault(v, c) != c:
                raise UserError(f"{key}: {c}: {v!r} is no id read by '{read}' (0 to {VALUES[read] - 1}), or "
                                "belongs to another class")
    return owner


def colour_id(value, key: str) -> int:
    """[R, G, B] as the number 65536 R + 256 G + B. Raises UserError that names the key."""
    if not isinstance(value, list) or len(value) != 3 or any(v not in range(256) for v in value):
        raise UserError(f"{key}: a colour is [R, G, B], each 0 to 255, not {value!r}")
    return value[0] << 16 | value[1] << 8 | value[2]


def class_lists(cfg) -> dict:
    """{name: {class: [R, G, B]}}: those of datasets.yaml and, as "own", `class_colours`."""
    for name, colour in cfg.class_colours.items():
        colour_id(colour, f"class_colours: {name}")
    return published()["class_lists"] | ({"own": cfg.class_colours} if cfg.class_colours else {})


def class_list(cfg) -> tuple[str, dict]:
    """(name, {class: [R, G, B]}) onto which source and target are read. Raises UserError if there is none."""
    offers = [block.ids for block in (get_block(cfg, "source"), get_block(cfg, "target")) if block.ids]
    shared = [name for name in (offers[0] if offers else []) if name in offers[-1]]
    if not shared or cfg.classes not in ("auto", *shared):
        words = ", ".join(shared) or "no class list; class_colours, source.ids and target.ids make one"
        raise UserError(f"classes={cfg.classes}: {cfg.source.dataset} and {cfg.target.dataset} share {words}")
    name = shared[0] if cfg.classes == "auto" else cfg.classes
    return name, class_lists(cfg)[name]


def id_table(block, name: str, classes: dict) -> np.ndarray:
    """(VALUES[read],) int16: raw id -> train id, IGNORE if known but of no class here, -1 if unknown."""
    table, train_ids = np.full(VALUES[block.read], -1, np.int16), {c: k for k, c in enumerate(classes)}
    table[[raw for ids in block.ids.values() for raw in ids]] = IGNORE
    for raw, c in block.ids[name].items():
        table[raw] = train_ids.get(c, IGNORE)
    return table


def has_labels(cfg, role: str, split: str) -> bool:
    """Whether the data set of `role` has labels in train or val at all (a `folder` may have none)."""
    files = get_block(cfg, role).files
    return not files or len(files.get(split, files.get("train", []))) == 2


# --------------------------------------------------------------------------------------------------- pairs

def list_pairs(root: Path, patterns: list) -> tuple[dict, dict, list]:
    """({sample name: image}, {sample name: label}, image files that are not used), sorted paths below root.

    Raises UserError for a folder that may not be read, and where two files have one name.
    """
    def refuse(error):
        if not isinstance(error, FileNotFoundError):  # a split may have no labels
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend that")

    plain = [os.path.dirname(WILD.split(pattern)[0]) for pattern in patterns]
    form = re.sub(r"\.\w+$", "", str(Path(patterns[0]).relative_to(plain[0])))
    form = WILD.sub("%s", form.replace("%", "%%"))  # of the names
    words, found, unused = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}, [{}, {}], []
    for pattern, start, some in zip(patterns, plain, found, strict=False):
        regex = "".join(words.get(word) or re.escape(word) for word in WILD.split(pattern))
        regex += r"\.[^./]+" if pattern.endswith("*") else ""
        for folder, _, files in os.walk(root / start, onerror=refuse, followlinks=True):
            for path in sorted(Path(folder, file).relative_to(root).as_posix() for file in files):
                match = re.fullmatch(regex, path)
                if match and path.lower().endswith(SUFFIXES):
                    name = form % match.groups()
                    if some.setdefault(name, path) != path:
                        raise UserError(f"{root / some[name]}: {path} has the same name; remove one of them")
                elif some is found[0] and re.search(r"\.(png|jpe?g|webp|bmp|tiff?|ppm)$", path.lower()):
                    unused.append(path)
    images, labels = (dict(sorted(some.items(), key=lambda item: item[1])) for some in found)
    label_files = {*labels.values()}  # x.png and its label x_ids.png may lie side by side
    images = {name: path for name, path in images.items() if path not in label_files}
    return images, labels, [path for path in unused if path not in label_files]


def refuse_unknown_names(part, role: str, files: dict) -> None:
    """Raises UserError for a name in `exclude` that is in no split."""
    names = set()
    for patterns in files.values():
        if not names.issuperset(part.exclude):
            names.update(*list_pairs(Path(part.root), patterns)[:2])
    for name in sorted({*part.exclude} - names, key=str):
        near = "".join(f"; did you mean {n!r}?" for n in difflib.get_close_matches(str(name), names, 1))
        raise UserError(f"{role}.exclude: no sample {name!r} in {part.root}{near}")


def group_numbers(paths: list[str], group: str) -> list[int]:
    """A group number for each of the paths, in order (see `group` in datasets.yaml)."""
    if group == "folder":
        folders = {folder: k for k, folder in enumerate(dict.fromkeys(map(os.path.dirname, paths)))}
        return [folders[os.path.dirname(path)] for path in paths]
    if group == "gap":
        frames = [int(re.sub(r"\D", "", Path(path).stem) or 0) for path in paths]
        return np.cumsum([False, *(np.diff(frames) > 100)]).tolist()
    blocks = min(len(paths), max(7, len(paths) // 100))
    return [i * blocks // len(paths) for i in range(len(paths))]


def find_samples(cfg, role: str, split: str, labels: bool) -> tuple[list[Sample], list, list]:
    """(samples in a fixed order, problems, image files that are not used) of "source" or "target".

    labels: whether label files are looked for. A problem is (sample name, what is wrong): one file of a pair
    is missing. Raises UserError for a missing folder, split or name in `exclude`, and two files of one name.
    """
    part, block = getattr(cfg, role), get_block(cfg, role)
    if "+" in split:  # as val+test
        found = [find_samples(cfg, role, part, labels) for part in split.split("+")]
        return tuple(sum(some, []) for some in zip(*found, strict=True))
    if part.dataset == "streets":
        return street_samples(part, role, split, labels), [], []
    root, divided = Path(part.root), "val" not in block.files and split != "test"
    patterns = block.files.get("train" if divided else split, [])
    if not part.root or not root.is_dir():
        raise UserError(f"{role}.root={part.root}: no such folder; set it to where {part.dataset} lies")
    if len(patterns) < 1 + labels:
        raise UserError(f"{role}.files: no {'labels of ' if patterns else ''}{split} in {part.dataset}")
    if split == "train":
        refuse_unknown_names(part, role, block.files)
    images, label_files, others = list_pairs(root, patterns)
    names = list(images)
    if divided:
        groups = group_numbers([*images.values()], block.group)
        first = min(3, max(groups, default=0)) or 3  # a single group cannot be divided: all of it is train's
        held_out = {n for n, g in zip(names, groups, strict=True) if g % block.every == first}
        names = [n for n in names if (n in held_out) == (split == "val")]
    names = [n for n in names if n not in part.exclude]
    if split == "train" and part.images:
        names = names[: part.images]
    if not names:
        raise UserError(f"{role}.root={root}: no {split} images of {part.dataset} left ({patterns[0]})")
    images, label_files = ({n: str(root / p) for n, p in some.items()} for some in (images, label_files))
    if not labels:
        return [Sample(n, images[n], None) for n in names], [], others
    samples = [Sample(n, images[n], label_files.get(n)) for n in names]
    problems = [(s.name, f"{s.image}: has no label {patterns[1]}; add it") for s in samples if not s.label]
    problems += [(n, f"{path}: a label without its image {patterns[0]}; add or remove one")
                 for n, path in label_files.items() if n not in images and n not in part.exclude]
    return samples, problems, others


def street_samples(part, role: str, split: str, labels: bool) -> list[Sample]:
    if split not in STREETS:
        raise UserError(f"{role}.dataset=streets: has no {split} split")
    count = (split == "train" and part.images) or STREETS[split]
    places = {f"{i:06d}": f"streets:{role}/{split}/{i}" for i in range(count)}
    return [Sample(n, p, p if labels else None) for n, p in places.items() if n not in part.exclude]


# ------------------------------------------------------------------------------------------------- reading

@lru_cache(maxsize=8)
def _scene(address: str) -> tuple[np.ndarray, np.ndarray]:
    domain, split, index = address.removeprefix("streets:").split("/")
    return streets_scene(domain, split, int(index))


def open_image(path: str, decode: bool = True) -> Image.Image:
    """A PNG or JPEG file, or its header alone, with `depth`, its bits per channel. Raises UserError."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG"))  # Pillow's others may run programs
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height}, more than {Image.MAX_IMAGE_PIXELS} pixels")
        if decode:
            image.load()
        # from the PNG's own header: Pillow cuts 16-bit colour down to 8 bits without a word
        image.depth = int(np.fromfile(path, np.uint8, 25)[24]) if image.format == "PNG" else 8
        return image
    except Exception as error:  # a decoder raises whatever the bytes make it trip over
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable PNG or JPEG ({reason}); replace it") from None


def read_image(path: str) -> Image.Image:
    """A file, or `streets:DOMAIN/SPLIT/INDEX`, as RGB, upright by EXIF, alpha dropped. Raises UserError."""
    if path.startswith("streets:"):
        return Image.fromarray(_scene(path)[0])
    image = open_image(path)
    if image.depth == 16:
        raise UserError(f"{path}: 16 bits per channel; save it with 8")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # a parser of foreign bytes
        raise UserError(f"{path}: its EXIF block cannot be read; save the image without") from None


def raw_label(path: str, read: str) -> np.ndarray:
    """A label's (H, W) ids as stored, EXIF not looked at. Raises UserError for a file that holds none."""
    if path.startswith("streets:"):
        return _scene(path)[1]
    image = open_image(path)
    mode = image.mode if image.format == "PNG" else None
    if read == "red16" and mode in ("RGB", "RGBA") and image.depth == 16:
        import cv2  # half a second that only SYNTHIA's labels need

        return cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., 2]  # blue, green, red
    if read in ("red", "rgb") and mode in ("RGB", "RGBA", "P") and image.depth < 16:
        red, green, blue = np.asarray(image.convert("RGB"), np.int32).transpose(2, 0, 1)
        return red if read == "red" else red << 16 | green << 8 | blue
    if read == "index" and (mode == "P" or (mode == "L" and image.depth == 8)):  # Pillow stretches L of less
        return np.asarray(image)
    kind = f"{image.format}, mode {image.mode}, {image.depth} bits"
    raise UserError(f"{path}: {kind}: cannot be a label read by '{read}'; save it as such a PNG")


def read_label(path: str, read: str, table: np.ndarray) -> np.ndarray:
    """A label as (H, W) uint8 train ids by `id_table`. Raises UserError, also for ids unknown to it."""
    raw = raw_label(path, read)
    ids = table[raw]
    if (ids < 0).any():
        unknown, counts = np.unique(raw[ids < 0], return_counts=True)
        words = [f"{[v >> 16, v >> 8 & 255, v & 255] if read == 'rgb' else v} ({count} pixels)"
                 for v, count in zip(unknown.tolist(), counts, strict=True)]
        more = f"{', and more' * (len(words) > 8)}; add it to 'ids', or to 'ignore' in them"
        raise UserError(f"{path}: unknown label {', '.join(words[:8])}{more}")
    return ids.astype(np.uint8)


def examine(sample: Sample, decode: bool, read: str, table: np.ndarray | None) -> tuple[str, np.ndarray]:
    """(what is wrong with the pair, or "", (256,) pixels per train id). decode: pixels, not only headers."""
    pixels = np.zeros(256, np.int64)
    try:
        if decode:
            sizes = [read_image(sample.image).size]
            if sample.label:
                label = read_label(sample.label, read, table)
                sizes.append(label.shape[::-1])
                pixels = np.bincount(label.ravel(), minlength=256)
        else:  # a header may lie on its side
            files = [path for path in sample[1:] if path and not path.startswith("streets:")]
            sizes = [tuple(sorted(open_image(path, decode=False).size)) for path in files]
        if len({*sizes}) > 1:
            raise UserError(f"{sample.image}: {sizes[0]} pixels, but its label {sample.label} has {sizes[1]}")
        return "", pixels
    except UserError as error:
        return str(error), pixels
