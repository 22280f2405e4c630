"""Data sets: pairs of images and labels, how they are read, and the batches that training draws.

datasets.yaml holds the published data sets and class lists, and says how to add one; `dataset: folder` is
such a block in a config. Source and target are read onto one class list. Train ids are positions in it; what
is known but not in it is IGNORE; an unknown id is an error. `python check.py CFG` shows what lies on disk.
"""

import difflib
import hashlib
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from runtime import (
    HERE, UserError, all_reduce, load_checkpoint, random_generator, rank, read_json, read_yaml, refuse_changes,
    stage_config, weights_digest, world,
)  # fmt: skip

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from losses import IGNORE, confusion_matrix
from streets import streets_scene

# ---------------------------------------------------------------------------------- data sets and class lists

VALUES = {"index": 1 << 8, "red": 1 << 8, "red16": 1 << 16, "rgb": 1 << 24}  # ids that each way of reading gives
published = cache(lambda: read_yaml(HERE / "datasets.yaml"))


def get_block(cfg, role: str) -> SimpleNamespace:
    """The block of `role` ("source" or "target"): files, read, group, every, known, ids {class list: {class: [id]}}.

    Raises UserError, naming the key, for what is wrong with it or fits no class list.
    """
    part, names = getattr(cfg, role), ["folder", *(name for name in published() if name != "class_lists")]
    if part.dataset not in names:
        near = difflib.get_close_matches(part.dataset, names, 1)
        raise UserError(f"{role}.dataset={part.dataset}: unknown{f', did you mean {near[0]}?' if near else ''}; "
                        f"known are {', '.join(names)}")
    own = {"files": part.files, "read": part.read, "ids": {}}
    block = {"group": "block", "every": 50} | (own if part.files else published().get(part.dataset, own))
    ids = part.ids or block["ids"]
    if not block["files"] and part.dataset == "folder":
        raise UserError(f"{role}.files: needed for a folder: {{train: [images, labels], val: [images, labels]}}")
    for split, patterns in block["files"].items():
        check_patterns(f"{role}.files: {split}", split, patterns)
        if len(patterns) == 2 and not ids:
            raise UserError(f"{role}.ids: needed, because {role}.files names labels of {split}")
    if ids and not all(isinstance(value, dict) for value in ids.values()):
        ids = {"own" if cfg.class_colours else cfg.classes: ids}
    for name, mapping in ids.items():
        if name not in class_lists(cfg):
            raise UserError(f"classes={name}: {role}.ids needs a class list: name one of "
                            f"{', '.join(class_lists(cfg))}, or set class_colours to your own")
        for c in {*mapping} - {*class_lists(cfg)[name], "ignore"}:
            raise UserError(f"{role}.ids: '{c}' is not a class of '{name}' ({', '.join(class_lists(cfg)[name])})")
    block["ids"] = {name: read_ids(mapping, block["read"], f"{role}.ids") for name, mapping in ids.items()}
    block["known"] = sorted({i for m in block["ids"].values() for some in m.values() for i in some})
    return SimpleNamespace(**block)


def check_patterns(key: str, split: str, patterns) -> None:
    """Raises UserError for an unknown split, and for patterns that cannot make pairs."""
    if split not in ("train", "val", "test") or type(patterns) is not list or len(patterns) not in (1, 2):
        raise UserError(f"{key}: must be train, val or test: [images, labels], two patterns, or [images]")
    if not WILD.findall(patterns[0]) or WILD.findall(patterns[0]) != WILD.findall(patterns[-1]):
        raise UserError(f"{key}: {' and '.join(patterns)} need the same *, ? and **/ in the same order, because what "
                        "they stand for makes the pair")


def colour_id(value, key: str) -> int:
    """[R, G, B] as the number 65536 R + 256 G + B. Raises UserError that names the key."""
    if type(value) is not list or len(value) != 3 or any(type(v) is not int or not 0 <= v < 256 for v in value):
        raise UserError(f"{key}: a colour is [R, G, B], each 0 to 255, not {value!r}")
    return value[0] << 16 | value[1] << 8 | value[2]


def read_ids(mapping: dict, read: str, key: str) -> dict:
    """{class: id, ids, colour or colours} as {class: [id]}. Raises UserError for what is no id, or stands twice."""
    ids, owner = {}, {}
    for name, value in mapping.items():
        some = value if isinstance(value, list) else [value]
        if read == "rgb":
            some = [colour_id(v, f"{key}: {name}") for v in (some if isinstance(some[0], list) else [some])]
        for v in some:
            if type(v) is not int or not 0 <= v < VALUES[read] or owner.setdefault(v, name) != name:
                raise UserError(f"{key}: {name}: {v!r} is no id read by '{read}' (0 to {VALUES[read] - 1}), or "
                                f"belongs to '{owner.get(v)}' already")
        ids[name] = some
    return ids


def class_lists(cfg) -> dict:
    """{name: {class: [R, G, B]}}: datasets.yaml's, and with `class_colours` the config's own."""
    for name, colour in cfg.class_colours.items():
        colour_id(colour, f"class_colours: {name}")
    return published()["class_lists"] | ({"own": cfg.class_colours} if cfg.class_colours else {})


def class_list(cfg) -> tuple[str, dict]:
    """The (name, {class: [R, G, B]}) onto which source and target are read. Raises UserError where there is none."""
    offers = [block.ids for block in (get_block(cfg, "source"), get_block(cfg, "target")) if block.ids]
    shared = [name for name in (offers[0] if offers else []) if name in offers[-1]]
    if not shared or cfg.classes not in ("auto", *shared):
        raise UserError(f"classes={cfg.classes}: {cfg.source.dataset} and {cfg.target.dataset} share "
                        f"{', '.join(shared) or 'no class list; class_colours, source.ids and target.ids make one'}")
    name = shared[0] if cfg.classes == "auto" else cfg.classes
    return name, class_lists(cfg)[name]


def has_labels(cfg, role: str, split: str) -> bool:
    """Whether the data set of `role` has labels in `split` at all (a `folder` may have none)."""
    files = get_block(cfg, role).files
    return not files or len(files.get(split, files.get("train", []) if split == "val" else [])) == 2


def id_table(block, name: str, classes: dict) -> np.ndarray:
    """(VALUES[read],) int16: raw id -> train id, IGNORE for known ids outside the class list, -1 for unknown ones."""
    table = np.full(VALUES[block.read], -1, np.int16)
    table[block.known] = IGNORE
    for train_id, c in enumerate(classes):
        table[block.ids[name].get(c, [])] = train_id
    return table


# ------------------------------------------------------------------------------------------------------ pairs

SUFFIXES = (".png", ".jpg", ".jpeg")
WILD = re.compile(r"(\*\*/|\*|\?)")
STREETS = {"train": 500, "val": 100}  # scenes of each domain


class Sample(NamedTuple):
    """One image: its name (path below the pattern's last plain folder, no suffix), where image and label lie."""

    name: str
    image: str
    label: str | None


def files_of(root: Path, pattern: str, suffixes: tuple = SUFFIXES) -> tuple[dict, list]:
    """({what the wildcards stand for: path below root, sorted}, image files that lie there and do not match).

    Raises UserError for a folder that may not be read, and where two files have one name.
    """
    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend that")

    words = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
    regex = "".join(words.get(w) or re.escape(w) for w in WILD.split(pattern)) + r"\.[^./]+" * pattern.endswith("*")
    found, missed = {}, []
    for folder, _, names in os.walk(root / WILD.split(pattern)[0].rpartition("/")[0], onerror=refuse, followlinks=True):
        for path in (Path(folder, name).relative_to(root).as_posix() for name in names):
            match = re.fullmatch(regex, path)
            if match and path.lower().endswith(suffixes):
                found.setdefault(match.groups(), []).append(path)
            elif re.search(r"\.(png|jpe?g|webp|bmp|tiff?|ppm)$", path.lower()):
                missed.append(path)
    for paths in found.values():
        if len(paths) > 1:
            raise UserError(f"{root / paths[0]}: {paths[1]} has the same name; remove one of them")
    return {key: paths[0] for key, paths in sorted(found.items(), key=lambda item: item[1])}, missed


def filled(pattern: str, key: tuple) -> str:
    """The path that `pattern` has with `key` in place of its wildcards."""
    words = iter(key)
    return WILD.sub(lambda _: next(words), pattern)


def group_numbers(paths: list[str], group: str) -> list[int]:
    """A group number for each of the paths, in order (see `group` in datasets.yaml)."""
    if group == "folder":
        folders = list(dict.fromkeys(os.path.dirname(p) for p in paths))
        return [folders.index(os.path.dirname(p)) for p in paths]
    if group == "gap":
        numbers = [int(re.sub(r"\D", "", Path(p).stem) or 0) for p in paths]
        return np.cumsum([False] + [b - a > 100 for a, b in zip(numbers, numbers[1:], strict=False)]).tolist()
    blocks = min(len(paths), max(7, len(paths) // 100))
    return [i * blocks // len(paths) for i in range(len(paths))]


def find_samples(cfg, role: str, split: str, labels: bool) -> tuple[list[Sample], list, list]:
    """(samples in a fixed order, problems, image files that are not used) of "source" or "target" and a split.

    labels: whether label files are looked for. A problem is (sample name, what is wrong): an image without
    label or a label without image. Raises UserError for a missing folder or split, and a name in `exclude`
    that is not there.
    """
    part, block = getattr(cfg, role), get_block(cfg, role)
    if part.dataset == "streets":
        if split not in STREETS:
            raise UserError(f"{role}.dataset=streets: has no {split} split")
        count = part.images or STREETS[split] if split == "train" else STREETS[split]
        places = [f"streets:{role}/{split}/{i}" for i in range(count)]
        samples = [Sample(f"{i:06d}", p, p if labels else None) for i, p in enumerate(places)]
        return [s for s in samples if s.name not in part.exclude], [], []
    root = Path(part.root)
    if not part.root or not root.is_dir():
        raise UserError(f"{role}.root={part.root}: no such folder; set it to where {part.dataset} lies")
    held_out = split == "val" and "val" not in block.files
    patterns = block.files.get("train" if held_out else split)
    if patterns is None or (labels and len(patterns) == 1):
        raise UserError(f"{role}.files: no {'labels of' if patterns else ''} {split} in {role}.dataset={part.dataset}")
    images, missed = files_of(root, patterns[0])
    found = files_of(root, patterns[1], (".png",))[0] if len(patterns) == 2 else {}
    label_files = {*found.values()}  # x.png and its label x_ids.png may lie side by side
    images = {key: path for key, path in images.items() if path not in label_files}
    missed = [path for path in missed if path not in label_files]
    if not images:
        raise UserError(f"{role}.root={root}: no {split} images of {part.dataset} ({patterns[0]}) in it")
    plain = WILD.split(patterns[0])[0].rpartition("/")[0]
    names = {k: str(Path(filled(patterns[0], k)).relative_to(plain).with_suffix("")) for k in {*images, *found}}
    unknown = {*part.exclude} - {*names.values()}
    if unknown and split == "train":
        near = difflib.get_close_matches(min(unknown), names.values(), 1)
        raise UserError(f"{role}.exclude: no sample {min(unknown)!r} in {root}"
                        + (f"; did you mean {near[0]!r}?" if near else ""))
    keys = list(images)
    if "val" not in block.files:
        groups = group_numbers([*images.values()], block.group)
        first = min(3, groups[-1]) or 3  # a single group cannot be divided: all of it is for training
        keys = [k for k, g in zip(keys, groups, strict=True) if (g % block.every == first) == (split == "val")]
    keys = [k for k in keys if names[k] not in part.exclude][: part.images or None if split == "train" else None]
    place = {k: str(root / path) for k, path in images.items()}
    samples = [Sample(names[k], place[k], str(root / found[k]) if labels and k in found else None) for k in keys]
    problems = []
    if labels:
        problems = [(s.name, f"{s.image}: has no label {root / filled(patterns[1], k)}; add it")
                    for s, k in zip(samples, keys, strict=True) if s.label is None]
        problems += [(names[k], f"{root / path}: a label without its image {root / filled(patterns[0], k)}; add or "
                      "remove one") for k, path in found.items() if k not in images and names[k] not in part.exclude]
    return samples, problems, missed


# ---------------------------------------------------------------------------------------------------- reading


@lru_cache(maxsize=8)
def _scene(address: str):
    domain, split, index = address.removeprefix("streets:").split("/")
    return streets_scene(domain, split, int(index))


def open_image(path: str, decode: bool = True) -> Image.Image:
    """A PNG or JPEG file as Pillow gives it. decode: all of it, not only its header. Raises UserError.

    Pillow's other formats are not tried, whatever the file's name: some of them run programs.
    """
    try:
        image = Image.open(path, formats=("PNG", "JPEG"))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height}, more than {Image.MAX_IMAGE_PIXELS} pixels")
        if decode:
            image.load()
        return image
    except Exception as error:  # a decoder raises whatever the bytes make it trip over
        raise UserError(f"{path}: not a readable PNG or JPEG ({' '.join(str(error).split())}); replace it") from None


def png_depth(path: str) -> int:
    """Bits per channel from a PNG's own header: Pillow cuts 16-bit colour down to 8 bits without a word."""
    with open(path, "rb") as file:
        return file.read(25)[-1]


def read_image(path: str) -> Image.Image:
    """An image file, or a `streets:DOMAIN/SPLIT/INDEX` address, as upright RGB. Raises UserError that names the file.

    Greyscale, palette and CMYK are converted, an alpha channel is dropped, EXIF's orientation is applied.
    """
    if path.startswith("streets:"):
        return Image.fromarray(_scene(path)[0])
    image = open_image(path)
    if image.format == "PNG" and png_depth(path) == 16:
        raise UserError(f"{path}: 16 bits per channel; save it with 8")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # a parser of foreign bytes
        raise UserError(f"{path}: its EXIF block cannot be read; save the image without") from None


def read_label(path: str, read: str, table: np.ndarray) -> np.ndarray:
    """A label file (or address) as (H, W) uint8 train ids, pixels as they are stored (EXIF is not looked at).

    read: as in cfg.yaml; table: from `id_table`. Raises UserError for a file that cannot hold ids read that
    way, and for ids that the table does not know, with the number of pixels of each.
    """
    if path.startswith("streets:"):
        raw = _scene(path)[1]
    else:
        image = open_image(path)
        kind, raw = f"{image.format}, mode {image.mode}, {png_depth(path)} bits", None
        if image.format == "PNG" and (png_depth(path) == 16) == (read == "red16"):
            if read == "red16":
                import cv2  # half a second that only SYNTHIA's labels need

                raw = cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., 2]  # blue, green, red
            elif read == "rgb" and image.mode in ("RGB", "RGBA", "P"):
                raw = np.asarray(image.convert("RGB"), np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
            elif read == "red" and image.mode in ("RGB", "RGBA", "P"):
                raw = np.asarray(image.convert("RGB"))[..., 0]
            elif image.mode in ("L", "P") and (image.mode == "P" or png_depth(path) == 8):
                raw = np.asarray(image)  # greyscale of less than 8 bits is stretched: no longer the ids
        if raw is None:
            raise UserError(f"{path}: {kind}: cannot be a label read by '{read}'; save it as such a PNG")
    ids = table[raw]
    if (ids < 0).any():
        unknown, pixels = np.unique(raw[ids < 0], return_counts=True)
        colours = [f"[{v >> 16}, {v >> 8 & 255}, {v & 255}]" if read == "rgb" else f"{v}" for v in unknown[:8].tolist()]
        words = ", ".join(f"{c} ({n} pixels)" for c, n in zip(colours, pixels, strict=False))
        raise UserError(f"{path}: unknown label {words}{', and more' * (len(unknown) > 8)}; add it to 'ids', or to "
                        "'ignore' in them, in the config or datasets.yaml")
    return ids.astype(np.uint8)


def examine(sample: Sample, read: str, table: np.ndarray | None, decode: bool) -> tuple[str, np.ndarray | None]:
    """(what is wrong with the pair, or "", (256,) pixels per train id or None). decode: pixels, not only headers."""
    if sample.image.startswith("streets:") and not decode:
        return "", None
    try:
        sizes = [(read_image if decode else partial(open_image, decode=False))(sample.image).size]
        if sample.label and decode:
            label = read_label(sample.label, read, table)
            sizes.append(label.shape[::-1])
        elif sample.label:
            sizes.append(open_image(sample.label, False).size)
    except UserError as error:
        return str(error), None
    if sorted(sizes[0]) != sorted(sizes[-1]) or (decode and sizes[0] != sizes[-1]):  # a header may lie on its side
        return f"{sample.image}: {sizes[0]} pixels, but its label {sample.label} has {sizes[-1]}; replace one", None
    return "", np.bincount(label.ravel(), minlength=256) if sample.label and decode else None


def resized(image: Image.Image, size) -> Tensor:
    """An RGB image as (3, h, w) uint8, resized with an antialiasing bilinear filter."""
    return torch.from_numpy(np.asarray(image.resize(size[::-1], Image.BILINEAR)).transpose(2, 0, 1).copy())


CACHE_BYTES = 2 << 30  # resized images that one data set keeps in memory, over all of its loader's processes


class Scenes:
    """The images of one domain and split, resized, with labels as train ids where asked for.

    role: "source" or "target"; split: "train", "val" or "test"; labels: without it no label file is opened.
    At the start every file's header is read, and a few files whole, so that what is wrong stops before
    training.
    """

    def __init__(self, cfg, role: str, split: str, labels: bool):
        block, self.size = get_block(cfg, role), getattr(cfg, role).size
        self.class_list, self.classes = class_list(cfg)
        self.role, self.read, self.known = role, block.read, block.known
        self.table = id_table(block, self.class_list, self.classes) if block.ids else None
        self.samples, problems, _ = find_samples(cfg, role, split, labels)
        few = [self.samples[i] for i in np.unique(np.linspace(0, len(self.samples) - 1, 16).astype(int))]
        for samples, decode in ((self.samples, False), (few, True)):
            with ThreadPoolExecutor(8) as pool:  # headers on a network disk are a matter of waiting
                found = pool.map(lambda s, decode=decode: examine(s, self.read, self.table, decode)[0], samples)
                problems += [(s.name, text) for s, text in zip(samples, found, strict=True) if text]
        if problems:
            raise UserError(f"{problems[0][1]}; or list {json.dumps(problems[0][0])} in {role}.exclude"
                            f" ({len(problems)} problems; python datasets.py CFG names them)")
        self.cached, self.room = {}, CACHE_BYTES

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """Number of samples, and a SHA-256 of their names and file sizes: what a resumed run must find again."""
        files = [(s.name, *(os.path.getsize(p) if p and os.path.exists(p) else p for p in s[1:])) for s in self.samples]
        return f"{len(self)} samples {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"

    @cached_property
    def pixels(self) -> np.ndarray:
        """(images, classes) number of labelled pixels, at the size of training. Reads every label."""
        return np.array([np.bincount(self.label(i).flatten().numpy(), minlength=IGNORE + 1)[: len(self.classes)]
                         for i in tqdm(range(len(self)), "labels", mininterval=1, leave=False, disable=rank() > 0)])

    def _keep(self, key: tuple, make) -> Tensor:
        """make(), or what it gave the last time."""
        if key not in self.cached:
            value, worker = make(), torch.utils.data.get_worker_info()
            self.room -= value.nbytes * (worker.num_workers if worker else 1)
            if self.room < 0:
                return value
            self.cached[key] = value
        return self.cached[key]

    def image(self, i: int) -> Tensor:
        """(3, h, w) uint8, resized with an antialiasing bilinear filter."""
        return self._keep(("image", i), lambda: resized(read_image(self.samples[i].image), self.size))

    def native_label(self, i: int) -> np.ndarray:
        """(H, W) uint8 train ids at the label's own resolution."""
        return read_label(self.samples[i].label, self.read, self.table)

    def label(self, i: int) -> Tensor:
        """(h, w) uint8 train ids, resized by nearest neighbour; all IGNORE where labels were not asked for."""
        def make():
            if self.samples[i].label is None:
                return torch.full(tuple(self.size), IGNORE, dtype=torch.uint8)
            label = Image.fromarray(self.native_label(i)).resize(self.size[::-1], Image.NEAREST)
            return torch.from_numpy(np.asarray(label).copy())

        return self._keep(("label", i), make)


class Augmented(Scenes):
    """The finished images of augment.py: image s * len(source) + i is source image i in its s-th style.

    Raises UserError where they are missing, incomplete, of another config, or not of the generator in gan/.
    """

    def __init__(self, cfg, source: Scenes):
        self.folder, mend = Path(cfg.output, cfg.name, "augmented"), "run augment.py with this config first"
        identity = read_json(self.folder / "identity.json", {"generator": str, "config": dict}, mend)
        refuse_changes(identity["config"], stage_config(cfg, ("", "source", "target", "augment")), self.folder)
        if cfg.augment.method == "gan":
            G = load_checkpoint(Path(cfg.output, cfg.name, "gan", "last.pt"), "it made the images; put it back", ("G",))["G"]
            refuse_changes(identity, {"generator": weights_digest(G)}, self.folder)
        refuse_changes(identity, {"source train": source.digest}, self.folder)
        files = planned_files(self.folder, source, cfg.augment.styles_per_image)
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: repainted image missing ({len(missing)} of {len(files)}); {mend}")
        self.samples = [Sample(file.stem, str(file), None) for file in files]
        self.size, self.cached, self.room = source.size, {}, CACHE_BYTES
        self.digest = f"{len(files)} samples of generator {identity['generator']}"


def planned_files(folder: Path, source: Scenes, styles: int) -> list[Path]:
    """The file of source image i in style s is at position s * len(source) + i."""
    return [folder / f"style{s}" / f"{sample.name}.png" for s in range(styles) for sample in source.samples]


# ---------------------------------------------------------------------------------------------------- batches


def photometric_jitter(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Changes colour, light, sharpness and texture of an image, never its geometry.

    x: (3, H, W) float in [0, 1] -> the same. strength: 0 nothing, 1 strong. Brightness, contrast, gamma and a
    colour cast by factors of up to exp(+-0.7), hue by a tenth of the circle, saturation 0 to 2, blur of up to
    1.2 pixels, and random fields from fine grain to broad shade, because a generator hides in whatever f_seg
    has never been shown.
    """
    def factor(spread):
        return float(np.exp(rng.uniform(-spread, spread) * strength))

    x = TF.adjust_hue(x, float(rng.uniform(-0.1, 0.1) * min(strength, 1)))
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


def images_by_class(source: Scenes, rare: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rare-class sampling (Hoyer, Dai, Van Gool 2022, DAFormer): a class is drawn, then one of its images.

    rare: temperature T of P(c) ~ exp((1 - f_c) / T), f_c the class's share of the labelled pixels -> (P (C,),
    for each class the indices of the images in which it has 1 pixel in 1,000 or more, or else P = 0).
    """
    images = [np.flatnonzero(some >= source.size[0] * source.size[1] / 1000) for some in source.pixels.T]
    there = np.array([len(some) > 0 for some in images])
    if not there.any():
        raise UserError("rare: no source image has a class in 1 pixel of 1,000; set it to 0")
    share = source.pixels.sum(0) / source.pixels.sum()
    p = there * np.exp(np.minimum(0, share[there].min() - share) / rare)  # divided by the greatest: no overflow
    return p / p.sum(), images


@lru_cache(maxsize=16)
def _order(*key, n: int) -> np.ndarray:
    return random_generator(*key).permutation(n)


class Batches(torch.utils.data.Dataset):
    """Item `step` (0, 1, ...) is this process's batch of that step, a function of (seed, stage, step) alone.

    So neither the number of loader workers nor a resumed run changes what is drawn. Every domain goes through
    its images in a new random order each epoch; with `rare`, source images are drawn by class. A dictionary
    of uint8:
        x_s (N, 3, h, w), y_s (N, h, w)   source images and labels
        x_g (N, 3, h, w)                  an augmented version of the same images, flipped and cropped with them
        x_t (N, 3, h, w)                  target images

    section: the config section of batch and crop; domains: {"source": Scenes, "augmented": ..., "target":
    ...}, some of them; jitter: strength of `photometric_jitter` on x_s; rare: as in cfg.yaml.
    """

    def __init__(self, cfg, section: str, domains: dict, jitter: float = 0.0, rare: float = 0.0):
        part = getattr(cfg, section)
        self.key, self.batch, self.crop, self.flip = (cfg.seed, section), part.batch * world(), part.crop, cfg.flip
        self.first, self.count, self.jitter = rank() * part.batch, part.batch, jitter
        self.source, self.augmented, self.target = map(domains.get, ("source", "augmented", "target"))
        self.by_class = images_by_class(self.source, rare) if rare else None

    def _index(self, domain: str, position: int, n: int) -> int:
        if domain == "source" and self.by_class:
            rng, (p, images) = random_generator(*self.key, "rare", position), self.by_class
            return int(rng.choice(images[rng.choice(len(p), p=p)]))
        return int(_order(*self.key, domain, position // n, n=n)[position % n])

    def _geometry(self, rng, position: int, *tensors: Tensor) -> list[Tensor]:
        """One flip and one crop for all of the tensors; the crop lies at the same place in every domain."""
        if rng.random() < 0.5 and self.flip:
            tensors = [t.flip(-1) for t in tensors]
        if self.crop:
            (h, w), (H, W) = self.crop, tensors[0].shape[-2:]
            u, v = random_generator(*self.key, "crop", position).random(2)
            top, left = int(u * (H - h + 1)), int(v * (W - w + 1))
            tensors = [t[..., top : top + h, left : left + w] for t in tensors]
        return list(tensors)

    def _sources(self, position: int) -> dict[str, Tensor]:
        rng, i = random_generator(*self.key, "source", position), self._index("source", position, len(self.source))
        tensors = [self.source.image(i), self.source.label(i)]
        if self.augmented is not None:
            style = int(rng.integers(len(self.augmented) // len(self.source)))
            tensors.append(self.augmented.image(style * len(self.source) + i))
        tensors = self._geometry(rng, position, *tensors)
        if self.jitter:
            tensors[0] = (photometric_jitter(tensors[0] / 255, self.jitter, rng) * 255).round().byte()
        return dict(zip(("x_s", "y_s", "x_g"), tensors, strict=False))

    def _target(self, position: int) -> dict[str, Tensor]:
        rng, i = random_generator(*self.key, "target", position), self._index("target", position, len(self.target))
        return {"x_t": self._geometry(rng, position, self.target.image(i))[0]}

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker process: the last bits of the jitter's sums depend on it
        positions = [step * self.batch + self.first + k for k in range(self.count)]
        images = [(self._sources(p) if self.source else {}) | (self._target(p) if self.target else {}) for p in positions]
        torch.set_num_threads(threads)
        return {name: torch.stack([some[name] for some in images]) for name in images[0]}

    def loader(self, start: int, steps: int, workers: int) -> torch.utils.data.DataLoader:
        """Batches of steps start ... steps - 1, in order, two read ahead by each of the worker processes."""
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=range(start, steps), num_workers=workers,
                                           worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available())


def ignore_signals(_worker: int) -> None:
    """A loader's processes end with the training process, which first finishes its step; see runtime.Run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@torch.inference_mode()
def predictions(predict, read, count: int, batch: int, device):
    """Yields (i, logits (C, h, w)) of each of `count` images. Several processes take turns, batch by batch.

    predict(x: (N, 3, h, w) in [-1, 1]) -> each image's logits; read(i) -> (3, h, w) uint8.
    """
    for first in tqdm(range(0, count, batch)[rank() :: world()], "predict", mininterval=1, disable=rank() > 0):
        some = range(first, min(first + batch, count))
        yield from zip(some, predict(to_float(torch.stack([read(i) for i in some]), device)), strict=True)


def measure(predict, scenes: Scenes, batch: int, device, seen=None) -> Tensor:
    """Confusion matrix (C, C) int64 over all scenes, each at its label's own size. predict: as in `predictions`.

    seen(i, prediction (H, W)), where given, is called for each image of this process.
    """
    total = torch.zeros(len(scenes.classes), len(scenes.classes), dtype=torch.int64, device=device)
    for i, z in predictions(predict, scenes.image, len(scenes), batch, device):
        label = torch.from_numpy(scenes.native_label(i)).to(device)
        prediction = classify(z, label.shape)
        total += confusion_matrix(label, prediction, len(scenes.classes))
        if seen:
            seen(i, prediction)
    return all_reduce(total).cpu()


def classify(z: Tensor, size) -> Tensor:
    """z: (C, h, w) logits -> (H, W) uint8 train ids: resized bilinearly (align_corners=False), then the argmax."""
    return F.interpolate(z[None].float(), tuple(size), mode="bilinear", align_corners=False)[0].argmax(0).byte()


def to_float(x: Tensor, device) -> Tensor:
    """(N, 3, h, w) uint8 -> float32 in [-1, 1] on the device, channels last."""
    return x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def colourise(ids, classes: dict) -> np.ndarray:
    """(H, W) train ids -> (H, W, 3) uint8 in the class colours; IGNORE is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = list(classes.values())
    return palette[np.asarray(ids, np.uint8)]
