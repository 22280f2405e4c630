"""The data check, and every kind of bad data: found, named, exit status 2, nothing written over, nothing skipped."""

import json
import re

import numpy as np
import pytest
from conftest import digests, make_camvid, make_carla, rgba_label, save_image, shell
from PIL import Image
from published import make_cityscapes, make_gta5, make_synthia, pair_items, save_palette, save_png16, stripes

import datasets
from runtime import UserError, load_config, run_main

IMAGE, LABEL = "gta5/images/00002.png", "gta5/labels/00002.png"


@pytest.fixture
def data(tmp_path):
    """A tiny GTA5 and Cityscapes that a test may spoil, and the arguments that select them: (root, arguments)."""
    make_gta5(tmp_path / "gta5", 12)
    make_cityscapes(tmp_path / "cityscapes")
    return tmp_path, [*pair_items(tmp_path, "gta5", "cityscapes"), f"output={tmp_path / 'out'}", "name=check"]


@pytest.fixture
def check(stage, capsys):
    """check(*arguments): (the one-line error or None, what was printed) of datasets.py in this process."""
    def run(*arguments):
        try:
            stage("datasets", *arguments)
            error = None
        except UserError as failure:
            error = str(failure)
        return error, capsys.readouterr().out

    return run


# ------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_sound_data_is_counted_and_shown(data, check, full):
    """Pairs, shares of the classes and a sheet, in both modes; the sample says that it is one."""
    root, arguments = data
    error, out = check(*arguments, *full)
    assert error is None
    assert re.search(r"source train gta5 +11 images, 11 with label, (all|11) decoded, no problems", out)
    assert re.search(r"target train cityscapes +5 images, labels not looked at", out)
    assert ("a sample:" in out) == (not full) and ("all decoded" in out) == bool(full)
    shares = {m[1].strip(): (m[2], m[3]) for m in re.finditer(r"^(\S.*?) {2,}([\d.-]+) +([\d.-]+)$", out, re.M)}
    labels = np.stack([np.asarray(Image.open(p)) for p in (root / "gta5/labels").iterdir()])
    ids = datasets.train_id_table("gta5", "cityscapes19")[labels]
    assert shares["road"][0] == f"{100 * (ids == 0).sum() / (ids != 255).sum():.2f}"
    assert shares["ignored, of all pixels"][0] == f"{100 * (ids == 255).mean():.2f}"
    assert shares["train"] == ("0.00", "0.00")
    assert re.search(r"note: source has no pixel of .*train", out)
    sheet = Image.open(root / "out/check/check/sheet.png")
    assert sheet.width > 900 and sheet.height > 700


def test_streets_can_be_checked(tmp_path, check):
    """The built-in scenes go the same way, so that the README's first command can be checked first."""
    error, out = check("source.images=3", "target.images=3", f"output={tmp_path}", "--full")
    assert error is None and "10 of streets" in out


def test_the_sheet_shows_labels_over_their_own_image(tmp_path, check):
    """A shifted or foreign label is seen at a glance only if the picture is right: colours of the class on its stripe."""
    cfg = load_config(None, pair_items(tmp_path, "gta5", "cityscapes"))
    root = make_gta5(tmp_path / "gta5")
    make_cityscapes(tmp_path / "cityscapes")
    sample = datasets.Sample("00001", str(root / "images/00001.png"), str(root / "labels/00001.png"))
    image, over = datasets._overlay(cfg, "source", sample, *datasets.class_list(cfg))
    assert image.shape == over.shape == (180, 270, 3)
    mixed = 0.4 * image[90, 15] + 0.6 * np.array((128, 64, 128))
    assert np.abs(over[90, 15] - mixed).max() <= 1
    assert np.abs(over[90, 220] - 0.4 * image[90, 220]).max() <= 1  # id 0, ignored, is dark


# ---------------------------------------------------------------------------------------------------------- bad data


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def put_id(path, value):
    ids = np.array(Image.open(path))
    ids[:2, :3] = value
    save_palette(path, ids)


BAD = {  # how -> (what is done to the data, regular expression of the line that must say so)
    "missing root": (lambda r: (r / "gta5").rename(r / "gone"), "source.root=.*gta5: no such folder; set it"),
    "empty split": (lambda r: [p.unlink() for p in (r / "gta5/images").iterdir()], "source.root=.*gta5: no train images"),
    "image without label": (lambda r: (r / LABEL).unlink(), f"{LABEL}: no such label, for the image .*{IMAGE}"),
    "label without image": (lambda r: (r / IMAGE).unlink(), rf"{LABEL}: a label without its image .*gta5/images/00002\.\*"),
    "differing sizes": (lambda r: save_palette(r / LABEL, stripes((7, 8), (24, 40))),
                        f"{IMAGE}: 36x24 pixels, but its label .*{LABEL} has 40x24"),
    "unknown id": (lambda r: put_id(r / LABEL, 77), rf"{LABEL}: unknown label id 77 \(6 pixels\)"),
    "truncated image": (lambda r: cut(r / IMAGE), f"{IMAGE}: not a readable image"),
    "truncated label": (lambda r: cut(r / LABEL), f"{LABEL}: not a readable image"),
    "empty image": (lambda r: (r / IMAGE).write_bytes(b""), rf"{IMAGE}: the file is empty \(0 bytes\)"),
    "empty label": (lambda r: (r / LABEL).write_bytes(b""), rf"{LABEL}: the file is empty \(0 bytes\)"),
    "text image": (lambda r: (r / IMAGE).write_text("404 not found"), f"{IMAGE}: not a readable image"),
    "text label": (lambda r: (r / LABEL).write_text("404 not found"), f"{LABEL}: not a readable image"),
    "16-bit image": (lambda r: save_png16(r / IMAGE, np.full((24, 36, 3), 300)), f"{IMAGE}: 16 bits .* where 8 are expected"),
    "16-bit label": (lambda r: save_png16(r / LABEL, stripes((7, 8))), f"{LABEL}: 16 bits per channel where 8 are expected"),
    "colour label": (lambda r: save_image(r / LABEL, np.zeros((24, 36, 3))), f"{LABEL}: PNG of mode RGB and 8 bits cannot"),
}


@pytest.mark.parametrize("how", BAD)
def test_training_refuses_bad_data_in_one_line(data, stage, capsys, how):
    """Exit status 2, one line with the file and the mend, and not a file changed: nothing of an earlier run is lost."""
    root, arguments = data
    spoil, words = BAD[how]
    (root / "out/check/gan").mkdir(parents=True)
    (root / "out/check/gan/last.pt").write_text("an earlier run's")
    spoil(root)
    before = digests(root)
    with pytest.raises(SystemExit) as status:
        run_main(lambda: stage("train_gan", *arguments))
    shown = capsys.readouterr().err
    assert status.value.code == 2 and shown.count("\n") == 1
    assert re.search(words, shown), shown
    assert digests(root) == before


@pytest.mark.parametrize("full", [[], ["--full"]])
@pytest.mark.parametrize("how", BAD)
def test_the_check_names_bad_data(data, check, how, full):
    """Whatever training would stumble over is in the report, from the sample as from everything, and it ends in an error."""
    root, arguments = data
    spoil, words = BAD[how]
    spoil(root)
    error, out = check(*arguments, *full)
    assert re.search(words, out), out
    assert re.fullmatch(r"data check: \d+ problems?, each named above", error)


def test_every_bad_file_is_named_and_can_be_excluded(data, check, stage):
    """One run of the check is enough: it names all of them, and the line it prints, pasted, makes the data usable."""
    root, arguments = data
    (root / "gta5/labels/00001.png").unlink()
    (root / "gta5/images/00002.png").unlink()
    cut(root / "gta5/images/00003.png")
    put_id(root / "gta5/labels/00008.png", 99)
    save_palette(root / "gta5/labels/00010.png", stripes((7, 8), (20, 30)))
    cut(root / "cityscapes/leftImg8bit/train/bonn/bonn_000001_000019_leftImg8bit.png")
    error, out = check(*arguments, "--full")
    for name in ("labels/00001", "labels/00002", "images/00003", "labels/00008", "labels/00010", "bonn/bonn_000001"):
        assert re.search(rf"^(source|target): .*{name}", out, re.M), name
    paste = [f"{m[1]}={m[2]}" for m in re.finditer(r"(\w+\.exclude): (\[.*\])", out)]
    assert len(paste) == 2 and set(json.loads(paste[0].partition("=")[2])) == {"00001", "00002", "00003", "00008", "00010"}
    error, out = check(*arguments, *paste, "--full")
    assert error is None and "left out by source.exclude: 00001, 00002, 00003, 00008, 00010\n" in out


def test_exit_status_through_the_real_command_line(data):
    """Scripts and CI see the exit status, not the words."""
    root, arguments = data
    result = shell("datasets.py", *arguments)
    assert result.returncode == 0, result.stderr
    cut(root / IMAGE)
    result = shell("datasets.py", *arguments, "--full")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: data check: 1 problem")
    assert "Traceback" not in result.stderr and f"{IMAGE}: not a readable image" in result.stdout


def test_what_the_sample_misses_full_finds(data, check, monkeypatch):
    """The sample must say that it is one, and --full must really open every file."""
    root, arguments = data
    monkeypatch.setattr(datasets, "SAMPLE", 2)
    put_id(root / "gta5/labels/00006.png", 77)
    error, out = check(*arguments)
    assert error is None and "no problem in the sample" in out
    error, out = check(*arguments, "--full")
    assert error and "00006.png: unknown label id 77" in out


def test_headers_of_all_files_are_read_at_the_start(data):
    """Sizes, missing partners and files that are no images are cheap to see, so training never meets them in the middle."""
    root, arguments = data
    make_gta5(root / "gta5", 60)
    cfg = load_config(None, arguments)
    names = [s.name for s in datasets.Scenes(cfg, "source", "train", labels=True).samples]
    few = np.unique(np.linspace(0, len(names) - 1, 16).astype(int))
    missed = next(i for i in range(len(names)) if i not in few)  # not among the files that are decoded
    for spoil, words in ((lambda p: save_image(p, np.zeros((20, 30, 3))), "30x20 pixels"),
                         (lambda p: p.write_text("no"), "not a readable image")):
        spoil(root / f"gta5/images/{names[missed]}.png")
        with pytest.raises(UserError, match=f"{names[missed]}.png: {words}"):
            datasets.Scenes(cfg, "source", "train", labels=True)


def test_several_unknown_ids_and_their_pixels_are_all_given(data, check):
    """Which id, which file, how many pixels: enough to decide whether it is a new class or a broken file."""
    root, arguments = data
    put_id(root / LABEL, [[60], [61]])
    _, out = check(*arguments)
    assert f"{LABEL}: unknown label id 60 (3 pixels), id 61 (3 pixels)" in out


def test_synthia_in_8_bits_is_named(tmp_path, check):
    """A copy that a tool saved with 8 bits has lost the ids: all of it would be void."""
    make_synthia(tmp_path / "synthia")
    make_cityscapes(tmp_path / "cityscapes")
    arguments = [*pair_items(tmp_path, "synthia", "cityscapes"), f"output={tmp_path / 'out'}"]
    assert check(*arguments)[0] is None
    for path in (tmp_path / "synthia/GT/LABELS").iterdir():
        Image.open(path).save(path)
    error, out = check(*arguments)
    assert "8 bits per channel where 16 are expected" in out and error


def test_class_lists_that_do_not_match_are_an_error(data, check):
    """16 against 19 classes, or none in common, is said before anything is counted."""
    root, _ = data
    make_camvid(root / "camvid", 2, 2)
    make_synthia(root / "synthia")
    for source, target, item in (("gta5", "camvid", "flip=true"), ("synthia", "cityscapes", "classes=cityscapes19")):
        error, _ = check(*pair_items(root, source, target), item, f"output={root / 'out'}")
        assert source in error and target in error and re.search("in common|share", error)


def test_target_training_labels_are_left_alone(tmp_path, check):
    """The check keeps to what unsupervised training reads; for target_only it looks at these labels as well."""
    make_carla(tmp_path / "carla", 8, 1)
    make_camvid(tmp_path / "camvid", bad_train_labels=True)
    arguments = [*pair_items(tmp_path, "carla", "camvid"), f"output={tmp_path / 'out'}", "--full"]
    assert check(*arguments)[0] is None
    error, out = check(*arguments, "selfens.variant=target_only")
    assert "12 problems" in error and out.count("trainannot") == 12


def test_rgba_labels_and_a_label_folder_with_more_files_than_images(tmp_path, check):
    """CARLA's layout keeps the id in red; a stray mask is a label without image, and says so in both splits' folder once."""
    make_carla(tmp_path / "carla", 8, 1)
    make_camvid(tmp_path / "camvid")
    save_image(tmp_path / "carla/CameraMask/999999.png", rgba_label(np.full((40, 56), 7)))
    error, out = check(*pair_items(tmp_path, "carla", "camvid"), f"output={tmp_path / 'out'}")
    assert error == "data check: 1 problem, each named above"
    assert out.count("999999.png: a label without its image") == 1


# ----------------------------------------------------------------------------------------------- folders to write to


@pytest.mark.parametrize("name", ["datasets", "train_gan"])
def test_a_folder_that_cannot_be_written_is_named(data, stage, capsys, name):
    """The disk's refusal is a message with the key to change, before hours of work. (Root may write anywhere, so the
    place is taken by a file.)"""
    root, arguments = data
    (root / "taken").write_text("a file")
    with pytest.raises(SystemExit) as status:
        run_main(lambda: stage(name, *arguments, f"output={root / 'taken'}"))
    shown = capsys.readouterr().err
    assert status.value.code == 2 and re.search(r"taken/check.* cannot be made .*set 'output' to a folder you may write", shown)
    assert (root / "taken").read_text() == "a file"


@pytest.mark.parametrize("where", ["check", "check/check"])
def test_a_read_only_folder_is_named(data, check, where, monkeypatch):
    """The folder is there but nothing may be put into it: the same message, whoever runs the test."""
    root, arguments = data
    (root / "out" / where).mkdir(parents=True)

    def refuse(path, mode="r", *args, **kwargs):
        if "w" in mode and str(path).startswith(str(root / "out")):
            raise PermissionError(13, "Permission denied")
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr("runtime.open", refuse, raising=False)
    error, _ = check(*arguments)
    assert re.search(r"out/check/check/sheet\.png: cannot be written \(Permission denied\)", error)
