"""Facts on the published data sets, apart from datasets.yaml, and tiny data sets in their layouts."""

from pathlib import Path

import cv2
import numpy as np
from cityscapesscripts.helpers.labels import labels as CITYSCAPES
from conftest import rgba_label, save_image
from PIL import Image

from losses import IGNORE

_, OFFICIAL = IGNORE, sorted((c for c in CITYSCAPES if not c.ignoreInEval), key=lambda c: c.trainId)
C19 = {c.id: IGNORE for c in CITYSCAPES if c.id >= 0} | {34: IGNORE} | {c.id: c.name for c in OFFICIAL}
C16 = {i: IGNORE if name in ("terrain", "truck", "train") else name for i, name in C19.items()}
TABLES = {  # (data set, class list): {raw id: class, or IGNORE}; in a list, the raw id is the place
    ("cityscapes", "cityscapes19"): C19, ("cityscapes", "cityscapes16"): C16,
    ("gta5", "cityscapes19"): C19, ("gta5", "cityscapes16"): C16,
    ("synthia", "cityscapes16"): [
        _, "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign",
        "person", "bicycle", "motorcycle", _, _, "traffic light", _, "rider", _, "bus", _, "wall", _],
    ("carla", "camvid10"): [
        _, "building", "fence", _, "pedestrian", "pole", "road", "road", "pavement", "tree", "car",
        "building", "sign", "sky", _, "building", _, "fence", "sign", _, _, _, "tree"],
    ("camvid", "camvid10"): [
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", _, _],
    ("camvid", "idd_camvid7"): [
        "sky", "far object", "roadside object", "drivable", "non-drivable", "far object", "roadside object",
        "roadside object", "vehicle", "living thing", "living thing", _],
    ("idd_lite", "idd_camvid7"): {255: _} | dict(enumerate(
        ["drivable", "non-drivable", "living thing", "vehicle", "roadside object", "far object", "sky"])),
}  # fmt: skip
TABLES = {key: some if isinstance(some, dict) else dict(enumerate(some)) for key, some in TABLES.items()}
PAIRS = {("gta5", "cityscapes"): "cityscapes19", ("synthia", "cityscapes"): "cityscapes16",
         ("carla", "camvid"): "camvid10", ("idd_lite", "camvid"): "idd_camvid7"}  # fmt: skip


def save_palette(path: Path, ids) -> None:
    """A palette PNG whose colours are not the ids: id i is (37 i + 11, 5 i, 255 - i)."""
    image = Image.fromarray(np.asarray(ids, np.uint8))
    image.putpalette([v % 256 for i in range(256) for v in (37 * i + 11, 5 * i, 255 - i)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_red16(path: Path, ids) -> None:
    """16 bits per channel: the id in red, an instance's number in green, as SYNTHIA has it."""
    ids = np.asarray(ids, np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.stack([0 * ids, np.full_like(ids, 40000), ids], -1))  # blue, green, red


LAYOUTS = {  # image and label of frame i, two frames a group g; how a label is written
    "gta5": ("images/{i:05d}.png", "labels/{i:05d}.png", save_palette),
    "synthia": ("RGB/{i:07d}.png", "GT/LABELS/{i:07d}.png", save_red16),
    "cityscapes": ("leftImg8bit/{split}/city{g}/city{g}_{i:06d}_000019_leftImg8bit.png",
                   "gtFine/{split}/city{g}/city{g}_{i:06d}_000019_gtFine_labelIds.png", save_image),
    "carla": ("CameraRGB/{g}{i:03d}.jpg", "CameraMask/{g}{i:03d}.png",
              lambda path, ids: save_image(path, rgba_label(ids))),
    "camvid": ("{split}/f{i:03d}.png", "{split}annot/f{i:03d}.png", save_image),
    "idd_lite": ("leftImg8bit/train/{g}/{i:03d}_image.jpg", "gtFine/train/{g}/{i:03d}_label.png", save_image),
}  # fmt: skip


def frame_ids(dataset: str, i: int) -> np.ndarray:
    """(8, 2 n) every known id of a data set as a stripe of two columns, turned by i."""
    known = sorted({raw for (name, _), some in TABLES.items() if name == dataset for raw in some})
    return np.tile(np.roll(known, i).repeat(2), (8, 1))


def make_published(root: Path, dataset: str) -> None:
    """14 frames of each split in a data set's published layout; an image's colour is 8 times its frame."""
    image, label, write = LAYOUTS[dataset]
    for split in ("train", "val") if "{split}" in image else ("train",):
        for i in range(14):
            where, ids = {"i": i, "g": i // 2, "split": split}, frame_ids(dataset, i)
            save_image(root / image.format(**where), np.full((*ids.shape, 3), 8 * i))
            write(root / label.format(**where), ids)
