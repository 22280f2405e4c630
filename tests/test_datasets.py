"""Data: published facts, pairs, readers, batches, check.py; what is wrong ends in a line that names it."""

import base64
import hashlib
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, make_cfg, rgba_label, save_image, shell
from PIL import Image
from published import OFFICIAL, PAIRS, TABLES, frame_ids, make_published, save_palette, save_red16

import datasets
import pairs
from datasets import Batches, Scenes, find_samples, photometric_jitter
from losses import IGNORE
from runtime import UserError, random_generator, read_yaml, run_main
from streets import streets_scene

LABEL = np.tile([0, 0, 0, 0, 1, 1, 2, 9], (12, 2))  # raw ids
IDS = {"a": 0, "b": [1, 2], "ignore": 9}
PAIR = ["im/*", "lb/*.png"]
LISTS = pairs.published()["class_lists"]


def own(root, /, **overrides):
    """A config whose source and target are the folder that `make_own` fills; `files=...` is source.files."""
    part = {"dataset": "folder", "root": root, "files": dict.fromkeys(("train", "val"), PAIR), "ids": IDS,
            "size": [12, 16], "read": "index", "exclude": []}  # fmt: skip
    base = {f"{role}__{key}": value for role in ("source", "target") for key, value in part.items()}
    changes = {f"source__{key}" if key in part else key: value for key, value in overrides.items()}
    return make_cfg(**({"class_colours": {"a": [255, 0, 0], "b": [0, 0, 255]}} | base | changes))


def make_own(root, count=4):
    """im/000.png ... with noise in them, and lb/000.png ... with LABEL."""
    for i in range(count):
        save_image(root / f"im/{i:03d}.png", np.random.default_rng(i).integers(0, 256, (12, 16, 3)))
        save_image(root / f"lb/{i:03d}.png", LABEL)
    return root


def source(root, /, **overrides):
    return Scenes(own(root, **overrides), "source", "train", labels=True)


def train_ids(dataset, name):
    """{raw id: train id} as it has to be."""
    return {raw: c if c == IGNORE else [*LISTS[name]].index(c) for raw, c in TABLES[dataset, name].items()}


@pytest.mark.parametrize("dataset, name", TABLES)
def test_published_ids_agree_with_their_sources(dataset, name):
    """One wrong entry trains a class on another's pixels; so does another order of classes."""
    cfg = make_cfg(source__dataset=dataset, target__dataset=dataset, classes=name)
    table = pairs.id_table(cfg, "source")
    assert {raw: int(v) for raw, v in enumerate(table) if v >= 0} == train_ids(dataset, name)
    if dataset == "cityscapes":
        lost = ("terrain", "truck", "train") if name == "cityscapes16" else ()
        assert [*LISTS[name].items()] == [(c.name, [*c.color]) for c in OFFICIAL if c.name not in lost]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_published_layouts_are_read_and_held_out_by_group(tmp_path, pair):
    """Every id goes through a file as published; neighbouring frames, near-duplicates, are not separated."""
    overrides, split_of, frames = {}, {}, []
    for role, name in zip(("source", "target"), pair, strict=True):
        make_published(tmp_path / name, name)
        overrides |= {f"{role}__dataset": name, f"{role}__root": tmp_path / name}
    cfg = make_cfg(**overrides)
    assert pairs.class_list(cfg)[0] == PAIRS[pair]
    for role, split in (("source", "train"), ("source", "val"), ("target", "val")):
        scenes, name = Scenes(cfg, role, split, labels=True), overrides[f"{role}__dataset"]
        for k in range(len(scenes)):
            i = round(int(scenes.image(k)[0, 0, 0]) / 8)
            expected = np.vectorize(train_ids(name, PAIRS[pair]).get)(frame_ids(name, i))
            assert np.array_equal(scenes.native_label(k), expected)
            frames.append(i)
            assert split_of.setdefault((role, i // 2), split) == split
    assert sorted(frames) == sorted([*range(14)] * 2) and len(Scenes(cfg, "target", "train", False)) == 14


def test_blocks_in_a_config_or_in_the_file_read_like_the_built_in_ones(tmp_path, monkeypatch):
    """Own data takes one block and no code: wherever it stands, one parser reads it; a config's words win."""
    make_published(tmp_path, "camvid")
    block, path = pairs.published()["camvid"], tmp_path / "datasets.yaml"
    path.write_text(yaml.safe_dump(pairs.published() | {"mine": block}, sort_keys=False))
    tree, files, ids = read_yaml(path), block["files"], block["ids"]["camvid10"]
    monkeypatch.setattr(pairs, "published", lambda: tree)

    def read(split, **way):
        way = {f"target__{key}": value for key, value in way.items()}
        cfg = make_cfg(source__dataset="carla", classes="camvid10", target__root=tmp_path, **way)
        scenes = Scenes(cfg, "target", split, labels=True)
        return [(*scenes.samples[i], scenes.native_label(i).tolist()) for i in range(len(scenes))]

    for split in ("train", "val"):
        ways = [{}, {"ids": ids}, {"files": files, "ids": ids}]
        first, *others = [read(split, dataset=name, **way) for name in ("camvid", "mine") for way in ways]
        others.append(read(split, dataset="folder", files=files, ids=ids))
        assert len(first) == 14 and all(other == first for other in others)
    files, ids = {"train": ["val/*3.png", "valannot/*3.png"]}, {"road": 0, "ignore": [*range(1, 12)]}
    changed = read("train", dataset="camvid", files=files, ids=ids)
    assert [os.path.basename(one[1]) for one in changed] == ["f003.png"]  # 013 is held out
    assert np.array_equal(changed[0][3], np.where(frame_ids("camvid", 3) == 0, 3, IGNORE))


def test_pairs_are_what_the_wildcards_stand_for(tmp_path):
    """Label beside image, folders that are links, strays: each is paired or named, or training is on less."""
    for name in ("a/0", "a/1", "b/0", "b/1"):
        save_image(tmp_path / f"disk/{name}.png", np.zeros((12, 16, 3)))
        save_image(tmp_path / f"disk/{name}_ids.png", LABEL)
    (tmp_path / "disk/a/7.webp").touch()
    (tmp_path / "root/day").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"root/day/{name}").symlink_to(tmp_path / f"disk/{name}")
    files = dict.fromkeys(("train", "val"), ["day/**/*.png", "day/**/*_ids.png"])

    def find(*names):
        return find_samples(own(tmp_path / "root", files=files, exclude=[*names]), "source", "train", True)

    samples, missed = find()
    assert [s.name for s in samples] == ["a/0", "a/1", "b/0", "b/1"]
    assert all(s.label == s.image.replace(".png", "_ids.png") for s in samples)
    assert missed == ["day/a/7.webp"]
    (tmp_path / "disk/a/1_ids.png").unlink()
    (tmp_path / "disk/b/0.png").unlink()
    with pytest.raises(UserError, match=r'day/a/1_ids\.png: .*No such.*"a/1" in source.exclude \(2 problems'):
        source(tmp_path / "root", files=files)
    with pytest.raises(UserError, match=r'day/b/0\.png: .*No such.*"b/0" in source.exclude \(1 problems'):
        source(tmp_path / "root", files=files, exclude=["a/1"])
    assert [len(some) for some in find("a/1", "b/0")] == [2, 1]


def test_two_files_of_one_name_and_unreadable_folders_are_errors(tmp_path, monkeypatch):
    """a.jpg and a.png would share a label, and a folder without permission would be an empty one."""
    save_image(make_own(tmp_path) / "im/002.jpg", LABEL)
    with pytest.raises(UserError, match=r"im/002\.\w+ has the same name"):
        source(tmp_path)

    def refuse(path, scandir=os.scandir):  # even to root
        if str(path).endswith("im"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"im: cannot be read \(Permission denied\)"):
        source(tmp_path)


BAD_BLOCKS = [  # (overrides, what the one line has to hold)
    ({"dataset": "gta"}, "source.dataset=gta: unknown; known are streets, carla"),
    ({"dataset": "streets", "files": {}, "ids": {}}, "streets and folder share no class list"),
    ({"classes": "camvid10"}, "classes=camvid10: folder and folder share own"),
    ({"class_colours": {}}, "classes=auto: source.ids needs class_colours"),
    ({"class_colours": {0: [0, 0, 0]}}, "class_colours: 0 is no class name"),
    ({"class_colours": {"a": [0, 0, 0], "ignore": [9, 9, 9]}}, "class_colours: 'ignore' is no class name"),
    ({"files": {"trian": PAIR}}, "source.files: trian: "),
    ({"files": {"train": None}}, "source.files: train: "),
    ({"files": {"train": ["im/*.JPG", "lb/*.JPG"]}}, "but there is im/000.png"),
    ({"files": {"train": ["im/*", 3]}}, "source.files: train"),
    ({"files": {"train": ["im/*", "lb/*/*"]}}, "source.files: train: ['im/*', 'lb/*/*']: must be"),
    ({"files": {"train": ["/tmp/*", "/tmp/*.png"]}}, "source.files"),
    ({"root": "/none"}, "source.root=/none: no such folder"),
    ({"ids": {}}, "source.files: train: "),
    ({"ids": {"a": 0, "b": [1, 0]}}, "source.ids: b: 0 is no id read by 'index' (0 to 255), or another"),
    ({"ids": {"a": 256}}, "source.ids: a: 256 is no id"),
    ({"ids": {"c": 0}}, "source.ids: 'c' is not a class (a, b)"),
    ({"ids": {"a": 0}, "read": "rgb"}, "source.ids: a: 0 is no id read by 'rgb' ([R, G, B])"),
    ({"ids": {"a": []}, "read": "rgb"}, "source.ids: a"),
    ({"exclude": ["000", "001", "002", "003"]}, "source."),
]


@pytest.mark.parametrize("overrides, words", BAD_BLOCKS, ids=lambda v: str(v)[:50])
def test_wrong_blocks_are_one_line_that_names_the_key(tmp_path, overrides, words):
    """Patterns and class tables are typed by hand: what is wrong must be found from the message alone."""
    with pytest.raises(UserError) as error:
        source(make_own(tmp_path), **overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read, ids", [
    ("index", IDS), ("red", {"a": 11, "b": [48, 85], "ignore": 88}),
    ("rgb", {"a": [11, 0, 255], "b": [[48, 5, 254], [85, 10, 253]], "ignore": [88, 45, 246]}),
])  # fmt: skip
def test_a_palette_label_is_read_as_the_config_says(tmp_path, read, ids):
    """A palette has an index and a colour for each pixel: `red` and `rgb` mean the colour."""
    save_palette(make_own(tmp_path, 1) / "lb/000.png", LABEL)
    got = source(tmp_path, read=read, ids=ids).native_label(0)
    assert got[0].tolist() == [0, 0, 0, 0, 1, 1, 1, IGNORE] * 2


BLACK = np.zeros((60, 60, 3))
GREY4 = b"iVBORw0KGgoAAAANSUhEUgAAABAAAAAMBAAAAACLfI9cAAAADElEQVR42mNgoB8AAABsAAHuqJaUAAAAAElFTkSuQmCC"

FAULTS = [  # (folder, how labels are read, what is done to its first file, what the one line has to hold)
    ("im", "index", lambda p: save_red16(p, LABEL), "16 bits per channel"),
    ("im", "index", lambda p: p.write_bytes(p.read_bytes()[:-60]), "not a readable PNG or JPEG"),
    ("im", "index", lambda p: p.write_bytes(b""), "not a readable PNG or JPEG"),
    ("im", "index", lambda p: Image.new("RGB", (16, 12)).save(p, "WEBP"), "not a readable PNG or JPEG"),
    ("im", "index", lambda p: save_image(p, BLACK), "exceeds limit of 3400 pixels"),
    ("im", "index", lambda p: save_image(p, BLACK[:12, :17]), "(17, 12) pixels, but its label"),
    ("lb", "index", lambda p: p.write_bytes(base64.b64decode(GREY4)), "mode L, 4 bits: no label to read by"),
    ("lb", "index", lambda p: Image.new("L", (16, 12)).save(p, "JPEG"), "mode JPEG"),
    ("lb", "index", lambda p: save_image(p, BLACK[:12, :16]), "mode RGB, 8 bits: no label to read by"),
    ("lb", "red", lambda p: save_red16(p, LABEL), "16 bits: no label to read by 'red'"),
    ("lb", "red16", lambda p: save_image(p, BLACK[:12, :16]), "8 bits: no label to read by 'red16'"),
    ("lb", "index", lambda p: save_image(p, LABEL * 20), "unknown label 20 (48 pixels), 40 (24 pixels), 180"),
    ("lb", "rgb", lambda p: save_palette(p, 0 * LABEL), "unknown label [11, 0, 255] (192 pixels)"),
]


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("folder, read, spoil, words", FAULTS, ids=[f"{f[0]} {f[3][:20]}" for f in FAULTS])
def test_a_file_that_cannot_be_used_is_named(tmp_path, monkeypatch, folder, read, spoil, words):
    """Most of these decode to numbers that are not the ids: they stop the run before training."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)
    path = make_own(tmp_path) / folder / "000.png"
    spoil(path)
    with pytest.raises(UserError) as error:
        source(tmp_path, read=read, ids={"a": [0, 0, 0]} if read == "rgb" else IDS)
    assert f"{path}: " in str(error.value) and words in str(error.value)
    assert '"000" in source.exclude' in str(error.value) and "\n" not in str(error.value)


def test_images_become_upright_rgb(tmp_path):
    """Phones store frames on their side, tools write grey or alpha: the network must see what people see."""
    upright, exif = np.zeros((12, 16, 3), np.uint8), Image.Exif()
    upright[:, :8], upright[:6], exif[0x0112] = 200, 100, 6  # to be turned clockwise
    for name in ("x.jpg", "x.png"):
        Image.fromarray(np.rot90(upright).copy()).save(tmp_path / name, exif=exif)
    save_image(tmp_path / "grey.jpg", upright[..., 0])
    save_image(tmp_path / "clear.png", np.insert(upright, 3, 0, -1))
    for path in tmp_path.iterdir():
        got = np.asarray(datasets.read_image(str(path))).astype(int)
        assert got.shape == upright.shape and np.abs(got - upright).max() < 12  # JPEG


def test_scenes_resize_image_and_label_alike_and_keep_what_fits(tmp_path, monkeypatch):
    """Two filters must keep one geometry, and how much is kept in memory may decide on speed alone."""
    ids = np.random.default_rng(0).integers(0, 2, (5, 7)).repeat(13, 0).repeat(12, 1)[:61, :83]
    for i in range(3):
        save_image(tmp_path / f"im/{i}.png", np.stack([ids * (250 - i)] * 3, -1))
        save_image(tmp_path / f"lb/{i}.png", ids)
    changes = {"size": [40, 56], "class_colours": dict.fromkeys("acb", [0, 0, 0])}  # train ids 0 and 2
    scenes = source(tmp_path, **changes)
    image, label = (Image.open(tmp_path / name) for name in ("im/1.png", "lb/1.png"))
    assert np.array_equal(scenes.image(1).permute(1, 2, 0), image.resize((56, 40), Image.BILINEAR))
    assert np.array_equal(scenes.label(1) / 2, label.resize((56, 40), Image.NEAREST))
    shift = scenes.image(1)[0].float() / 249 - scenes.label(1).float() / 2
    assert float(shift.mean().abs()) < 0.01  # half a pixel would move the mean by more
    images, read, count = [scenes.image(i) for i in range(3)], datasets.read_image, []
    monkeypatch.setattr(datasets, "CACHE_BYTES", 2 * 3 * 40 * 56)
    little = source(tmp_path, **changes)
    monkeypatch.setattr(datasets, "read_image", lambda path: count.append(path[-5]) or read(path))
    assert all(torch.equal(little.image(i), images[i]) for i in (0, 1, 2, 0, 1, 2))
    assert count == ["0", "1", "2", "2"]


def test_an_unlabelled_domain_opens_no_label(tmp_path):
    """Unsupervised means that the target's training labels are not touched: here they cannot even be read."""
    for path in (make_own(tmp_path) / "lb").iterdir():
        path.write_text("no label")
    scenes = Scenes(own(tmp_path), "target", "train", labels=False)
    assert {s.label for s in scenes.samples} == {None} and (scenes.label(0) == IGNORE).all()
    with pytest.raises(UserError, match=r"lb/000\.png"):
        Scenes(own(tmp_path), "target", "train", labels=True)


def test_few_labelled_images_are_spread_and_no_other_label_is_opened(tmp_path):
    """A row that may use N labels of the target must use N, from all drives, and no more."""
    for path in (make_own(tmp_path, 9) / "lb").iterdir():
        if path.stem in ("001", "003", "006", "008"):
            path.unlink()
        elif path.stem in ("000", "004"):
            path.write_text("no label")
    few = Scenes(own(tmp_path, target__labelled=3, target__exclude=["000", "004"]), "target", "train", True)
    assert [s.name for s in few.samples] == ["002", "005", "007"]
    few = Scenes(own(tmp_path, target__labelled=2, target__exclude=["000", "004"]), "target", "train", True)
    assert [s.name for s in few.samples] == ["002", "007"]
    with pytest.raises(UserError, match="target.labelled=6: only 5 images"):
        Scenes(own(tmp_path, target__labelled=6), "target", "train", labels=True)


def test_splits_can_be_scored_together(tmp_path):
    """val+test is val's images and then test's: what a benchmark of few images needs."""
    for name in ("019", "020"):
        save_image(make_own(tmp_path) / f"im/{name}.png", LABEL)
        save_image(tmp_path / f"lb/{name}.png", LABEL)
    files = {"train": PAIR, "val": ["im/00?.png", "lb/00?.png"], "test": ["im/019*", "lb/019*.png"]}
    both = Scenes(own(tmp_path, target__files=files), "target", "val+test", labels=True)
    assert [s.name for s in both.samples] == ["000", "001", "002", "003", "019"]


class Planted(list):
    """Scenes that say where a pixel comes from: channels (index, row, column), label 16 row + column."""

    size, pixels = (12, 16), np.array([[190, 2, 0]] * 4 + [[100, 0, 92], [192, 0, 0], [192, 0, 0]])

    def image(self, i):
        rows, columns = torch.meshgrid(*map(torch.arange, self.size), indexing="ij")
        return torch.stack([torch.full(self.size, i), rows, columns]).byte()

    def label(self, i):
        return self.image(i)[1] * 16 + self.image(i)[2]


def planted(jitter=0.0, rare=0.0, **overrides):
    domains = {"source": Planted(range(7)), "augmented": Planted(range(14)), "target": Planted(range(5)),
               "labelled": Planted(range(3))}  # fmt: skip
    cfg = make_cfg(**({"gan__batch": 3, "gan__crop": [8, 9]} | overrides))
    return Batches(cfg, "gan", domains, jitter, rare)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_batch_is_a_function_of_seed_and_step(monkeypatch):
    """Neither reading processes, nor training processes that share it, nor a resumed run change a pixel."""
    runs = [list(planted(1.0).loader(start, 6, workers)) for start, workers in ((0, 0), (0, 2), (3, 2))]
    assert all(same(a, b) for a, b in zip(runs[0] + runs[0][3:], runs[1] + runs[2], strict=True))
    assert not same(planted()[4], planted()[5]) and not same(planted()[4], planted(seed=1)[4])
    whole, parts = planted(gan__batch=6)[2], []
    monkeypatch.setattr(datasets, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(datasets, "rank", lambda rank=rank: rank)
        parts.append(planted()[2])
    assert same(whole, {key: torch.cat([part[key] for part in parts]) for key in whole})


@pytest.mark.parametrize("name, count", [("x_s", 7), ("x_t", 5)])
def test_every_image_is_drawn_once_per_epoch(name, count):
    """An epoch is a new permutation, for source and target each: a favourite would be learned by heart."""
    batches = planted()
    drawn = torch.cat([batches[step][name][:, 0, 0, 0] for step in range(35)]).tolist()
    epochs = [drawn[k : k + count] for k in range(0, 105, count)]
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) > 5


def test_flip_and_crop_are_shared():
    """y_s labels x_s and x_g pixel by pixel; D may not tell source from target by where the crop lies."""
    flips, corners, styles, batches = {"x_s": set(), "x_t": set()}, set(), set(), planted()
    for batch in map(batches.__getitem__, range(20)):
        for x_s, y_s, x_g, x_t in zip(*(batch[key] for key in ("x_s", "y_s", "x_g", "x_t")), strict=True):
            assert x_s.shape == x_t.shape == (3, 8, 9) and torch.equal(x_s[1:], x_g[1:])
            assert torch.equal(y_s, x_s[1] * 16 + x_s[2])
            styles.add(int(x_g[0, 0, 0]) // 7)
            assert x_g[0, 0, 0] % 7 == x_s[0, 0, 0]  # a style of the same image
            places = set()
            for key, x in (("x_s", x_s), ("x_t", x_t)):
                top, (first, second) = int(x[1, 0, 0]), x[2, 0, :2].tolist()
                flips[key].add(second - first)
                places.add((top, first if second > first else 15 - first))
            assert len(places) == 1
            corners |= places
        assert torch.equal(batch["y_l"], batch["x_l"][:, 1] * 16 + batch["x_l"][:, 2])
    assert flips == {"x_s": {1, -1}, "x_t": {1, -1}} and styles == {0, 1}
    assert {top for top, _ in corners} == {*range(5)} and {left for _, left in corners} == {*range(8)}
    whole = planted(flip=False, gan__crop=[])[0]["x_s"]  # for data where left and right differ
    assert all(torch.equal(x, Planted(range(7)).image(int(x[0, 0, 0]))) for x in whole)


def test_rare_classes_are_drawn_by_the_formula():
    """DAFormer's P(c) ~ exp((1 - f_c) / T), then one of the images that hold c; no overflow by a small T."""
    share = Planted.pixels.sum(0) / Planted.pixels.sum()
    p, images = datasets.images_by_class(Planted(range(7)), 0.5)
    assert p == pytest.approx(np.exp((1 - share) / 0.5) / np.exp((1 - share) / 0.5).sum())
    assert [some.tolist() for some in images] == [[*range(7)], [0, 1, 2, 3], [4]]
    batches, i = planted(rare=0.5), np.arange(7)
    drawn = np.bincount([batches._index("source", k, 7) for k in range(2000)], minlength=7) / 2000
    assert drawn == pytest.approx(p[0] / 7 + p[1] / 4 * (i < 4) + p[2] * (i == 4), abs=0.04)
    assert datasets.images_by_class(Planted(range(7)), 1e-5)[0] == pytest.approx([0, 1, 0])
    few = SimpleNamespace(size=(100, 100), pixels=np.array([[9000, 9], [9000, 9]]))  # 9 of 10,000 are too few
    assert datasets.images_by_class(few, 0.5)[0].tolist() == [1, 0]


def test_jitter_changes_light_and_never_geometry():
    """f_seg's labels stay right only if no edge moves; the label and all other images stay untouched."""
    x, found = torch.zeros(3, 40, 60), []
    x[:, :, 23:] = torch.tensor([0.9, 0.6, 0.3]).view(3, 1, 1)
    for k in range(24):
        y, again = (photometric_jitter(x, 1.0, random_generator("jitter", k)) for _ in range(2))
        assert torch.equal(y, again) and y.min() >= 0 and y.max() <= 1 and (y - x).abs().mean() > 0.01
        found.append(int(y.mean((0, 1)).diff().abs().argmax()))
        torch.testing.assert_close(photometric_jitter(x, 0.0, random_generator(k)), x, atol=2e-3, rtol=0)
    assert np.mean([f == 22 for f in found]) > 0.85  # noise may win where the draw leaves hardly any contrast
    plain, jittered = planted()[1], planted(jitter=1.0)[1]
    assert not torch.equal(plain.pop("x_s"), jittered.pop("x_s")) and same(plain, jittered)


def test_streets_are_a_function_of_their_address():
    """Every process draws its scenes anew, and published numbers are of these very scenes."""
    first = streets_scene("target", "train", 3)
    for address in (("source", "train", 3), ("target", "val", 3), ("target", "train", 4)):
        assert not np.array_equal(first[1], streets_scene(*address)[1])
    assert all(map(np.array_equal, first, streets_scene("target", "train", 3)))
    assert hashlib.sha256(first[0].tobytes() + first[1].tobytes()).hexdigest()[:16] == "df329431d60c1f15"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A source and a target folder here, and tiny.yaml, which names them."""
    for role in ("source", "target"):
        make_own(tmp_path / role, 14)
    (tmp_path / "target/im").rename(tmp_path / "target/va")
    for i in range(8):
        save_image(tmp_path / f"target/im/{i}.png", BLACK)
    tree = {"name": "tiny", "output": "out", "class_colours": {c: [0, 0, i] for i, c in enumerate("abc")},
            "fseg": {"crop": []}, "gan": {"crop": []}}  # fmt: skip
    for role, val in (("source", {}), ("target", {"val": ["va/*", "lb/*.png"]})):
        files = {"train": ["im/*"] if val else PAIR} | val
        tree[role] = {"dataset": "folder", "root": role, "size": [12, 16], "files": files, "ids": IDS}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sound_data_is_counted_and_shown(data):
    """Shares of the classes, notes on what is not used, and a sheet that a very wide image cannot blow up."""
    save_image(data / "source/im/000.png", np.zeros((10, 4000, 3)))
    save_image(data / "source/lb/000.png", np.zeros((10, 4000)))
    (data / "target/im/x.webp").touch()
    result = shell(REPO / "check.py", "tiny.yaml", "--full", cwd=data)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    for line in ("source train +12 images, 12 decoded, 0 problems", "target train +8 images, labels not",
                 r"a +\d\d\.\d\d +57\.14$",  # 8 of the 14 columns that are not ignored
                 "note: target has no labelled pixel of c", "note: .*such as im/x.webp"):  # fmt: skip
        assert re.search(f"^{line}", result.stdout, re.M), result.stdout
    sheet = Image.open(data / "out/tiny/check/sheet.png")
    assert 480 < sheet.width < 3000 and 300 < sheet.height < 1100


@pytest.fixture
def checked(data, stage, capsys):
    """checked(*overrides): whether check.py ends in an error and status 2 on `data`, and what it prints."""
    def run(*overrides):
        try:
            run_main(lambda: stage("check", "tiny.yaml", "--full", *overrides))
        except SystemExit as end:
            assert end.code == 2
        shown = capsys.readouterr()
        return shown.err.count("error: "), shown.out + shown.err

    return run


def test_every_bad_file_is_named_and_can_be_excluded(data, checked):
    """One run is enough: it names all of them, and the line that it prints, pasted, makes the data usable."""
    root = data / "source"
    (root / "lb/000.png").unlink()
    (root / "im/001.png").unlink()
    (root / "im/002.png").write_text("404")
    save_image(root / "lb/004.png", LABEL * 0 + 77)
    save_red16(root / "lb/008.png", LABEL)
    save_image(root / "im/009.png", np.zeros((12, 15, 3)))
    error, out = checked()
    for line in ("lb/000.png: .*No such file", "im/001: .*No such file", "im/002.png: not a readable PNG",
                 r"lb/004.png: unknown label 77 \(192 pixels\)", "lb/008.png: .*no label to read",
                 r"im/009.png: \(15, 12\) pixels, but its label"):  # fmt: skip
        assert re.search(f"^source: .*{line}", out, re.M), out
    paste = re.search(r"source\.exclude: (\[.*\])", out)[1]
    assert error and json.loads(paste) == ["000", "001", "002", "004", "008", "009"]
    assert not checked(f"source.exclude={paste}")[0]


@pytest.mark.parametrize("fault, words", [
    ("source.root=none", "source.root=none: no such folder"),
    ("target.files={train: [im/*], val: [none/*, lb/*]}", "no val images left of ['none/*', 'lb/*']"),
    ("target.files={train: [im/*], val: [lb/*.jpg, lb/*]}", "no val images left of"),
    ("target.files={train: [va/*], val: [va/*, lb/*]}", "va/000.png: is in target train, too"),
    ("target.root=source", "im/000.png: is in source train, too"),
    ("selfens.variant=target_only", "target.files: no labels of train"),
])  # fmt: skip
def test_what_makes_the_data_useless_as_a_whole_is_named(data, checked, fault, words):
    """No images, no labels, or one image in two roles or splits: numbers from it would be worth nothing."""
    if fault == "target.root=source":
        (data / "source/va").symlink_to(data / "target/va")
    error, out = checked(fault)
    assert error and words in out, out


@pytest.mark.parametrize("read", ["index", "red", "rgb"])
def test_init_writes_a_config_that_passes_the_check(tmp_path, stage, capsys, read):
    """The first hour: two folders in, a config out that lacks but the names, and the next command named."""
    for i in range(8):
        folder = tmp_path / f"sim/drive {i // 4}"
        save_image(folder / f"rgb/{i:03d}.png", np.random.default_rng(i).integers(0, 256, (12, 16, 3)))
        label = {"red": rgba_label(LABEL), "rgb": np.stack([LABEL, LABEL * 5, LABEL], -1)}.get(read, LABEL)
        path = save_image(folder / f"seg/{i:03d}_ids.png", label)
        if read == "rgb" and i == 3:  # as colours, if others are
            Image.open(path).quantize().save(path)
        save_image(tmp_path / f"cam/IMG_{i}.jpg", BLACK)
    file = tmp_path / "mine.yaml"
    stage("check", "--init", tmp_path / "sim", tmp_path / "cam", file)
    assert f"next: give the classes in {file} their names, then python check" in capsys.readouterr().out
    text = file.read_text()
    assert f"read: {read}" in text and "# 50.00 %" in text and "class_" in text
    stage("check", file, f"output={tmp_path}")
    shown = capsys.readouterr().out
    assert "7 images" in shown and "no problem in the sample; next: python train_gan.py" in shown
    with pytest.raises(UserError, match="exists; give another name"):
        stage("check", "--init", tmp_path / "sim", tmp_path / "cam", file)
    with pytest.raises(UserError, match="not images and labels"):
        stage("check", "--init", tmp_path / "cam", tmp_path / "cam", tmp_path / "other.yaml")
