"""Streets, the readers, and the batches: what is read is right, and what is drawn depends on (seed, stage, step) alone."""

import functools
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from cityscapesscripts.helpers.labels import labels as CITYSCAPES_LABELS
from conftest import REPO, make_camvid, make_carla, make_cfg, rgba_label, save_image
from PIL import Image
from published import (
    MAKERS, PAIRS, make_cityscapes, make_gta5, make_idd_lite, make_synthia, pair_items, picture, save_palette, save_png16,
    stripes, write_png,
)  # fmt: skip

import datasets
from datasets import CLASS_LISTS, TABLES, Augmented, Batches, Scenes, class_list, photometric_jitter, train_id_table
from losses import IGNORE
from runtime import UserError, load_config, random_generator
from streets import STREETS_CLASSES, streets_scene


def cfg_of(root, **overrides):
    """Source carla and target camvid below `root`, small."""
    base = {"source__dataset": "carla", "source__root": str(root / "carla"), "source__size": [20, 28], "source__images": None,
            "target__dataset": "camvid", "target__root": str(root / "camvid"), "target__size": [20, 28], "target__images": None}
    return make_cfg(**(base | overrides))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny CARLA and one tiny CamVid folder that no test changes."""
    root = tmp_path_factory.mktemp("data")
    make_carla(root / "carla")
    make_camvid(root / "camvid")
    return root


# ---------------------------------------------------------------------------------------------------------- streets


@functools.cache
def scenes(domain, split, count):
    pairs = [streets_scene(domain, split, i) for i in range(count)]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def test_streets_are_a_function_of_their_address():
    """Scenes are drawn anew by every process and every resumed run, and must not depend on what was drawn before."""
    first = streets_scene("target", "train", 3)
    np.random.default_rng(5).normal(size=100)
    streets_scene("source", "val", 9)
    again = streets_scene("target", "train", 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    labels = [streets_scene(d, s, i)[1] for d in ("source", "target") for s in ("train", "val") for i in (0, 1)]
    assert all(not np.array_equal(a, b) for k, a in enumerate(labels) for b in labels[:k])


@pytest.mark.parametrize("domain", ["source", "target"])
def test_streets_hold_every_class(domain):
    """Ten classes in both domains, thin ones included, or an IoU would be the mean of other classes than stated."""
    images, labels = scenes(domain, "train", 60)
    assert images.dtype == labels.dtype == np.uint8
    assert images.shape == (60, 96, 160, 3) and labels.shape == (60, 96, 160)
    assert tuple(CLASS_LISTS["streets"]) == STREETS_CLASSES
    share = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert (share[:10] > 5e-4).all() and share[10:].sum() == 0
    thin = {STREETS_CLASSES.index(name) for name in ("pole", "sign", "person")}
    assert all(share[k] < 0.03 for k in thin)
    for k in thin:  # in many scenes, not in one
        assert (labels == k).any((1, 2)).mean() > 0.3


def test_no_colour_table_solves_streets():
    """The pair is only a job for networks if colour alone does not give the class, and if the domains differ in colour."""
    def bins(images):
        return (images.astype(np.int64) // 16 * (256, 16, 1)).sum(-1).ravel()

    def miou(fit, on):
        counts = np.zeros((4096, 10), np.int64)
        images, labels = scenes(fit, "train", 150)
        np.add.at(counts, (bins(images), labels.ravel()), 1)
        images, labels = scenes(on, "val", 40)
        prediction, label = counts.argmax(1)[bins(images)], labels.ravel()
        pairs = [(prediction == k, label == k) for k in range(10)]
        return np.mean([(p & t).sum() / (p | t).sum() for p, t in pairs])

    scores = {pair: miou(*pair) for pair in (("target", "target"), ("source", "target"), ("source", "source"))}
    assert scores["target", "target"] < 0.30, scores
    assert scores["source", "target"] < 0.15, scores
    assert scores["source", "source"] > 0.50, scores


@pytest.mark.parametrize("domain, ratio", [("source", 4), ("target", 1.8)])
def test_streets_image_and_label_are_aligned(domain, ratio):
    """Label boundaries lie on image edges, and more so than when the label is shifted by two pixels."""
    images, labels = scenes(domain, "train", 60)
    edge = np.abs(np.diff(images.astype(float).mean(-1), axis=2))
    boundary = np.diff(labels.astype(int), axis=2) != 0
    on, off = edge[boundary].mean(), edge[~boundary].mean()
    shifted = max(edge[np.roll(boundary, k, 2)].mean() for k in (-2, 2))
    assert on > ratio * off
    assert on > 1.2 * shifted


# ---------------------------------------------------------------------------------------------------------- reading

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN = range(10)
CAMVID10 = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian")
MAPPING = {  # raw id -> train id of camvid10, written out; every other known id is ignored
    "carla": {13: SKY, 1: BUILDING, 11: BUILDING, 15: BUILDING, 5: POLE, 7: ROAD, 6: ROAD, 8: PAVEMENT, 9: TREE, 22: TREE,
              12: SIGN, 18: SIGN, 2: FENCE, 17: FENCE, 10: CAR, 4: PEDESTRIAN,
              0: IGNORE, 3: IGNORE, 14: IGNORE, 16: IGNORE, 19: IGNORE, 20: IGNORE, 21: IGNORE},
    "camvid": {0: SKY, 1: BUILDING, 2: POLE, 3: ROAD, 4: PAVEMENT, 5: TREE, 6: SIGN, 7: FENCE, 8: CAR, 9: PEDESTRIAN,
               10: IGNORE, 11: IGNORE},
}  # fmt: skip


@pytest.mark.parametrize("dataset, raw, train_id", [(d, *pair) for d, table in MAPPING.items() for pair in table.items()])
def test_every_label_id_maps_as_documented(tmp_path, dataset, raw, train_id):
    """One wrong entry trains a class on another's pixels without any error: each goes through a file and the reader."""
    assert tuple(CLASS_LISTS["camvid10"]) == CAMVID10
    ids = np.full((6, 9), raw)
    label = save_image(tmp_path / "label.png", rgba_label(ids) if dataset == "carla" else ids)
    got = datasets.read_label(str(label), datasets.TABLES[dataset].read, train_id_table(dataset, "camvid10"))
    assert got.dtype == np.uint8
    assert (got == train_id).all()


@pytest.mark.parametrize("dataset", MAPPING)
def test_ids_that_no_table_knows_are_refused(dataset):
    """The tables are complete and hold nothing else: everything undocumented is unknown, not silently ignored."""
    table = train_id_table(dataset, "camvid10")
    assert {raw: int(v) for raw, v in enumerate(table) if v >= 0} == MAPPING[dataset]


def test_unknown_id_names_id_file_and_pixels(tmp_path):
    """A label file in another encoding stops the run with what is needed to find it."""
    make_carla(tmp_path / "carla", 8, 1)
    ids = np.full((40, 56), 7)
    ids[:3, :4] = 77
    save_image(tmp_path / "carla" / "CameraMask" / "000000.png", rgba_label(ids))
    with pytest.raises(UserError, match=r"000000\.png.*77.*12 pixels"):
        Scenes(cfg_of(tmp_path), "source", "train", labels=True)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(48, 64), (37, 53)])
def test_carla_and_camvid_are_read(tmp_path, suffix, size):
    """RGBA labels with the id in R, one-channel labels, PNG and JPEG, sizes of any shape: images and labels belong together."""
    make_carla(tmp_path / "carla", 8, 1, size, suffix)
    make_camvid(tmp_path / "camvid", 3, 2, size, suffix)
    cfg = cfg_of(tmp_path, source__size=list(size), target__size=list(size))
    carla, camvid = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "val", labels=True)
    assert (len(carla), len(camvid)) == (7, 2)
    image, label = carla.image(0).float(), carla.label(0)
    assert image.shape == (3, *size) and label.shape == size
    assert set(label.unique().tolist()) == {SKY, BUILDING, POLE, ROAD, CAR}
    for train_id, raw in ((SKY, 13), (ROAD, 7)):  # the helper paints R = 15 * id
        assert (image[0][label == train_id] - 15 * raw).abs().median() < 4  # JPEG smears the edges
    label = camvid.label(1)
    assert (label[0] == IGNORE).all() and (label[:, 0] == IGNORE).all()
    assert set(label.unique().tolist()) == {SKY, BUILDING, POLE, ROAD, CAR, IGNORE}


def test_carla_is_split_by_drive(tmp_path):
    """Neighbouring frames are near-duplicates: no drive may stand in both splits, and nothing may be lost."""
    root = make_carla(tmp_path / "carla", 14, 3)
    cfg = cfg_of(tmp_path)
    train, val = ({s.name for s in Scenes(cfg, "source", split, labels=True).samples} for split in ("train", "val"))
    assert not {int(n) // 1000 for n in train} & {int(n) // 1000 for n in val}
    assert train | val == {p.stem for p in (root / "CameraRGB").iterdir()}
    assert len(val) == 2 * 3


def test_a_gap_of_more_than_100_starts_a_drive():
    """The documented rule, at its border, and with names that carry letters."""
    assert datasets.groups_by_gap(["000010.png", "000110.png", "000211.png", "f0212.jpg", "9000.png"]) == [0, 0, 1, 1, 2]


def test_labels_stay_aligned_when_resized(tmp_path):
    """Image and label are resized by different filters, and both must keep the half-pixel geometry."""
    make_camvid(tmp_path / "camvid", 1, 1, (61, 83), ".png")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 2, (5, 7))
    ids = blocks.repeat(13, 0).repeat(12, 1)[:61, :83]
    save_image(tmp_path / "camvid/val/f000.png", np.stack([ids * 250] * 3, -1))
    save_image(tmp_path / "camvid/valannot/f000.png", ids)
    make_carla(tmp_path / "carla", 1, 1)
    for size in ([40, 56], [96, 130]):
        val = Scenes(cfg_of(tmp_path, target__size=size), "target", "val", labels=True)
        bright, label = val.image(0)[0].float() / 250, val.label(0).float()
        assert bright.shape == label.shape == tuple(size)
        assert float((bright - label).mean().abs()) < 0.01  # a shift of half a pixel moves the mean edge by far more
        wrong = ((bright > 0.5) != (label > 0.5)).float().mean()
        assert wrong < 0.02


def break_it(root, how):
    """Damages a data folder; returns (role, split, the file or word that the error must name)."""
    carla, camvid = root / "carla", root / "camvid"
    image = carla / "CameraRGB" / "000000.png"
    if how == "missing root":
        (camvid / "train").rename(root / "elsewhere")
        camvid.rename(root / "gone")
        return "target", "train", str(camvid)
    if how == "empty split":
        for p in (camvid / "val").iterdir():
            p.unlink()
        return "target", "val", "no val images"
    if how == "missing label":
        (carla / "CameraMask" / "000000.png").unlink()
        return "source", "train", "CameraMask/000000.png"
    if how == "size mismatch":
        save_image(image, np.zeros((20, 30, 3)))
    if how == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
    if how == "text":
        image.write_text("not an image")
    if how == "empty file":
        image.write_bytes(b"")
    if how == "16 bit label":
        Image.fromarray(np.full((40, 56), 7, np.uint16)).save(carla / "CameraMask" / "000000.png")
        return "source", "train", "CameraMask/000000.png"
    return "source", "train", "CameraRGB/000000.png"


@pytest.mark.parametrize("how", ["missing root", "empty split", "missing label", "size mismatch", "truncated", "text",
                                 "empty file", "16 bit label"])  # fmt: skip
def test_broken_data_is_an_error_that_names_the_file(tmp_path, how):
    """Whatever is wrong on disk stops the run before training, with the file to mend."""
    make_carla(tmp_path / "carla", 2, 1)
    make_camvid(tmp_path / "camvid", 2, 1)
    role, split, named = break_it(tmp_path, how)
    with pytest.raises(UserError) as error:
        Scenes(cfg_of(tmp_path), role, split, labels=True)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_unknown_dataset_and_unset_root_are_named(folders):
    """A misspelt data set and a forgotten root are the commonest mistakes in a config."""
    with pytest.raises(UserError, match="source.dataset=karla.*carla"):
        Scenes(cfg_of(folders, source__dataset="karla"), "source", "train", labels=True)
    with pytest.raises(UserError, match="target.root"):
        Scenes(cfg_of(folders, target__root=None), "target", "train", labels=False)


def test_source_and_target_must_share_a_class_list(folders):
    """Training on one class list and evaluating on another gives numbers without a meaning."""
    with pytest.raises(UserError, match="streets.*camvid"):
        class_list(cfg_of(folders, source__dataset="streets"))
    with pytest.raises(UserError, match="classes=streets.*camvid10"):
        class_list(cfg_of(folders, classes="streets"))
    assert class_list(cfg_of(folders))[0] == "camvid10"
    assert class_list(make_cfg())[0] == "streets"


def test_unlabelled_target_never_opens_a_label(tmp_path):
    """Unsupervised means that the target's training labels are not touched: here they cannot even be read."""
    make_carla(tmp_path / "carla", 4, 1)
    make_camvid(tmp_path / "camvid", 4, 1, bad_train_labels=True)
    cfg = cfg_of(tmp_path)
    target = Scenes(cfg, "target", "train", labels=False)
    assert [s.label for s in target.samples] == [None] * 4
    batch = Batches(cfg, "test", 4, None, source=Scenes(cfg, "source", "train", labels=True), target=target)[0]
    assert set(batch) == {"x_s", "y_s", "x_t"}
    with pytest.raises(UserError, match="trainannot"):
        Scenes(cfg, "target", "train", labels=True)


# --------------------------------------------------------------------------------------------- published data sets


@pytest.mark.parametrize("name, classes", [("cityscapes19", 19), ("cityscapes16", 16)])
@pytest.mark.parametrize("dataset", ["cityscapes", "gta5"])
def test_tables_agree_with_cityscapes_own_label_list(dataset, name, classes):
    """Train ids, names, colours and ignored ids, entry by entry against cityscapesScripts: numbers must be comparable."""
    lost = {"terrain", "truck", "train"} if classes == 16 else set()
    evaluated = [label for label in CITYSCAPES_LABELS if not label.ignoreInEval and label.name not in lost]
    evaluated.sort(key=lambda label: label.trainId)
    assert CLASS_LISTS[name] == {label.name: label.color for label in evaluated}
    assert list(CLASS_LISTS[name]) == [label.name for label in evaluated] and len(evaluated) == classes
    expected = {label.id: IGNORE for label in CITYSCAPES_LABELS if label.id >= 0}
    expected |= {label.id: train_id for train_id, label in enumerate(evaluated)}
    if dataset == "gta5":
        expected[34] = IGNORE  # the licence plate, which is -1 in cityscapesScripts
    if classes == 19:
        assert all(expected[label.id] == label.trainId for label in CITYSCAPES_LABELS if label.id >= 0)
    assert {raw: int(v) for raw, v in enumerate(train_id_table(dataset, name)) if v >= 0} == expected


SYNTHIA = {3: "road", 4: "sidewalk", 2: "building", 21: "wall", 5: "fence", 7: "pole", 15: "traffic light", 9: "traffic sign",
           6: "vegetation", 1: "sky", 10: "person", 17: "rider", 8: "car", 19: "bus", 12: "motorcycle",
           11: "bicycle"}  # fmt: skip
IDD_CAMVID7 = ("drivable", "non-drivable", "living thing", "vehicle", "roadside object", "far object", "sky")
CAMVID7 = {3: 0, 4: 1, 9: 2, 10: 2, 8: 3, 2: 4, 6: 4, 7: 4, 1: 5, 5: 5, 0: 6, 11: IGNORE}


def test_synthia_and_seven_class_tables_as_documented():
    """Written out a second time, from the documents: one wrong entry trains a class on another's pixels."""
    names = list(CLASS_LISTS["cityscapes16"])
    expected = {raw: IGNORE for raw in range(23)} | {raw: names.index(name) for raw, name in SYNTHIA.items()}
    table = train_id_table("synthia", "cityscapes16")
    assert len(table) == 1 << 16
    assert {raw: int(v) for raw, v in enumerate(table) if v >= 0} == expected
    assert tuple(CLASS_LISTS["idd_camvid7"]) == IDD_CAMVID7
    for dataset, expected in (("idd_lite", {i: i for i in range(7)} | {255: IGNORE}), ("camvid", CAMVID7)):
        assert {raw: int(v) for raw, v in enumerate(train_id_table(dataset, "idd_camvid7")) if v >= 0} == expected


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """One tiny folder of each published data set, that no test changes."""
    root = tmp_path_factory.mktemp("published")
    for name, make in MAKERS.items():
        make(root / name)
    return root


@pytest.mark.parametrize("source, target", PAIRS)
def test_four_overrides_are_enough_for_any_published_pair(published, source, target):
    """Own data in four words: the class list follows, and every split that the stages read is there."""
    cfg = load_config(str(REPO / "cfg.yaml"), pair_items(published, source, target))
    assert class_list(cfg)[0] == PAIRS[source, target]
    splits = {(role, split): Scenes(cfg, role, split, labels=(role, split) != ("target", "train"))
              for role in ("source", "target") for split in ("train", "val")}
    assert all(len(scenes) for scenes in splits.values())
    names = [{s.name for s in splits["source", split].samples} for split in ("train", "val")]
    assert not names[0] & names[1]
    count = len(CLASS_LISTS[PAIRS[source, target]])
    for role in ("source", "target"):
        seen = splits[role, "val"].label(0).unique()
        assert len(seen) > 3 and ((seen < count) | (seen == IGNORE)).all()
    batch = Batches(cfg, "test", 2, None, source=splits["source", "train"], target=splits["target", "train"])[0]
    assert batch["x_s"].shape == batch["x_t"].shape == (2, 3, 96, 160)


def test_all_stages_run_on_a_tiny_gta5_and_cityscapes(published, tmp_path, stage, capsys):
    """The promise as users try it: cfg.yaml, no gtFine for the train split, every stage to its end."""
    assert not (published / "cityscapes/gtFine/train").exists()
    small = [*pair_items(published, "gta5", "cityscapes"), f"output={tmp_path}", "precision=float32", "fseg.width=0.03",
             "fseg.steps=1", "gan.steps=1", "gan.width=4", "gan.d_width=4", "selfens.width=0.03", "selfens.steps=1",
             "source.size=[32,48]", "target.size=[32,48]", "fseg.crop=null", "gan.crop=null", "gan.d_layers=2"]  # fmt: skip
    for name in ("datasets", "train_gan", "augment", "train_selfens", "evaluate"):
        stage(name, REPO / "cfg.yaml", *small)
    assert "19 classes" in capsys.readouterr().out


def test_gta5_labels_are_palette_indices(tmp_path):
    """The palette's colours mean nothing here, and the licence plate (34) is known and ignored."""
    make_gta5(tmp_path / "gta5", 8)
    make_cityscapes(tmp_path / "cityscapes")
    cfg = load_config(None, pair_items(tmp_path, "gta5", "cityscapes"))
    train = Scenes(cfg, "source", "train", labels=True)
    got = train.native_label(len(train) - 1)[0]
    assert train.samples[-1].name == "00008"
    assert got[np.linspace(2, 33, 8).astype(int)].tolist() == [0, 1, 2, 8, 10, 13, IGNORE, IGNORE]


def test_synthia_16_bit_labels_keep_their_ids(tmp_path):
    """Pillow cuts these files to their high byte, which is 0 everywhere: all void, and no error."""
    make_synthia(tmp_path / "synthia")
    make_cityscapes(tmp_path / "cityscapes")
    cfg = load_config(None, pair_items(tmp_path, "synthia", "cityscapes"))
    train = Scenes(cfg, "source", "train", labels=True)
    assert not np.asarray(Image.open(train.samples[0].label))[..., 0].any()  # what Pillow makes of it
    assert train.native_label(0)[0, np.linspace(2, 33, 8).astype(int)].tolist() == [0, 1, 2, 8, 9, 12, IGNORE, IGNORE]
    path = save_png16(tmp_path / "big.png", np.stack([stripes((3, 259))] * 3, -1))
    with pytest.raises(UserError, match=r"big\.png: unknown label id 259 \(432 pixels\)"):  # 259 is not 3
        datasets.read_label(str(path), "red16", train.table)


def test_cityscapes_splits_and_names(published):
    """Only labelIds are read, images and labels belong together over city folders, and test images may lack labels."""
    cfg = load_config(None, pair_items(published, "gta5", "cityscapes"))
    val = Scenes(cfg, "target", "val", labels=True)
    assert [s.name for s in val.samples] == [f"lindau/lindau_{i:06d}_000019_leftImg8bit" for i in range(3)]
    first = [int(val.native_label(i)[0, 0]) for i in range(3)]
    assert first == [0, 1, 2]  # ids 7, 8, 11
    train = Scenes(cfg, "target", "train", labels=False)
    assert [s.name.split("/")[0] for s in train.samples] == ["aachen"] * 3 + ["bonn"] * 2
    with pytest.raises(UserError, match=r"aachen_000000_000019_gtFine_labelIds\.png: no such label.*4 more"):
        Scenes(cfg, "target", "train", labels=True)


def test_idd_lite_is_split_by_sequence(tmp_path):
    """Two frames of one sequence are near-duplicates and stay in one split."""
    make_idd_lite(tmp_path / "idd_lite", 12)
    make_camvid(tmp_path / "camvid")
    cfg = load_config(None, pair_items(tmp_path, "idd_lite", "camvid"))
    parts = [Scenes(cfg, "source", split, labels=True).samples for split in ("train", "val")]
    sequences = [{s.name.split("/")[0] for s in part} for part in parts]
    assert not sequences[0] & sequences[1] and len(sequences[0] | sequences[1]) == 12
    assert len(parts[0]) + len(parts[1]) == 24 and len(parts[1]) == 2 * 2


@pytest.mark.parametrize("count, held", [(24966, 502), (9400, 200), (8, 1), (2, 1)])
def test_blocks_of_neighbours_are_held_out(count, held):
    """About 2 % of a large set, never nothing of a tiny one, and whole blocks, because neighbours look alike."""
    groups = datasets.groups_by_block([str(i) for i in range(count)])
    first = min(3, groups[-1])
    chosen = [i for i, g in enumerate(groups) if g % TABLES["gta5"].val_every == first]
    assert len(chosen) == held and groups == sorted(groups)
    assert sum(b - a > 1 for a, b in zip(chosen, chosen[1:], strict=False)) == max(0, round(held / 100) - 1)


def test_classes_names_another_list_that_both_have(published):
    """16 against 19 classes is the field's commonest muddle: it is named, and the pair must have it."""
    items = pair_items(published, "gta5", "cityscapes")
    assert class_list(load_config(None, [*items, "classes=cityscapes16"]))[0] == "cityscapes16"
    with pytest.raises(UserError, match="classes=cityscapes19: synthia and cityscapes share .'cityscapes16'"):
        class_list(load_config(None, [*pair_items(published, "synthia", "cityscapes"), "classes=cityscapes19"]))


# ------------------------------------------------------------------------------------------------------ exclude


def test_exclude_leaves_out_pairs_and_moves_no_other(published):
    """An excluded frame goes, from whichever split it is in; every other frame stays in its own split."""
    items = pair_items(published, "gta5", "cityscapes")
    plain = {split: [s.name for s in Scenes(load_config(None, items), "source", split, labels=True).samples]
             for split in ("train", "val")}
    cfg = load_config(None, [*items, 'source.exclude=["00001", "00007"]'])
    for split, names in plain.items():
        got = [s.name for s in Scenes(cfg, "source", split, labels=True).samples]
        assert got == [n for n in names if n not in ("00001", "00007")]


@pytest.mark.parametrize("item, words", [
    ('source.exclude=["0001"]', "source.exclude: no sample '0001'.*did you mean '00001'"),
    ('target.exclude=["aachen/x"]', "target.exclude: no sample 'aachen/x'"),
])
def test_excluding_what_does_not_exist_is_an_error(published, item, words):
    """A misspelt name would leave the bad pair in."""
    cfg = load_config(None, [*pair_items(published, "gta5", "cityscapes"), item])
    with pytest.raises(UserError, match=words):
        Scenes(cfg, item.partition(".")[0], "train", labels=False)


def test_streets_scenes_can_be_excluded_too():
    """One key, one meaning, for every data set."""
    cfg = make_cfg(source__images=5, source__exclude=["000002"])
    assert [s.name for s in Scenes(cfg, "source", "train", labels=True).samples] == ["000000", "000001", "000003", "000004"]
    with pytest.raises(UserError, match="no scene 'x'"):
        Scenes(make_cfg(source__exclude=["x"]), "source", "train", labels=True)


# -------------------------------------------------------------------------------------------------------- folder


def readme_config() -> dict:
    """The YAML example under README's "Your own simulator and your own camera"."""
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", (REPO / "README.md").read_text(), re.S)[1])


def make_own(root):
    """The two folders that the README's example describes, and that config with its roots below `root`."""
    colours = [(90, 90, 90), (255, 255, 255), (200, 100, 0), (0, 200, 255), (255, 0, 0), (0, 0, 0)]
    for drive in "ab":
        for i in range(5):
            ids = stripes(range(6))
            save_image(root / f"simulator/drives/{drive}/rgb/{i}.png", picture(ids))
            save_image(root / f"simulator/drives/{drive}/semantic/{i}_seg.png", np.array(colours)[ids])
    for i in (16, 17, 18):
        save_image(root / f"camera/2026-05-01/frame_0000{i}.jpg", picture(stripes((1, 2))))
    for i in range(2):
        save_image(root / f"camera/labelled/{i}.jpg", picture(stripes((1, 2))))
        save_image(root / f"camera/labelled/{i}_ids.png", stripes((1, 3, 2, 4, 5, 0, 255)))
    tree = readme_config()
    tree["source"]["root"], tree["target"]["root"] = str(root / "simulator"), str(root / "camera")
    return tree


def load_tree(tmp_path, tree, *items):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(str(tmp_path / "own.yaml"), items)


def test_the_readme_example_of_own_data_works(tmp_path):
    """Copied from the README, it must read exactly what the README says, or own data needs five edits after all."""
    cfg = load_tree(tmp_path, make_own(tmp_path))
    name, classes = class_list(cfg)
    assert name == "own" and list(classes) == ["road", "building", "sky", "car"] and classes["car"] == (0, 0, 142)
    train, held_out = (Scenes(cfg, "source", split, labels=True) for split in ("train", "val"))
    assert (len(train), len(held_out)) == (9, 1) and train.samples[0].name == "a/rgb/0"
    assert train.native_label(0)[0, ::6].tolist() == [0, 0, 1, 2, 3, IGNORE]
    target, val = Scenes(cfg, "target", "train", labels=False), Scenes(cfg, "target", "val", labels=True)
    assert [s.name for s in target.samples] == ["2026-05-01/frame_000016", "2026-05-01/frame_000018"]
    seen = val.native_label(1)[0, np.linspace(2, 33, 7).astype(int)].tolist()
    assert seen == [0, 1, 1, 2, 3, IGNORE, IGNORE]


def test_a_camera_without_any_label_trains(tmp_path, stage):
    """The commonest wish: no labelled target frame at all. All but evaluate.py runs, and that says what is missing."""
    tree = make_own(tmp_path)
    tree |= {"output": str(tmp_path / "out"), "precision": "float32"}
    tree["target"] = {"dataset": "folder", "root": tree["target"]["root"], "files": {"train": "2026-*/*.jpg"}, "size": [32, 48]}
    tree["source"]["size"] = [32, 48]
    tree |= {"fseg": {"width": 0.03, "steps": 1, "crop": None},
             "gan": {"steps": 1, "width": 4, "d_width": 4, "d_layers": 2, "crop": None},
             "selfens": {"width": 0.03, "steps": 1}}  # fmt: skip
    load_tree(tmp_path, tree)
    for name in ("datasets", "train_gan", "augment", "train_selfens"):
        stage(name, tmp_path / "own.yaml")
    with pytest.raises(UserError, match="target.files: val has no pattern of labels"):
        stage("evaluate", tmp_path / "own.yaml")


def test_folder_onto_a_published_class_list(tmp_path, published):
    """Own simulator -> Cityscapes: the built-in list is named where several fit; a class that it lacks is an error."""
    tree = make_own(tmp_path)
    del tree["class_colours"]
    tree["target"] = {"dataset": "cityscapes", "root": str(published / "cityscapes")}
    with pytest.raises(UserError, match="cityscapes19 and cityscapes16 fit equally"):
        class_list(load_tree(tmp_path, tree))
    cfg = load_tree(tmp_path, tree, "classes=cityscapes19")
    assert Scenes(cfg, "source", "train", labels=True).native_label(0)[0, ::6].tolist() == [0, 0, 2, 10, 13, IGNORE]
    tree["source"]["ids"]["tram"] = [1, 2, 3]
    with pytest.raises(UserError, match="source.ids: 'tram' is not a class"):
        class_list(load_tree(tmp_path, tree))


def test_ids_reads_a_published_data_set_onto_an_own_list(tmp_path, published):
    """Own simulator with four classes -> Cityscapes with the same four, without an edit of datasets.py."""
    tree = make_own(tmp_path)
    tree["target"] = {"dataset": "cityscapes", "root": str(published / "cityscapes"),
                      "ids": {"road": [7, 8], "building": 11, "sky": 23, "car": [26, 27]}}
    cfg = load_tree(tmp_path, tree)
    val = Scenes(cfg, "target", "val", labels=True)
    assert cfg.classes == "auto" and val.class_list == "own"
    assert val.native_label(0)[0, np.linspace(2, 33, 8).astype(int)].tolist() == [0, 0, 1, IGNORE, 2, 3, IGNORE, IGNORE]


@pytest.mark.parametrize("section, key, value, words", [
    ("source", "files", None, "source.files: .*folder needs it"),
    ("source", "files", {"trian": ["a/*.png", "b/*.png"]}, "source.files: trian: unknown split"),
    ("source", "files", {"train": ["a/*.png", "b/*/*.png"]}, "source.files: train: .*same"),
    ("source", "files", {"train": ["a/*.png", "b/*.png", "c/*.png"]}, "source.files: train: must be"),
    ("source", "files", {"train": 7}, "source.files: train: must be"),
    ("source", "files", {"train": ["/etc/*.png", "b/*.png"]}, "source.files: train: .*below root"),
    ("source", "files", {"train": ["../*.png", "b/*.png"]}, "source.files: train: .*below root"),
    ("source", "files", {"train": ["a/**.png", "b/**.png"]}, "source.files: train: .*below root"),
    ("source", "files", {"train": ["a/0.png", "b/0.png"]}, "source.files: train: .*below root"),
    ("source", "files", {"train": "drives/*/rgb/*.png"}, "source.files: train has no pattern of labels"),
    ("source", "read", None, "source.read: source.files names labels"),
    ("source", "ids", None, "source.ids: source.files names labels"),
    ("source", "ids", {"ignore": [[0, 0, 0]]}, "source.ids: no class has an id"),
    ("source", "ids", {"road": 5}, "source.ids: road: a colour is"),
    ("source", "ids", {"road": [[1, 2]]}, "source.ids: road: a colour is"),
    ("source", "ids", {"road": [1, 2, 256]}, "source.ids: road: a colour is"),
    ("source", "ids", {"road": [1, 2, 3], "car": [1, 2, 3]}, r"source.ids: car: colour \[1, 2, 3\] belongs to 'road'"),
    ("source", "ids", {"way": [1, 2, 3]}, "source.ids: 'way' is not a class of 'own'"),
    ("target", "ids", {"road": 256}, "target.ids: road: an id read by 'index' is a whole number, 0 to 255"),
    ("target", "ids", {"road": "one"}, "target.ids: road: an id read by"),
    ("target", "ids", {"road": True}, "'target.ids' must be mapping"),
    ("target", "ids", {1: "road"}, "'target.ids' must be mapping"),
    ("target", "ids", [1, 2], "'target.ids' must be mapping"),
    ("target", "ids", {"road": 1.5}, "'target.ids' must be mapping"),
    ("target", "exclude", [17], "'target.exclude' must be list of texts, numbers in quotes"),
    ("target", "exclude", "17", "'target.exclude' must be list of texts"),
    ("target", "read", "green", "'target.read' must be index"),
    (None, "class_colours", {"road": [0, 0]}, "class_colours: road: a colour is"),
    (None, "class_colours", {"ignore": [0, 0, 0]}, "class_colours: .*'ignore'"),
])
def test_wrong_folder_keys_are_one_line_that_names_the_key(tmp_path, section, key, value, words):
    """A class table is typed by hand: whatever is wrong in it must be found from the message alone."""
    tree = make_own(tmp_path)
    (tree[section] if section else tree)[key] = value
    with pytest.raises(UserError, match=words) as error:
        cfg = load_tree(tmp_path, tree)
        Scenes(cfg, section or "source", "train" if section != "target" else "val", labels=True)
    assert "\n" not in str(error.value)


def test_folder_keys_of_a_published_data_set_are_refused(published):
    """They would be ignored in silence."""
    for item in ("source.read=red", "source.files={train: [a/*.png]}"):
        with pytest.raises(UserError, match=f"{item.partition('=')[0]}: only for source.dataset=folder"):
            class_list(load_config(None, [*pair_items(published, "gta5", "cityscapes"), item]))
    with pytest.raises(UserError, match="class_colours: not used"):
        class_list(load_config(None, [*pair_items(published, "gta5", "cityscapes"), "class_colours={road: [1, 2, 3]}"]))


def test_labels_may_lie_beside_their_images(tmp_path):
    """x.png with x_ids.png is a common layout; a label must not be taken for an image of its own."""
    for name in ("a", "b/c", "b/d/e"):
        save_image(tmp_path / f"sim/{name}.png", picture(stripes((1, 2))))
        save_image(tmp_path / f"sim/{name}_ids.png", stripes((1, 2)))
    cfg = make_cfg(source__dataset="folder", source__root=str(tmp_path / "sim"), source__read="index", classes="camvid10",
                   source__files={"train": ["**/*.png", "**/*_ids.png"]}, source__ids={"road": 1, "car": 2},
                   target__dataset="camvid")  # fmt: skip
    pairs = [Scenes(cfg, "source", split, labels=True).samples for split in ("train", "val")]
    assert [s.name for s in pairs[0]] == ["a", "b/c"] and [s.name for s in pairs[1]] == ["b/d/e"]
    assert pairs[1][0].label.endswith("b/d/e_ids.png")


@pytest.mark.parametrize("workers, kept", [(None, 8), (4, 2)])
def test_reading_processes_share_the_room_of_the_cache(published, monkeypatch, workers, kept):
    """Sixteen processes with two gigabytes for each of three data sets would fill the memory of most machines."""
    cfg = load_config(None, [*pair_items(published, "gta5", "cityscapes"), "source.size=[10,10]"])
    monkeypatch.setattr(datasets, "CACHE_BYTES", 8 * 300)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: workers and SimpleNamespace(num_workers=workers))
    scenes = Scenes(cfg, "source", "train", labels=False)
    for i in range(7):
        scenes.image(i)
    assert len(scenes._cache) == min(7, kept)


def test_two_files_of_one_name_are_an_error(tmp_path):
    """a.jpg and a.png would share one label, and one augmented image."""
    make_carla(tmp_path / "carla", 4, 1)
    make_camvid(tmp_path / "camvid", 2, 1)
    shutil.copy(tmp_path / "carla/CameraRGB/000000.png", tmp_path / "carla/CameraRGB/000000.jpg")
    with pytest.raises(UserError, match="second file for the same name"):
        Scenes(cfg_of(tmp_path), "source", "train", labels=True)


# ----------------------------------------------------------------------------------------------------- odd images


def one_pair(tmp_path):
    """A tiny GTA5 and Cityscapes, its config, and the paths of the first train image and label."""
    make_gta5(tmp_path / "gta5")
    make_cityscapes(tmp_path / "cityscapes")
    cfg = load_config(None, [*pair_items(tmp_path, "gta5", "cityscapes"), "source.size=[24,36]"])
    return cfg, tmp_path / "gta5/images/00001.png", tmp_path / "gta5/labels/00001.png"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    """Cameras and tools write all of them: greyscale thrice, alpha dropped, CMYK converted, and stated in the README."""
    cfg, image, _ = one_pair(tmp_path)
    rgb = Image.open(image).convert("RGB")
    odd = rgb.convert(mode)
    if mode == "RGBA":
        odd.putalpha(0)  # wholly transparent: the colours below count
    if mode == "CMYK":
        image.unlink()
        image = image.with_suffix(".jpg")
    odd.save(image, **({"quality": 95} if mode == "CMYK" else {}))
    got = Scenes(cfg, "source", "train", labels=True).image(0)
    assert got.shape == (3, 24, 36)
    error = (got.permute(1, 2, 0).float() - torch.from_numpy(np.array(rgb)).float()).abs()
    if mode in ("RGBA", "CMYK"):
        assert error.median() <= (0 if mode == "RGBA" else 6)
    if mode in ("L", "1", "LA"):
        assert (got[0] == got[1]).all() and (got[0] == got[2]).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation, turn):
    """A phone stores frames lying on their side; the network gets them upright, as the label was drawn."""
    cfg, image, label = one_pair(tmp_path)
    upright = np.array(Image.open(image).convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.unlink()
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright, -turn)))
    stored.save(image.with_suffix(suffix), exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
    scenes = Scenes(cfg, "source", "train", labels=True)  # sizes agree once the image is turned
    assert np.median(np.abs(scenes.image(0).permute(1, 2, 0).numpy().astype(int) - upright)) <= 4
    if turn % 2:
        save_palette(label, np.rot90(stripes((7, 8))))  # drawn on the image as stored
        with pytest.raises(UserError, match=r"images/00001\.\w+: 36x24 pixels, but its label .* has 24x36"):
            Scenes(cfg, "source", "train", labels=True)


def test_16_bit_images_are_refused(tmp_path):
    """Pillow makes 16-bit greyscale all white and cuts 16-bit colour: neither is what the file shows."""
    for array in (np.full((24, 36), 300, np.uint16), np.full((24, 36, 3), 300, np.uint16)):
        cfg, image, _ = one_pair(tmp_path)
        save_png16(image, array)
        with pytest.raises(UserError, match=r"images/00001\.png: 16 bits per channel where 8 are expected"):
            Scenes(cfg, "source", "train", labels=True)


LABELS = {  # name -> (how labels are read, function that writes a wrong label, words of the error)
    "16 bit for 8": ("index", lambda p: save_png16(p, stripes((7, 8))), "16 bits per channel where 8 are expected"),
    "16 bit colour for 8": ("rgb", lambda p: save_png16(p, np.stack([stripes((7, 8))] * 3, -1)), "16 bits per channel where 8"),
    "8 bit for 16": ("red16", lambda p: save_palette(p, stripes((7, 8))), "8 bits per channel where 16 are expected"),
    "grey of 16": ("red16", lambda p: save_png16(p, stripes((7, 8))), "mode I;16 and 16 bits cannot be a label"),
    "colour for ids": ("index", lambda p: save_image(p, picture(stripes((7, 8)))), "mode RGB .*cannot be a label read by"),
    "1 bit": ("index", lambda p: Image.fromarray(stripes((0, 1)) > 0).save(p), "cannot be a label"),
    "lossy": ("index", lambda p: Image.fromarray(stripes((7, 8)).astype(np.uint8)).save(p, "JPEG"), "JPEG of mode L"),
}


@pytest.mark.parametrize("how", LABELS)
def test_labels_that_cannot_hold_ids_are_refused(tmp_path, how):
    """Each of these decodes without an error, to numbers that are not the ids."""
    read, write, words = LABELS[how]
    path = tmp_path / "label.png"
    write(path)
    with pytest.raises(UserError, match=words) as error:
        datasets.read_label(str(path), read, np.zeros(datasets.VALUES[read], np.int16))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_4_bit_greyscale_labels_are_refused(tmp_path):
    """Pillow multiplies their values by 17: id 1 would be read as 17."""
    path = tmp_path / "label.png"
    write_png(path, 4, 1, 4, 0, b"\0" + bytes([0x01, 0x23]))
    assert np.asarray(Image.open(path)).tolist() == [[0, 17, 34, 51]]
    with pytest.raises(UserError, match="4 bits cannot be a label"):
        datasets.read_label(str(path), "index", np.zeros(256, np.int16))


def test_unknown_colour_names_colour_file_and_pixels(tmp_path):
    """A simulator's update adds a class; its colour must not become void in silence."""
    tree = make_own(tmp_path)
    label = tmp_path / "simulator/drives/a/semantic/0_seg.png"
    pixels = np.array(Image.open(label))
    pixels[:2, :3] = (1, 2, 3)
    save_image(label, pixels)
    with pytest.raises(UserError, match=r"0_seg\.png: unknown label colour \[1, 2, 3\] \(6 pixels\)"):
        Scenes(load_tree(tmp_path, tree), "source", "train", labels=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_reading_process_stays_one_line(tmp_path, workers):
    """A bad file that the start's sample missed stops training with the same one line, not with a worker's traceback."""
    cfg, image, label = one_pair(tmp_path)
    source = Scenes(cfg, "source", "train", labels=True)
    label.write_bytes(label.read_bytes()[:80])
    with pytest.raises(UserError, match=r"labels/00001\.png: not a readable image") as error:
        list(Batches(cfg, "test", 7, None, source=source).loader(0, 1, workers))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(label))


# ---------------------------------------------------------------------------------------------------------- batches


class Planted:
    """Scenes whose pixels say where they come from: channels are (index, row, column), the label is 16 * row + column."""

    role = "source"

    def __init__(self, count, size=(12, 16), offset=0):
        self.size, self.count, self.offset = size, count, offset

    def __len__(self):
        return self.count

    def image(self, i):
        row, column = torch.meshgrid(*(torch.arange(n) for n in self.size), indexing="ij")
        return torch.stack([torch.full(self.size, i + self.offset), row, column]).byte()

    def label(self, i):
        _, row, column = self.image(i)
        return row * 16 + column


def planted(seed=0, batch=3, crop=(5, 6), count=7, **cfg):
    return Batches(make_cfg(seed=seed, **cfg), "test", batch, crop, source=Planted(count),
                   augmented=Planted(2 * count, offset=100), target=Planted(5))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_stage_and_step():
    """Resuming repeats nothing and skips nothing only if a step's batch can be drawn without the steps before it."""
    batches = planted()
    fourth = batches[4]
    np.random.default_rng().normal()
    torch.rand(3)
    assert same(planted()[4], fourth) and same(batches[4], fourth)
    assert not same(batches[5], fourth)
    assert not same(planted(seed=1)[4], fourth)
    other = planted()
    other.stage = "other"
    assert not same(other[4], fourth)


def test_workers_do_not_change_the_batches(folders):
    """The number of reading processes is a matter of speed: it must not change a single pixel."""
    cfg = cfg_of(folders)
    batches = Batches(cfg, "test", 2, [16, 16], source=Scenes(cfg, "source", "train", labels=True),
                      target=Scenes(cfg, "target", "train", labels=False), jitter=1.0)
    runs = [list(batches.loader(1, 5, workers)) for workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 4
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert same(runs[0][0], batches[1])  # a run that starts at step 1 gets step 1


@pytest.mark.parametrize("name, count", [("x_s", 7), ("x_t", 5)])
def test_every_image_is_drawn_once_per_epoch(name, count):
    """An epoch is a permutation, for source and target each, with an order of its own."""
    batches = planted()
    drawn = torch.cat([batches[step][name][:, 0, 0, 0] for step in range(35)]).tolist()
    epochs = [drawn[k : k + count] for k in range(0, 35, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_image_label_and_augmented_image_share_flip_and_crop():
    """y_s is the label of x_s and of x_g pixel by pixel, so all three get one flip and one crop."""
    flips, corners, styles = set(), set(), set()
    for step in range(20):
        batch = planted()[step]
        for x_s, y_s, x_g in zip(batch["x_s"], batch["y_s"], batch["x_g"], strict=True):
            assert x_s.shape == (3, 5, 6) and y_s.shape == (5, 6)
            assert torch.equal(x_s[1:], x_g[1:])
            assert torch.equal(y_s, x_s[1] * 16 + x_s[2])
            source, style = int(x_s[0, 0, 0]), int(x_g[0, 0, 0]) - 100
            assert style % 7 == source  # a style of the same source image
            styles.add(style // 7)
            flips.add(int(x_s[2, 0, 1]) - int(x_s[2, 0, 0]))
            corners.add((int(x_s[1, 0, 0]), int(x_s[2, 0].min())))
    assert flips == {1, -1} and styles == {0, 1}
    assert {r for r, _ in corners} == set(range(8)) and {c for _, c in corners} == set(range(11))


def test_flip_can_be_switched_off():
    """`flip: false` is for data where left and right differ; without a crop the image then comes whole."""
    batch = planted(crop=None, flip=False)[0]
    for x_s, i in zip(batch["x_s"], batch["x_s"][:, 0, 0, 0], strict=True):
        assert torch.equal(x_s, Planted(7).image(int(i)))


def test_a_crop_larger_than_the_image_is_an_error():
    """Both numbers are in the message, because one of them is the mistake."""
    with pytest.raises(UserError, match=r"\[13, 6\].*\[12, 16\]"):
        planted(crop=[13, 6])


def test_augmented_images_are_read_for_their_source(folders, tmp_path):
    """Augmented image s * n + i belongs to source image i."""
    cfg = cfg_of(folders)
    source = Scenes(cfg, "source", "train", labels=True)
    files = [save_image(tmp_path / f"{k}.png", np.full((20, 28, 3), k)) for k in range(2 * len(source))]
    batch = Batches(cfg, "test", len(source), None, source=source, augmented=Augmented(source, files, "g"))[0]
    order = [Batches(cfg, "test", 1, None, source=source)._index("source", k, len(source)) for k in range(len(source))]
    assert (batch["x_g"][:, 0, 0, 0] % len(source)).tolist() == order


# ----------------------------------------------------------------------------------------------------------- jitter


def test_jitter_of_strength_0_is_the_identity():
    """A strength has to scale everything down to nothing, blur included, or 'off' is not off."""
    x = torch.rand(3, 24, 32)
    for k in range(12):
        torch.testing.assert_close(photometric_jitter(x, 0.0, random_generator(k)), x, atol=2e-3, rtol=0)


def test_jitter_keeps_geometry_and_range():
    """f_seg's labels stay right only if no edge moves; values stay in [0, 1] for what comes after."""
    x = torch.zeros(3, 40, 60)
    x[:, :, 23:] = torch.tensor([0.9, 0.6, 0.3]).view(3, 1, 1)
    changed, found = [], []
    for k in range(40):
        y = photometric_jitter(x, 1.0, random_generator("edge", k))
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
        changed.append(float((y - x).abs().mean()))
        steps = y.mean((0, 1)).diff()
        found.append(int(steps.abs().argmax()))
    assert min(changed) > 0.01
    assert np.mean([f == 22 for f in found]) > 0.9  # noise may win where the draw leaves hardly any contrast


def test_jitter_touches_neither_label_nor_the_draw_of_the_geometry(folders):
    """The same flip and crop with and without jitter: only x_s differs."""
    cfg = cfg_of(folders)
    source = Scenes(cfg, "source", "train", labels=True)
    plain, jittered = (Batches(cfg, "test", 6, [12, 12], source=source, jitter=j)[2] for j in (0.0, 1.0))
    assert torch.equal(plain["y_s"], jittered["y_s"])
    assert not torch.equal(plain["x_s"], jittered["x_s"])


def test_augmented_images_are_jittered_by_draws_of_their_own(folders, tmp_path):
    """The same draw for x_s and x_g would tie two images that are to differ; the target, which is not labelled, stays."""
    cfg = cfg_of(folders)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    copies = Augmented(source, [Path(s.image) for s in source.samples], "copies")
    plain, jittered = (Batches(cfg, "test", 6, [12, 12], source, copies, target, jitter=j)[2] for j in (0.0, 1.0))
    assert torch.equal(plain["x_s"], plain["x_g"])
    assert torch.equal(plain["x_t"], jittered["x_t"]) and torch.equal(plain["y_s"], jittered["y_s"])
    assert not torch.equal(jittered["x_s"], jittered["x_g"]) and not torch.equal(plain["x_g"], jittered["x_g"])


def test_to_float_and_colourise():
    """The ends of both value ranges, and IGNORE as black."""
    assert datasets.to_float(torch.tensor([[[[0, 255]]] * 3]).byte(), "cpu")[0, 0, 0].tolist() == [-1, 1]
    picture = datasets.colourise([[0, 9, IGNORE]], CLASS_LISTS["streets"])
    assert picture[0].tolist() == [[128, 64, 128], [0, 0, 142], [0, 0, 0]]
