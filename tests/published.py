"""Tiny data sets in the layouts in which the real ones are published, for test_datasets.py and test_check.py."""

import struct
import zlib
from pathlib import Path

import numpy as np
from conftest import make_camvid, make_carla, save_image
from PIL import Image


def write_png(path: Path, width: int, height: int, depth: int, colour: int, rows: bytes) -> Path:
    """A PNG in a depth that Pillow does not write. rows: a zero (no filter) and the packed samples of each row."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_png16(path: Path, array) -> Path:
    """Writes (H, W), (H, W, 3) or (H, W, 4) uint16 as a PNG of 16 bits per channel."""
    array = np.asarray(array, ">u2")
    colour = 0 if array.ndim == 2 else {3: 2, 4: 6}[array.shape[2]]
    return write_png(path, array.shape[1], array.shape[0], 16, colour, b"".join(b"\0" + row.tobytes() for row in array))


def save_palette(path: Path, ids) -> Path:
    """Writes ids as a palette PNG whose colours are not the ids."""
    image = Image.fromarray(np.asarray(ids, np.uint8))
    image.putpalette([(37 * i + 11) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def stripes(ids, size=(24, 36)) -> np.ndarray:
    """(h, w) with the ids as vertical stripes of equal width, in their order."""
    return np.broadcast_to(np.asarray(ids)[np.arange(size[1]) * len(ids) // size[1]], size)


def picture(ids) -> np.ndarray:
    """(h, w, 3) uint8 whose red channel says which id is below each pixel."""
    ids = np.asarray(ids).astype(np.uint8)
    return np.stack([ids * 7, 255 - ids, ids], -1)


CITYSCAPES_ROW = (7, 8, 11, 21, 23, 26, 0, 24)


def make_gta5(root: Path, count=8) -> Path:
    """Palette labels of Cityscapes ids; the last frame alone holds id 34, the licence plate."""
    for i in range(1, count + 1):
        ids = stripes(CITYSCAPES_ROW[:-1] + ((34,) if i == count else (24,)))
        save_image(root / f"images/{i:05d}.png", picture(ids))
        save_palette(root / f"labels/{i:05d}.png", ids)
    return root


def make_synthia(root: Path, count=8) -> Path:
    """16-bit RGB labels: the id in the first channel, an instance number in the second, as published."""
    for i in range(count):
        ids = stripes((3, 4, 2, 6, 1, 8, 0, 22))
        save_image(root / f"RGB/{i:07d}.png", picture(ids))
        save_png16(root / f"GT/LABELS/{i:07d}.png", np.stack([ids, np.full_like(ids, 40000 + i), 0 * ids], -1))
    return root


def make_cityscapes(root: Path, train_labels=False) -> Path:
    """Two cities with train images, one with val images; labels for val, and for train only if asked for."""
    for split, city, frames in (("train", "aachen", 3), ("train", "bonn", 2), ("val", "lindau", 3)):
        for i in range(frames):
            stem, ids = f"{city}_{i:06d}_000019", stripes(CITYSCAPES_ROW[i:] + CITYSCAPES_ROW[:i])
            save_image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", picture(ids))
            if split == "val" or train_labels:
                for kind in ("labelIds", "instanceIds", "color"):  # only the first holds what is read
                    shown = ids if kind == "labelIds" else np.full_like(ids, 99)
                    save_image(root / f"gtFine/{split}/{city}/{stem}_gtFine_{kind}.png", shown)
    return root


def make_idd_lite(root: Path, sequences=5) -> Path:
    """Two frames for each sequence, ids 0 to 6 and 255."""
    for s in range(sequences):
        for i in (1, 2):
            ids = stripes((0, 1, 2, 3, 4, 5, 6, 255))
            save_image(root / f"leftImg8bit/train/{s}/{s}0{i}_image.jpg", picture(ids))
            save_image(root / f"gtFine/train/{s}/{s}0{i}_label.png", ids)
    return root


MAKERS = {"gta5": make_gta5, "synthia": make_synthia, "cityscapes": make_cityscapes, "idd_lite": make_idd_lite,
          "carla": make_carla, "camvid": make_camvid}  # fmt: skip
PAIRS = {("gta5", "cityscapes"): "cityscapes19", ("synthia", "cityscapes"): "cityscapes16",
         ("idd_lite", "camvid"): "idd_camvid7", ("carla", "camvid"): "camvid10"}  # fmt: skip


def pair_items(root: Path, source: str, target: str) -> list[str]:
    """The four overrides that select a pair of published data sets, each below `root` under its own name."""
    return [f"source.dataset={source}", f"source.root={root / source}", f"target.dataset={target}",
            f"target.root={root / target}"]  # fmt: skip
