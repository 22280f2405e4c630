"""Streets, the readers, and the batches: what is read is right, and what is drawn depends on (seed, stage, step) alone."""

import functools

import numpy as np
import pytest
import torch
from conftest import make_camvid, make_carla, make_cfg, rgba_label, save_image
from PIL import Image

import datasets
from datasets import CLASS_LISTS, Augmented, Batches, Scenes, class_list, photometric_jitter, train_id_table
from losses import IGNORE
from runtime import UserError, random_generator
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


# ---------------------------------------------------------------------------------------------------------- batches


class Planted:
    """Scenes whose pixels say where they come from: channels are (index, row, column), the label is 16 * row + column."""

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
    batch = Batches(cfg, "test", len(source), None, source=source, augmented=Augmented(source, files))[0]
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


def test_to_float_and_colourise():
    """The ends of both value ranges, and IGNORE as black."""
    assert datasets.to_float(torch.tensor([[[[0, 255]]] * 3]).byte(), "cpu")[0, 0, 0].tolist() == [-1, 1]
    picture = datasets.colourise([[0, 9, IGNORE]], CLASS_LISTS["streets"])
    assert picture[0].tolist() == [[128, 64, 128], [0, 0, 142], [0, 0, 0]]
