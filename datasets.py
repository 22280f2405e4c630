"""Data sets as declarative tables, and the batches that the training stages draw. (`streets` is drawn in streets.py.)

Adding a data set is adding a `Table` to TABLES: where images are, where an image's label is, how an id is read from
it, and which ids make up which class of which class list. Source and target are read onto one common class list.
Train ids are positions in that list; everything that is known but not in it is IGNORE; an unknown id is an error.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from losses import IGNORE
from runtime import UserError, random_generator
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
}  # fmt: skip
CLASS_LISTS["cityscapes16"] = {  # those that SYNTHIA has, too
    name: colour for name, colour in CLASS_LISTS["cityscapes19"].items() if name not in ("terrain", "truck", "train")
}
CITYSCAPES_IDS = dict(zip(CLASS_LISTS["cityscapes19"], [[i] for i in (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)],
                          strict=True))


# ----------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """One data set.

    images: split -> glob pattern below the root; the split "all" is divided into train and val by `group`.
    label: (regular expression, replacement) that turns an image's path below the root into its label's.
    read: "index" (value of a one-channel or palette PNG) or "red" (red channel of an RGB or RGBA PNG).
    known: every id that the data set's labels may hold.
    ids: class list -> {class: ids}; known ids in none of its classes are IGNORE.
    group: names in order -> a group number for each; every VAL_EVERY-th group is the held-out split, whole, because
        neighbouring frames of one drive are near-duplicates.
    """

    images: dict
    label: tuple
    read: str
    known: tuple
    ids: dict
    group: object = None


VAL_EVERY = 7  # of the groups of a data set without a val split, the 4th, 11th, 18th, ... are held out


def groups_by_gap(names: list[str], gap: int = 100) -> list[int]:
    """Groups of frames with numeric names: a step of more than `gap` between neighbours starts a new one."""
    numbers = [int(re.sub(r"\D", "", Path(name).stem) or 0) for name in names]
    return list(np.cumsum([False] + [b - a > gap for a, b in zip(numbers, numbers[1:], strict=False)]))


TABLES = {
    "carla": Table(
        images={"all": "CameraRGB/*"},
        label=(r"^CameraRGB/(.+)\.\w+$", r"CameraMask/\1.png"),
        read="red",
        known=tuple(range(23)),
        ids={"camvid10": {
            "sky": [13], "building": [1, 11, 15], "pole": [5], "road": [6, 7], "pavement": [8], "tree": [9, 22],
            "sign": [12, 18], "fence": [2, 17], "car": [10], "pedestrian": [4],
        }},
        group=groups_by_gap,
    ),
    "camvid": Table(
        images={"train": "train/*", "val": "val/*", "test": "test/*"},
        label=(r"^(train|val|test)/(.+)\.\w+$", r"\1annot/\2.png"),
        read="index",
        known=tuple(range(12)),
        ids={"camvid10": {name: [i] for i, name in enumerate(CLASS_LISTS["camvid10"])}},  # 10 bicyclist, 11 void
    ),
    "cityscapes": Table(
        images={split: f"leftImg8bit/{split}/*/*_leftImg8bit.png" for split in ("train", "val", "test")},
        label=(r"^leftImg8bit/(.+)_leftImg8bit\.png$", r"gtFine/\1_gtFine_labelIds.png"),
        read="index",
        known=tuple(range(34)),
        ids={"cityscapes19": CITYSCAPES_IDS,
             "cityscapes16": {name: CITYSCAPES_IDS[name] for name in CLASS_LISTS["cityscapes16"]}},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One image: its name (path below the split's folder, no suffix), and where image and label are read from."""

    name: str
    image: str
    label: str | None


STREETS_VAL = 100  # scenes in each domain's val split


def list_samples(cfg, role: str, split: str, labels: bool) -> list[Sample]:
    """The samples of `role` ("source" or "target") and `split` ("train" or "val"), in a fixed order.

    labels: whether label files are looked for. Raises UserError for an unknown data set, a missing folder, an empty
    split and images without label.
    """
    part = getattr(cfg, role)
    if part.dataset == "streets":
        count = STREETS_VAL if split == "val" else part.images or 500
        return [Sample(f"{i:06d}", f"streets:{role}/{split}/{i}", f"streets:{role}/{split}/{i}" if labels else None)
                for i in range(count)]
    if part.dataset not in TABLES:
        raise UserError(f"{role}.dataset={part.dataset}: unknown; known are streets, {', '.join(TABLES)}")
    table = TABLES[part.dataset]
    if part.root is None or not Path(part.root).is_dir():
        raise UserError(f"{role}.root={part.root}: no such folder; set it to where {part.dataset} lies (README: Data)")
    root = Path(part.root)
    pattern = table.images.get(split) or table.images.get("all")
    if pattern is None:
        raise UserError(f"{role}.dataset={part.dataset}: has no {split} split")
    images = sorted(p for p in root.glob(pattern) if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if split not in table.images and images:
        groups = table.group([p.name for p in images])
        images = [p for p, g in zip(images, groups, strict=True) if (g % VAL_EVERY == 3) == (split == "val")]
    if not images:
        raise UserError(f"{role}.root={part.root}: no {split} images of {part.dataset} ({pattern}) in it (README: Data)")
    if split == "train":
        images = images[: part.images]
    base = root / pattern.split("*")[0]
    samples, missing = [], []
    for path in images:
        label = None
        if labels:
            label = root / re.sub(*table.label, path.relative_to(root).as_posix())
            if not label.is_file():
                missing.append(label)
        samples.append(Sample(path.relative_to(base).with_suffix("").as_posix(), str(path), label and str(label)))
    if missing:
        raise UserError(f"{missing[0]}: no such label, for an image that exists ({len(missing)} of {len(images)} are missing)")
    return samples


def class_list(cfg) -> tuple[str, dict]:
    """The (name, {class: colour}) that source and target share. Raises UserError where there is none."""
    offers = []
    for role in ("source", "target"):
        name = getattr(cfg, role).dataset
        if name != "streets" and name not in TABLES:
            raise UserError(f"{role}.dataset={name}: unknown; known are streets, {', '.join(TABLES)}")
        offers.append(["streets"] if name == "streets" else list(TABLES[name].ids))
    shared = [name for name in offers[0] if name in offers[1]]
    if cfg.classes != "auto":
        if cfg.classes not in shared:
            raise UserError(f"classes={cfg.classes}: {cfg.source.dataset} and {cfg.target.dataset} share {shared or 'none'}")
        shared = [cfg.classes]
    if not shared:
        raise UserError(f"source.dataset={cfg.source.dataset} ({', '.join(offers[0])}) and target.dataset="
                        f"{cfg.target.dataset} ({', '.join(offers[1])}) have no class list in common")
    return shared[0], CLASS_LISTS[shared[0]]


def train_id_table(dataset: str, classes: str) -> np.ndarray:
    """(256,) int16: raw id -> train id, IGNORE for known ids outside the class list, -1 for unknown ones."""
    table = np.full(256, -1, np.int16)
    if dataset == "streets":
        table[: len(CLASS_LISTS["streets"])] = np.arange(len(CLASS_LISTS["streets"]))
        return table
    table[list(TABLES[dataset].known)] = IGNORE
    for train_id, name in enumerate(CLASS_LISTS[classes]):
        table[TABLES[dataset].ids[classes].get(name, [])] = train_id
    return table


# ---------------------------------------------------------------------------------------------------------- reading


@lru_cache(maxsize=8)
def _scene(address: str):
    domain, split, index = address.removeprefix("streets:").split("/")
    return streets_scene(domain, split, int(index))


def _open(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace the file") from None


def read_image(path: str) -> Image.Image:
    """An image file, or a `streets:DOMAIN/SPLIT/INDEX` address, as RGB. Raises UserError that names the file."""
    return Image.fromarray(_scene(path)[0]) if path.startswith("streets:") else _open(path).convert("RGB")


def read_label(path: str, read: str, table: np.ndarray) -> np.ndarray:
    """A label file (or address) as (H, W) uint8 train ids. Raises UserError for an id that the table does not know."""
    if path.startswith("streets:"):
        raw = _scene(path)[1]
    else:
        image = _open(path)
        raw = np.asarray(image)
        if read == "red" and raw.ndim == 3:
            raw = raw[..., 0]
        if raw.ndim != 2 or raw.dtype != np.uint8:
            raise UserError(f"{path}: a label of mode {image.mode} where ids are read by '{read}' of 8 bits")
    if raw.dtype == np.uint8:  # a table of bytes over bytes: a third of the time of indexing; 254 stands for an unknown id
        lut = np.where(table < 0, 254, table).astype(np.uint8).tobytes()
        train_ids = np.frombuffer(bytearray(raw).translate(lut), np.uint8).reshape(raw.shape)
        if not (train_ids == 254).any():
            return train_ids
    ids = table[raw]
    if (ids < 0).any():
        unknown, pixels = np.unique(raw[ids < 0], return_counts=True)
        raise UserError(f"{path}: unknown label id {unknown[0]} ({pixels[0]} pixels)"
                        + (f", and {len(unknown) - 1} more ids" if len(unknown) > 1 else "")
                        + "; add it to the data set's table in datasets.py")
    return ids.astype(np.uint8)


CACHE_BYTES = 2 << 30  # resized images that one data set of one process keeps, so that it decodes each file once


class Scenes:
    """The images of one domain and split, resized, with labels as train ids where asked for.

    role: "source" or "target"; split: "train" or "val"; labels: without it no label file is looked for or opened.
    At the start a sample of the files is read, so that what is wrong with all of them stops before training.
    """

    def __init__(self, cfg, role: str, split: str, labels: bool):
        part = getattr(cfg, role)
        self.size, self.dataset = tuple(part.size), part.dataset
        self.class_list, self.classes = class_list(cfg)
        self.table = train_id_table(part.dataset, self.class_list)
        self.read = "index" if part.dataset == "streets" else TABLES[part.dataset].read
        self.samples = list_samples(cfg, role, split, labels)
        self._cache, self._room = {}, CACHE_BYTES
        self._check(16)

    def _check(self, count: int) -> None:
        for i in np.unique(np.linspace(0, len(self) - 1, count).astype(int)):
            sample = self.samples[i]
            image = read_image(sample.image)
            if sample.label:
                label = self.native_label(i)
                if label.shape != image.size[::-1]:
                    raise UserError(f"{sample.image}: {image.width}x{image.height} pixels, but its label "
                                    f"{sample.label} has {label.shape[1]}x{label.shape[0]}")

    def __len__(self) -> int:
        return len(self.samples)

    def _cached(self, key, make) -> Tensor:
        value = self._cache.get(key)
        if value is None:
            value = make()
            if value.nbytes <= self._room:
                self._room -= value.nbytes
                self._cache[key] = value
        return value

    def image(self, i: int) -> Tensor:
        """(3, h, w) uint8, resized with an antialiasing bilinear filter."""
        def make():
            image = read_image(self.samples[i].image)
            if image.size != self.size[::-1]:
                image = image.resize(self.size[::-1], Image.BILINEAR)
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
        return self._cached(("image", i), make)

    def native_label(self, i: int) -> np.ndarray:
        """(H, W) uint8 train ids at the label's own resolution."""
        return read_label(self.samples[i].label, self.read, self.table)

    def label(self, i: int) -> Tensor:
        """(h, w) uint8 train ids, resized by nearest neighbour."""
        def make():
            label = Image.fromarray(self.native_label(i))
            return torch.from_numpy(np.asarray(label.resize(self.size[::-1], Image.NEAREST)).copy())
        return self._cached(("label", i), make)


class Augmented(Scenes):
    """The generated images of a manifest: image s * n + i is source image i in its s-th style. They have no labels of
    their own; the source's label i is theirs."""

    def __init__(self, source: Scenes, files: list[Path]):
        self.size, self._cache, self._room = source.size, {}, CACHE_BYTES
        self.samples = [Sample(p.stem, str(p), None) for p in files]
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


class Batches(torch.utils.data.Dataset):
    """Item `step` (0, 1, ...) is the whole batch of that step, a function of (seed, stage, step) alone.

    So neither the number of loader workers nor a resumed run changes what is drawn. Every domain goes through its
    images in a new random order each epoch. The batch is a dictionary of uint8 tensors:
        x_s (N, 3, h, w), y_s (N, h, w)   source images and labels
        x_g (N, 3, h, w)                  an augmented version of the same source images, flipped and cropped with them
        x_t (N, 3, h, w)                  target images
    """

    def __init__(self, cfg, stage: str, batch: int, crop, source: Scenes = None, augmented: Scenes = None,
                 target: Scenes = None, jitter: float = 0.0):
        self.seed, self.stage, self.batch, self.crop, self.flip = cfg.seed, stage, batch, crop, cfg.flip
        self.source, self.augmented, self.target, self.jitter = source, augmented, target, jitter
        for scenes in (source, target):
            if crop and scenes is not None and (crop[0] > scenes.size[0] or crop[1] > scenes.size[1]):
                raise UserError(f"{stage}: crop {list(crop)} is larger than the image size {list(scenes.size)}")

    def _index(self, domain: str, position: int, n: int) -> int:
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
        for position in range(step * self.batch, (step + 1) * self.batch):
            if self.source is not None:
                rng = random_generator(self.seed, self.stage, "source", position)
                i = self._index("source", position, len(self.source))
                names, tensors = ["x_s", "y_s"], [self.source.image(i), self.source.label(i)]
                if self.augmented is not None:
                    style = int(rng.integers(len(self.augmented) // len(self.source)))
                    names.append("x_g")
                    tensors.append(self.augmented.image(style * len(self.source) + i))
                tensors = self._geometry(rng, *tensors)
                if self.jitter:
                    tensors[0] = (photometric_jitter(tensors[0] / 255, self.jitter, rng) * 255).round().byte()
                for name, tensor in zip(names, tensors, strict=True):
                    batch.setdefault(name, []).append(tensor)
            if self.target is not None:
                rng = random_generator(self.seed, self.stage, "target", position)
                x_t = self.target.image(self._index("target", position, len(self.target)))
                batch.setdefault("x_t", []).append(self._geometry(rng, x_t)[0])
        return {name: torch.stack(tensors) for name, tensors in batch.items()}

    def loader(self, start: int, steps: int, workers: int):
        """Batches of steps start ... steps - 1, in order."""
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=range(start, steps), num_workers=workers,
                                           persistent_workers=False, pin_memory=torch.cuda.is_available())


def to_float(x: Tensor, device) -> Tensor:
    """(N, 3, h, w) uint8 -> float32 in [-1, 1] on the device, channels last."""
    return (x.to(device, non_blocking=True).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def colourise(ids, classes: dict) -> np.ndarray:
    """(H, W) train ids -> (H, W, 3) uint8 in the class colours; IGNORE is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = list(classes.values())
    return palette[np.asarray(ids, np.uint8)]
