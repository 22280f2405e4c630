"""What lies on disk: blocks of data sets, class lists, pairs of images and labels, and how they are read.

datasets.yaml says what a block is; `dataset: folder` is one in a config. Source and target are read onto one
class list. Train ids are positions in it; what is known but not in it is IGNORE; an unknown id is an error.
"""

import os
import re
from collections import namedtuple
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageOps

from losses import IGNORE
from runtime import HERE, UserError, read_yaml
from streets import streets_scene

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHERS = (".webp", ".bmp", ".tif", ".tiff", ".ppm")  # images that are not read, but counted
STREETS = {"train": 500, "val": 100, "test": 0}  # scenes of each domain
VALUES = {"index": 1 << 8, "red": 1 << 8, "red16": 1 << 16, "rgb": 1 << 24}  # ids that each `read` can give
WILD = re.compile(r"(\*\*/|\*|\?)")
WORDS = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}  # what they stand for
# name: the image's path below the pattern's plain folders, without its suffix
Sample = namedtuple("Sample", "name image label", defaults=[None])
published = cache(lambda: read_yaml(HERE / "datasets.yaml"))

# ------------------------------------------------------------------------------- data sets and class lists
def get_block(cfg, role: str) -> SimpleNamespace:
    """A role's files, read, group, every, ids {class list: {id: class}}. Raises UserError naming the key."""
    part, lists = getattr(cfg, role), class_lists(cfg)
    own = {"files": part.files, "read": part.read, "ids": {}}
    blocks = {name: block for name, block in published().items() if name != "class_lists"} | {"folder": own}
    if part.dataset not in blocks:
        raise UserError(f"{role}.dataset={part.dataset}: unknown; known are {', '.join(blocks)}")
    block = {"group": "block", "every": 50} | (own if part.files else blocks[part.dataset])
    ids, block["ids"] = part.ids or block["ids"], {}
    for split, patterns in block["files"].items():
        patterns = patterns or []
        wild = [WILD.findall(str(p)) for p in patterns if not str(p).startswith("/")]
        paired = len(wild) in (1, 1 + bool(ids)) and wild[0] and wild[0] == wild[-1]
        if split not in ("train", "val", "test") or not paired or len(wild) != len(patterns):
            raise UserError(f"{role}.files: {split}: {patterns}: must be train, val or test: [images] or, "
                            "if there are ids, [images, labels], below root, of the same *, ? and **/")
    if not all(isinstance(value, dict) for value in ids.values()):
        ids = {"own" if cfg.class_colours else cfg.classes: ids}
    for name, mapping in ids.items():
        if name not in lists:
            raise UserError(f"classes={name}: {role}.ids needs class_colours or one of {', '.join(lists)}")
        block["ids"][name] = read_ids(mapping, lists[name], block["read"], f"{role}.ids")
    return SimpleNamespace(**block)


def read_ids(mapping: dict, classes: dict, read: str, key: str) -> dict:
    """{class: id, ids, colour or colours} as {id: class}. Raises UserError for one that is none or double."""
    owner = {}
    for c, value in mapping.items():
        if c not in (*classes, "ignore"):
            raise UserError(f"{key}: '{c}' is not a class ({', '.join(classes)})")
        several = isinstance(value, list) and (read != "rgb" or any(isinstance(v, list) for v in value))
        for v in value if several else [value]:
            number = id_number(v, read)
            if number < 0 or owner.setdefault(number, c) != c:
                kind = "[R, G, B]" if read == "rgb" else f"0 to {VALUES[read] - 1}"
                raise UserError(f"{key}: {c}: {v!r} is no id read by '{read}' ({kind}), or another class's")
    return owner


def id_number(value, read: str) -> int:
    """An id as a number, a colour [R, G, B] as 65536 R + 256 G + B; -1 for what is none."""
    if read != "rgb":
        return value if type(value) is int and 0 <= value < VALUES[read] else -1
    if not isinstance(value, list) or len(value) != 3 or any(v not in range(256) for v in value):
        return -1
    return value[0] << 16 | value[1] << 8 | value[2]


def class_lists(cfg) -> dict:
    """{name: {class: [R, G, B]}}: those of datasets.yaml and, as "own", `class_colours`."""
    for name, colour in cfg.class_colours.items():
        if not isinstance(name, str) or name == "ignore":
            raise UserError(f"class_colours: {name!r} is no class name; take another, or put it in quotes")
        if id_number(colour, "rgb") < 0:
            raise UserError(f"class_colours: {name}: {colour!r}: a colour is [R, G, B], each 0 to 255")
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


def id_table(cfg, role: str) -> np.ndarray:
    """(ids of `read`,) int16: raw id -> train id, IGNORE if known but of no class here, -1 if unknown."""
    block, (name, classes) = get_block(cfg, role), class_list(cfg)
    table, train_ids = np.full(VALUES[block.read], -1, np.int16), {c: k for k, c in enumerate(classes)}
    table[[raw for ids in block.ids.values() for raw in ids]] = IGNORE
    for raw, c in block.ids.get(name, {}).items():
        table[raw] = train_ids.get(c, IGNORE)
    return table


def has_labels(cfg, role: str, split: str) -> bool:
    """Whether there are labels for `split`; one that a `folder` does not name has them as train has."""
    files = get_block(cfg, role).files
    return not files or len(files.get(split, files.get("train", []))) == 2


# --------------------------------------------------------------------------------------------------- pairs
def list_files(root: Path, pattern: str) -> tuple[dict, list]:
    """({what the wildcards stand for: image file}, sorted by file; other files), all below root.

    Raises UserError for a folder that may not be read, and for two files that differ in the suffix alone.
    """
    def refuse(error):
        if not isinstance(error, FileNotFoundError):  # a split may have no labels
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend that")

    parts, found, others = WILD.split(pattern), {}, []
    regex = "".join(WORDS.get(part) or re.escape(part) for part in parts)
    regex += r"\.[^./]+" if pattern.endswith("*") else ""
    for folder, _, files in os.walk(root / os.path.dirname(parts[0]), onerror=refuse, followlinks=True):
        for path in sorted(Path(folder, file).relative_to(root).as_posix() for file in files):
            match = re.fullmatch(regex, path)
            if not match or not path.lower().endswith(SUFFIXES):
                others.append(path)
            elif (first := found.setdefault(match.groups(), path)) != path:
                raise UserError(f"{root / first}: {path} has the same name; remove one of them")
    return dict(sorted(found.items(), key=lambda item: item[1])), others


def list_pairs(root: Path, patterns: list) -> tuple[list[Sample], list[Sample], list[str]]:
    """(images with labels, labels without images, unused image files); a missing file has its path to be."""
    def fill(pattern, words):
        return WILD.sub("%s", pattern.replace("%", "%%")) % words

    def pair(words):
        paths = [images.get(words), labels.get(words)][: len(patterns)]
        paths = [path or fill(pattern, words) for path, pattern in zip(paths, patterns, strict=True)]
        return Sample(fill(name, words), *(str(root / path) for path in paths))

    (images, others), *rest = (list_files(root, pattern) for pattern in patterns)
    labels = rest[0][0] if rest else {}
    taken = {*labels.values()}  # x.png and its label x_ids.png may lie side by side
    images = {words: path for words, path in images.items() if path not in taken}
    unused = [path for path in others if path.lower().endswith(SUFFIXES + OTHERS) and path not in taken]
    folder = os.path.dirname(WILD.split(patterns[0])[0])
    name = re.sub(r"\.\w+$", "", str(Path(patterns[0]).relative_to(folder)))
    return [*map(pair, images)], [pair(words) for words in labels if words not in images], unused


def hold_out(paths: list[str], group: str, every: int) -> list[bool]:
    """Whether each of the sorted paths is held out, group by group (see `group` in datasets.yaml)."""
    if group == "folder":
        folders = {folder: k for k, folder in enumerate(dict.fromkeys(map(os.path.dirname, paths)))}
        numbers = [folders[os.path.dirname(path)] for path in paths]
    elif group == "gap":
        frames = [int(re.sub(r"\D", "", Path(path).stem) or 0) for path in paths]
        numbers = np.cumsum([False, *(np.diff(frames) > 100)]).tolist()
    else:
        blocks = min(len(paths), max(7, len(paths) // 100))
        numbers = [i * blocks // len(paths) for i in range(len(paths))]
    first = min(3, max(numbers, default=0)) or 3  # a single group cannot be divided: all of it is train's
    return [number % every == first for number in numbers]


def find_samples(cfg, role: str, split: str, labels: bool) -> tuple[list[Sample], list[str]]:
    """(samples in a fixed order, unused image files) of "source" or "target"; labels: whether they have any.

    A missing file of a pair has the path that it should have. Raises UserError for a missing folder or split.
    """
    if "+" in split:  # as val+test
        found = [find_samples(cfg, role, one, labels) for one in split.split("+")]
        return tuple(sum(some, []) for some in zip(*found, strict=True))
    part, block, strays, unused = getattr(cfg, role), get_block(cfg, role), [], []
    divided = "val" not in block.files and split != "test"
    patterns = block.files.get("train" if divided else split, [])
    if part.dataset == "streets":
        count = (split == "train" and part.images) or STREETS.get(split, 0)
        places = [f"streets:{role}/{split}/{i}" for i in range(count)]
        samples = [Sample(f"{i:06d}", place, place) for i, place in enumerate(places)]
    elif not part.root or not os.path.isdir(part.root):
        raise UserError(f"{role}.root={part.root}: no such folder; set it to where the data lie")
    elif len(patterns) < 1 + labels:
        raise UserError(f"{role}.files: no {'labels of ' if patterns else ''}{split} in {part.dataset}; "
                        f"give {split}: [images, labels]")
    else:
        samples, strays, unused = list_pairs(Path(part.root), patterns)
        if divided:
            held_out = hold_out([s.image for s in samples], block.group, block.every)
            samples = [s for s, held in zip(samples, held_out, strict=True) if held == (split == "val")]
    samples, strays = ([s for s in some if s.name not in part.exclude] for some in (samples, strays))
    if split == "train" and part.images:
        samples = samples[: part.images]
    if not samples:
        words = f"{patterns or part.dataset}{f'; but there is {unused[0]}' if unused else ''}"
        raise UserError(f"{role}.root={part.root}: no {split} images left of {words}")
    return samples + strays if labels else [s._replace(label=None) for s in samples], unused


# ------------------------------------------------------------------------------------------------- reading
@lru_cache(maxsize=64)  # image and label are read apart, by many threads
def _scene(address: str) -> tuple[np.ndarray, np.ndarray]:
    domain, split, index = address.removeprefix("streets:").split("/")
    return streets_scene(domain, split, int(index))


def open_image(path: str, decode: bool = True, upright: bool = False) -> Image.Image:
    """A PNG or JPEG file, or its header alone, with `depth`, its bits per channel. Raises UserError."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG"))  # Pillow's others may run programs
        # from the PNG's own header: Pillow cuts 16-bit colour down to 8 bits without a word
        image.depth = int(np.fromfile(path, np.uint8, 25)[24]) if image.format == "PNG" else 8
        if decode:
            image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # a decoder raises whatever the bytes make it trip over
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: not a readable PNG or JPEG ({reason}); mend it") from None


def read_image(path: str) -> Image.Image:
    """A file, or `streets:DOMAIN/SPLIT/INDEX`, as RGB, upright by EXIF, alpha dropped. Raises UserError."""
    if path.startswith("streets:"):
        return Image.fromarray(_scene(path)[0])
    image = open_image(path, upright=True)
    if image.depth == 16:
        raise UserError(f"{path}: 16 bits per channel; save it with 8")
    return image.convert("RGB")


def raw_label(path: str, read: str) -> np.ndarray:
    """A label's (H, W) ids as stored, EXIF not looked at. Raises UserError for a file that holds none."""
    if path.startswith("streets:"):
        return _scene(path)[1]
    image = open_image(path)
    mode, depth = image.mode if image.format == "PNG" else "JPEG", image.depth
    if read == "red16" and mode in ("RGB", "RGBA") and depth == 16:
        import cv2  # half a second that only SYNTHIA's labels need

        return cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., 2]  # blue, green, red
    if read in ("red", "rgb") and mode in ("RGB", "RGBA", "P") and depth < 16:
        red, green, blue = np.asarray(image.convert("RGB"), np.int32).transpose(2, 0, 1)
        return red if read == "red" else red << 16 | green << 8 | blue
    if read == "index" and (mode == "P" or (mode == "L" and depth == 8)):  # Pillow stretches L of less
        return np.asarray(image)
    raise UserError(f"{path}: mode {mode}, {depth} bits: no label to read by '{read}'; save it as such a PNG")


def read_label(path: str, read: str, table: np.ndarray) -> np.ndarray:
    """A label as (H, W) uint8 train ids by `id_table`. Raises UserError, also for ids unknown to it."""
    raw = raw_label(path, read)
    ids = table[raw]
    if (ids < 0).any():
        found = zip(*(a.tolist() for a in np.unique(raw[ids < 0], return_counts=True)), strict=True)
        words = [f"{[v >> 16, v >> 8 & 255, v & 255] if read == 'rgb' else v} ({n} pixels)" for v, n in found]
        words = [*words[:8], "and more (is it a label?)"] if len(words) > 8 else words
        raise UserError(f"{path}: unknown label {', '.join(words)}; add it to 'ids', or to 'ignore' in them")
    return ids.astype(np.uint8)
