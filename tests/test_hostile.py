"""Files that somebody else prepared: none runs code, leaves its folder or fills the memory; each is refused in one line."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_camvid, make_carla, make_cfg, save_image
from PIL import Image

import datasets
from datasets import Sample, Scenes, examine, header_size, links_out, read_image, read_label
from models import FCN8s, build_segmenter, vgg16_state
from runtime import UserError, command_line, load_checkpoint, load_config, run_main, stage_config

TINY = {
    "name": "run", "device": "cpu", "precision": "float32",
    "source": {"dataset": "carla", "size": [16, 24], "images": 5},
    "target": {"dataset": "camvid", "size": [16, 24], "images": 5},
    "fseg": {"width": 0.03, "steps": 0, "crop": None}, "augment": {"styles_per_image": 2},
    "gan": {"steps": 0, "width": 4, "res_blocks": 1, "mlp_dim": 4, "d_width": 4, "d_layers": 2, "d_scales": 1, "crop": None},
    "selfens": {"width": 0.03, "steps": 0, "batch": 1, "variant": "tgcf_da"},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two tiny data sets and a run of the first three stages without a step: all of its files, from random networks."""
    root = tmp_path_factory.mktemp("hostile")
    make_carla(root / "carla")
    make_camvid(root / "camvid")
    tree = TINY | {"output": str(root / "out")}
    for role in ("source", "target"):
        tree[role] = tree[role] | {"root": str(root / tree[role]["dataset"])}
    (root / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for name in ("train_gan", "augment", "train_selfens"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [f"{name}.py", str(root / "tiny.yaml")])
            __import__(name).main()
    return root


@pytest.fixture
def job(finished, tmp_path):
    """A copy that a test may spoil: the data, the run folder, and arguments for that run and for a new one on this data."""
    shutil.copytree(finished, tmp_path / "job", symlinks=True)
    root = tmp_path / "job"
    args = [root / "tiny.yaml", f"output={root / 'out'}"]
    own = [*args, f"source.root={root / 'carla'}", f"target.root={root / 'camvid'}", "name=other"]  # a new run
    (root / "out/other").mkdir()
    shutil.copytree(root / "out/run/selfens", root / "out/other/selfens")
    return SimpleNamespace(root=root, run=root / "out/run", args=args, own=own, augmented=root / "out/run/augmented")


@pytest.fixture
def refused(stage, capfd):
    """refused(stage or function, *arguments): its error line, after a check that there is nothing else on standard error."""

    def run(what, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as status:
            run_main(lambda: what(*argv) if callable(what) else stage(what, *argv))
        shown = capfd.readouterr().err  # of the libraries in C, too
        assert status.value.code == 2
        assert shown.startswith("error: ") and shown.endswith("\n") and len(shown.splitlines()) == 1, shown
        assert shown[:-1].isprintable() and len(shown) < 2500
        return shown

    return run


# ------------------------------------------------------------------------------------------------------ checkpoints


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zipped(**files) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", content)
    return data.getvalue()


def tarred(**files) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def saved(state, **kwargs) -> bytes:
    data = io.BytesIO()
    torch.save(state, data, **kwargs)
    return data.getvalue()


HOSTILE = {  # how -> the file's bytes, from an object whose unpickling is noticed
    "zip": lambda evil: saved({"step": 1, "config": {}, "x": evil}),
    "zip, as a key": lambda evil: saved({"step": 1, "config": {}, (evil,): 1}),
    "legacy": lambda evil: saved({"step": 1, "config": {}, "x": evil}, _use_new_zipfile_serialization=False),
    "bare pickle": lambda evil: pickle.dumps({"step": 1, "config": {}, "x": evil}),
    "pickle of protocol 0": lambda evil: b"cos\nmkdir\n(S'" + str(evil.path).encode() + b"'\ntR.",
    "code in an archive": lambda evil: zipped(data_pkl=pickle.dumps(evil), version="3", byteorder="little"),
    "TorchScript": lambda evil: zipped(data_pkl=pickle.dumps(evil), constants_pkl=pickle.dumps(evil), version="3"),
    "tar": lambda evil: tarred(sys_info=pickle.dumps(evil), pickle=pickle.dumps(evil), storages=pickle.dumps(evil),
                               tensors=pickle.dumps(evil)),
}  # fmt: skip
FOREIGN = {
    "nothing": lambda evil: b"", "a zip of nothing": lambda evil: zipped(), "text": lambda evil: b"<html>404</html>",
    "a NumPy file": lambda evil: b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
    "cut": lambda evil: saved({"step": 1, "config": {}, "x": torch.zeros(999)})[:-700], "a list": lambda evil: saved([1, 2]),
    "a tensor": lambda evil: saved(torch.zeros(3)), "keys that are no texts": lambda evil: saved({1: 2, None: 3}),
}  # fmt: skip


@pytest.mark.parametrize("how", {**HOSTILE, **FOREIGN})
def test_no_weights_file_runs_code(tmp_path, refused, recwarn, how):
    """Checkpoints and weights get passed around, and a pickle is a program: by every way of packing one."""
    path = tmp_path / "given.pt"
    path.write_bytes({**HOSTILE, **FOREIGN}[how](Evil(tmp_path / "touched")))
    assert str(path) in refused(load_checkpoint, path, "get another")
    recwarn.clear()
    assert str(path) in refused(vgg16_state, str(path), True)
    assert not recwarn.list  # they would be more lines
    assert not (tmp_path / "touched").exists()


def test_the_evil_object_is_one(tmp_path):
    """Or the test above would pass whatever torch.load did."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "touched")))
    assert (tmp_path / "touched").is_dir()


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("place, name, items", [
    ("gan/last.pt", "train_gan", []), ("gan/last.pt", "augment", []), ("gan/fseg/last.pt", "train_gan", ["gan.steps=1"]),
    ("selfens/tgcf_da/last.pt", "train_selfens", []), ("selfens/tgcf_da/last.pt", "evaluate", []),
    ("given.pt", "train_gan", ["name=other", "fseg.checkpoint=GIVEN"]),
    ("given.pt", "train_gan", ["name=other", "fseg.pretrained=GIVEN"]),
    ("given.pt", "train_selfens", ["selfens.variant=source_only", "selfens.pretrained=GIVEN"]),
])  # fmt: skip
def test_every_stage_refuses_a_pickle_with_code(job, refused, how, place, name, items):
    """Each place from which a stage reads weights, through its command line."""
    path = job.run / place
    if "fseg" in place:
        (job.run / "gan/last.pt").unlink()
    path.write_bytes(HOSTILE[how](Evil(job.root / "touched")))
    assert str(path) in refused(name, *job.args, *[item.replace("GIVEN", str(path)) for item in items])
    assert not (job.root / "touched").exists()


@pytest.mark.parametrize("f_seg", [None, [1], {"a": 1}, {1: torch.zeros(3)}, {}, "text"], ids=repr)
def test_an_fseg_checkpoint_of_other_content_is_refused(job, refused, f_seg):
    """fseg.checkpoint takes anybody's file: plain values alone do not make it one of f_seg."""
    state = {"step": 1, "config": {}, "classes": list(datasets.CLASS_LISTS["camvid10"])}
    torch.save(state if f_seg is None else state | {"f_seg": f_seg}, job.run / "given.pt")
    assert "given.pt" in refused("train_gan", *job.args, "name=other", f"fseg.checkpoint={job.run / 'given.pt'}")


@pytest.mark.parametrize("change", [
    lambda w: w.to_sparse(), lambda w: torch.empty_like(w, device="meta"), lambda w: w.flatten(), lambda w: [w], lambda w: None,
])  # fmt: skip
def test_weights_that_are_no_plain_tensors_are_refused(tmp_path, refused, change):
    """Sparse tensors and tensors without numbers survive a safe unpickling, and so does whatever stands in their place."""
    state = {f"features.{k}": v for k, v in FCN8s(3, 0.03).features.state_dict().items()}
    torch.save(state, tmp_path / "good.pt")
    FCN8s(3, 0.03, pretrained=str(tmp_path / "good.pt"))
    torch.save(state | {"features.0.weight": change(state["features.0.weight"])}, tmp_path / "bad.pt")
    assert "bad.pt" in refused(lambda: FCN8s(3, 0.03, pretrained=str(tmp_path / "bad.pt")))
    assert "bad.pt" in refused(lambda: build_segmenter(make_cfg(selfens__width=0.03), 3, str(tmp_path / "bad.pt")))


# ------------------------------------------------------------------------------------------------------------- YAML


def laughs(levels=60) -> str:
    """A list of two of a list of two of ...: 2^levels values in a few hundred bytes."""
    lines = [f"    a{i}: &a{i} [{f'*a{i - 1}, *a{i - 1}' if i else '1, 2'}]" for i in range(levels)]
    return "source:\n  ids:\n" + "\n".join(lines) + "\n"


YAML = {  # name -> (text, what the line must name)
    "code": ("name: !!python/object/apply:os.mkdir [touched]\n", "'name'"),
    "object": ("gan:\n  steps: !!python/object/new:os.system [touch touched]\n", "'gan.steps'"),
    "module": ("gan: !!python/module:os\n", "'gan'"), "name": ("output: !!python/name:os.getcwd\n", "'output'"),
    "code as a key": ("source:\n  ids: {? !!python/object/apply:os.mkdir [touched] : 1}\n", "'source.ids'"),
    "code at the top": ("!!python/object/apply:os.mkdir [touched]\n", "top level"),
    "own tag": ("seed: !mine 3\n", "'seed'"), "binary": ("name: !!binary aGk=\n", "'name'"),
    "set": ("seed: !!set {a, b}\n", "'seed'"),
    "wrong tag": ("gan:\n  width: !!int wide\n", "'gan.width'"), "wrong bool": ("flip: !!bool perhaps\n", "'flip'"),
    "laughs": (laughs(), "'source.ids'"),
    "laughs at an int": (laughs().replace("source:\n  ids:", "gan:\n  steps:"), "'gan.steps'"),
    "laughs in a text": (laughs().replace("source:\n  ids:", "name:\n  x:"), "'name'"),
    "merged laughs": ("x: &x0 {a: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, 60)),
                      "'x'"),
    "one list many times": ("source:\n  ids:\n    k: &l [" + "1," * 15000 + "]\n"
                            + "".join(f"    n{i}: *l\n" for i in range(15000)), "'source.ids'"),
    "itself": ("source:\n  ids: &a {b: [*a]}\n", "'source.ids.b'"),
    "itself as a section": ("gan: &a\n  steps: *a\n", "'gan.steps'"),
    "itself at the top": ("&a [*a]\n", "holds itself"),
    "deep lists": ("seed: " + "[" * 20000 + "]" * 20000, "too deep"), "deep mappings": ("seed: " + "{a: " * 20000, "too deep"),
    "deep sections": ("".join(" " * i + "a:\n" for i in range(1300)), "too deep"), "open brackets": ("[" * 90000, "too deep"),
    "nested 50": ("source:\n  exclude: " + "[" * 50 + "]" * 50, "'source.exclude'"),
    "long": ("# " + "x" * 1_000_000, "1000000 bytes"), "long text": ("output: " + "x" * 900_000, "'output'"),
    "long key": ("x" * 1000 + ": 1", "unknown key"), "long number": ("seed: " + "9" * 900_000, "'seed'"),
    "long sexagesimal": ("seed: 1" + ":1" * 400_000, "'seed'"),
    "long hexadecimal": ("gan: {steps: 0x" + "f" * 9000 + "}", "'gan.steps'"),
    "NUL": ("name: a\0b\n", "position"), "NUL escaped": ('output: "a\\0b"\n', "'output'"),
    "not UTF-8": (b"name: \xff\xfe\n", "cannot be read"), "UTF-16": ("name: a\n".encode("utf-16-be"), "hostile.yaml"),
    "half a surrogate": ('output: "\\ud800"\n', "'output'"), "half a surrogate as key": ('"\\udfff": 3\n', "unknown key"),
    "no character": ('output: "\\UFFFFFFFF"\n', "hostile.yaml"), "new lines": ('"a\\nerror: b\\r\\n": 3\n', "unknown key"),
    "terminal codes": ('flip: "\\e[2J\\e]0;x\\a"\n', "'flip'"), "right to left": ('flip: "\\u202e\\u2066"\n', "'flip'"),
    "line separators": ('precision: "\\u2028\\x85\\u2029"\n', "'precision'"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "document"),
    "key of a list": ("? [a, b]\n: 1\n", "key"),
    "dotted and nested": ("gan.steps: 1\ngan: {steps: 2}\n", "'gan.steps' stands twice"),
    "date": ("seed: 2020-99-99\n", "'seed'"), "equals": ("seed: =\n", "'seed'"), "merge": ("gan: {<<: {steps: 3}}\n", "gan.<<"),
}  # fmt: skip


@pytest.mark.parametrize("how", YAML)
def test_hostile_yaml_is_refused_in_one_line(tmp_path, monkeypatch, refused, how):
    """It builds nothing, costs no more than its own length, and comes back as one printable line that names the key."""
    monkeypatch.chdir(tmp_path)
    text, named = YAML[how]
    (tmp_path / "hostile.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    line = refused(command_line, "doc", (), None, ["hostile.yaml"])
    assert "hostile.yaml" in line and named in line, line
    assert time.monotonic() - start < 10
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.yaml"]


def test_anchors_and_dates_may_be_used(tmp_path):
    """What is refused is what cannot end well: an anchor as such saves typing, and a date is a fine name of a folder."""
    text = "source: {size: &s [32, 48], exclude: [2026-05-01]}\ntarget: {size: *s}\nname: 2026-05-01\n"
    (tmp_path / "c.yaml").write_text(text)
    cfg = load_config(str(tmp_path / "c.yaml"))
    assert cfg.target.size == [32, 48] and cfg.source.exclude == ["2026-05-01"] and cfg.name == "2026-05-01"


# ----------------------------------------------------------------------------------------------------------- images


def png(width, height, depth=1, colour=0, data=None, more=b"") -> bytes:
    """A PNG from its header and image data (by default all zeros, in full); more: chunks before the data."""
    if data is None:
        row, packer = bytes(1 + -(-width * depth // 8)), zlib.compressobj(9)
        data = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    packed = [chunk(*c) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + packed[0] + more + packed[1] + packed[2]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """40,000 x 40,000 pixels: whole with 1 bit each (195 kB), and as a few hundred bytes of the other kinds."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "whole.png").write_bytes(png(40_000, 40_000))
    little = zlib.compress(bytes(100_000))
    for name, depth, colour in (("grey", 8, 0), ("colour", 8, 2), ("alpha", 8, 6), ("colour16", 16, 2)):
        (folder / f"{name}.png").write_bytes(png(40_000, 40_000, depth, colour, little))
    palette = chunk(b"PLTE", bytes(range(30)))
    (folder / "palette.png").write_bytes(png(40_000, 40_000, 8, 3, little, palette))
    (folder / "warned.png").write_bytes(png(10_000, 10_000, 8, 2, little))  # between Pillow's warning and its error
    assert max(p.stat().st_size for p in folder.iterdir()) < 250_000
    return folder


@pytest.fixture
def frugal():
    """The test takes neither long nor hundreds of megabytes more than the process had before."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["whole", "grey", "colour", "alpha", "palette", "colour16", "warned"])
def test_an_image_of_a_billion_pixels_is_refused(bombs, refused, frugal, name):
    """A few kilobytes that unpack to gigabytes: as an image, and as a label of every way of reading."""
    path, table = str(bombs / f"{name}.png"), np.zeros(1 << 24, np.int16)
    read = "red16" if name == "colour16" else "index"
    calls = [lambda: header_size(path), lambda: read_image(path)]
    calls += [lambda r=r: read_label(path, r, table) for r in ("index", "red", "red16", "rgb")]
    for call in calls:
        line = refused(call)
        assert path in line and "pixels" in line
    for decode in (False, True):
        assert len(examine(Sample("a", path, path), read, table, decode)[0]) == 2


def test_every_stage_refuses_an_image_of_a_billion_pixels(job, bombs, refused, frugal):
    """Through the command lines: as a source image, a label, an augmented image, a target image, and under --images."""
    cases = [
        ("carla/CameraRGB/001000.png", "train_gan", []), ("carla/CameraMask/001000.png", "train_gan", []),
        ("camvid/train/f001.png", "train_gan", []), ("out/run/augmented/style1/001000.png", "train_selfens", []),
        ("camvid/valannot/f001.png", "evaluate", []),
        ("images/a/b.png", "evaluate", ["--images", job.root / "images", "--out", job.root / "p"]),
    ]  # fmt: skip
    save_image(job.root / "images/0.png", np.zeros((8, 8, 3)))
    (job.root / "camvid/train/f001.jpg").unlink()
    for place, name, more in cases:
        path = job.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else (job.root / "camvid/train/f002.jpg").read_bytes()
        path.write_bytes((bombs / "whole.png").read_bytes())
        line = refused(name, *(job.args if name == "train_selfens" else job.own), *more)
        assert str(path) in line and "pixels" in line
        path.write_bytes(before)
    assert not (job.root / "p/train_ids").exists()


def text_bomb(kind: bytes, head: bytes) -> bytes:
    return png(8, 8, 8, 2, zlib.compress(bytes(25 * 8)), chunk(kind, head + zlib.compress(bytes(90_000_000), 9)))


@pytest.mark.parametrize("how", ["text", "international text", "colour profile", "no end", "GIF", "PostScript"])
def test_other_hostile_images_are_refused(tmp_path, frugal, how):
    """Metadata that unpacks to 90 MB, a chunk longer than the file, and formats whose readers start programs."""
    path = tmp_path / "x.png"
    path.write_bytes({
        "text": lambda: text_bomb(b"zTXt", b"key\0\0"), "international text": lambda: text_bomb(b"iTXt", b"key\0\1\0\0\0"),
        "colour profile": lambda: text_bomb(b"iCCP", b"key\0\0"),
        "no end": lambda: png(8, 8, 8, 2, b"")[:33] + b"\x7f\xff\xff\xffIDATx",
        "GIF": lambda: b"GIF89a\x10\0\x10\0\0\0\0;",
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file\n",
    }[how]())  # fmt: skip
    with pytest.raises(UserError, match="x.png: not a readable image"):
        read_image(str(path))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow thinks of the EXIF
def test_spoiled_bytes_of_images_never_make_a_traceback(tmp_path):
    """800 PNG and JPEG files with bytes changed under valid checksums, read in every way: an image, or a UserError."""
    rng, table, seen = random.Random(0), np.zeros(1 << 24, np.int16), {True: 0, False: 0}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "text", 1.5
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    bases = []
    for mode, kind in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG")):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind, exif=exif, icc_profile=b"profile")
        bases.append(file.getvalue())

    def spoil(data: bytes) -> bytes:
        data = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            i = rng.randrange(len(data) + 1)
            new = [rng.choice((0, 1, 127, 255, rng.randrange(256))) for _ in range(rng.randrange(3))]
            data[i : i + rng.randrange(3)] = bytes(new)
        return bytes(data)

    calls = [header_size, read_image, *(lambda p, r=r: read_label(p, r, table) for r in ("index", "red", "red16", "rgb"))]
    for _ in range(800):
        data = rng.choice(bases)
        if data.startswith(b"\x89PNG"):
            chunks, at = [], 8
            while at < len(data):
                length = struct.unpack_from(">I", data, at)[0]
                chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
                at += 12 + length
            i = rng.randrange(len(chunks))
            chunks[i] = (chunks[i][0], spoil(chunks[i][1]))
            if rng.random() < 0.2:
                kind = rng.choice([b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"gAMA", b"IHDR"])
                chunks.insert(rng.randint(1, len(chunks)), (kind, spoil(bytes(12))))
            data = data[:8] + b"".join(chunk(*c) for c in chunks)
        else:
            i = rng.choice([rng.randrange(2, 160), rng.randrange(len(data))])
            data = data[:i] + spoil(data[i : i + 40]) + data[i + 40 :]
        path = tmp_path / "x.png"
        path.write_bytes(data)
        for call in calls:
            try:
                call(str(path))
                seen[True] += 1
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                seen[False] += 1
    assert min(seen.values()) > 500


# -------------------------------------------------------------------------------------------------------- augmented/


@pytest.mark.parametrize("line", [
    {"file": "../gan/last.pt"}, {"file": "style0/../../../x.png"}, {"file": "/etc/passwd"}, {"file": "style0/\0.png"},
    {"file": 3}, {"file": None}, {"file": ["style0/000000.png"]}, {"file": {}}, {"generator": 3}, {"generator": None},
    {"generator": "another\n\x1b[31m"}, 3, None, [], "style0/000000.png", {}, "[" * 100_000,
], ids=lambda x: str(x)[:40])  # fmt: skip
@pytest.mark.parametrize("name", ["augment", "train_selfens"])
def test_hostile_manifests_are_refused(job, refused, name, line):
    """A line is data: one that points elsewhere, or is no line of augment.py's at all, is named by its number."""
    path = job.augmented / "manifest.jsonl"
    lines = path.read_text().splitlines()
    if isinstance(line, dict) and line:
        line = json.loads(lines[2]) | line
    lines.insert(2, line if isinstance(line, str) and line.startswith("[") else json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    shown = refused(name, *job.args)
    assert str(path) in shown and ("line 3" in shown or "generator" in shown), shown


@pytest.mark.parametrize("content", [
    "null", "3", "[]", '"text"', "{}", '{"config": {}}', '{"generator": "x"}', '{"config": [], "generator": "x"}',
    '{"config": {}, "generator": 3}', "", "{", "[" * 100_000, b"\xff",
], ids=lambda x: str(x)[:30])  # fmt: skip
@pytest.mark.parametrize("name", ["augment", "train_selfens"])
def test_hostile_identities_are_refused(job, refused, name, content):
    """identity.json says what the images are of; of any other content it says nothing."""
    (job.augmented / "identity.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "identity.json" in refused(name, *job.args)


def test_a_manifest_that_is_no_text_is_refused(job, refused):
    """Bytes that are not UTF-8, and a folder in its place."""
    path = job.augmented / "manifest.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    assert str(path) in refused("augment", *job.args) and str(path) in refused("train_selfens", *job.args)
    path.unlink()
    path.mkdir()
    assert str(path) in refused("augment", *job.args) and str(path) in refused("train_selfens", *job.args)


@pytest.mark.parametrize("place", ["style0/000000.png", "style1", "style9", "manifest.jsonl", "sheets"])
@pytest.mark.parametrize("name", ["augment", "train_selfens"])
def test_links_out_of_augmented_are_refused(job, refused, name, place):
    """One that leads elsewhere would be read into the training, or written through."""
    path, elsewhere = job.augmented / place, job.root / "elsewhere"
    elsewhere.mkdir()
    if path.exists():
        path.rename(elsewhere / "it")
    path.symlink_to(elsewhere / "it" if (elsewhere / "it").exists() else elsewhere)
    shown = refused(name, *job.args)
    assert str(path) in shown and str(elsewhere) in shown and "remove the link" in shown


def test_augmented_may_be_a_link_itself(job, stage, capsys):
    """Thousands of images go to another disk as one folder, with links in it that stay in it."""
    job.augmented.rename(job.root / "disk")
    job.augmented.symlink_to(job.root / "disk")
    (job.root / "disk/style0/000000.png").rename(job.root / "disk/moved")
    (job.root / "disk/style0/000000.png").symlink_to("../moved")
    stage("augment", *job.args)
    assert "nothing to do" in capsys.readouterr().out
    stage("train_selfens", *job.args)


# ------------------------------------------------------------------------------------------------------------- links


def move_and_link(path, elsewhere):
    """Moves a file or folder elsewhere and leaves a link to it."""
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize("place, role", [
    ("carla/CameraRGB/001000.png", "source"), ("carla/CameraMask/001000.png", "source"), ("carla/CameraRGB", "source"),
    ("carla/CameraMask", "source"), ("camvid/train/f001.jpg", "target"), ("camvid/train", "target"),
])  # fmt: skip
def test_links_out_of_a_data_set_are_refused(job, refused, stage, place, role):
    """A data set from elsewhere must not decide what else on this disk is read; its owner may allow it by a key."""
    move_and_link(job.root / place, job.root / "disk2")
    line = refused("train_gan", *job.own)
    assert place in line and "disk2" in line and f"{role}.follow_links=true" in line
    stage("train_gan", *job.own, f"{role}.follow_links=true")


def test_links_within_root_and_root_itself_may_be_links(job, stage):
    """A root on another disk is chosen by its owner, and a link that stays inside shows nothing else."""
    move_and_link(job.root / "carla", job.root / "disk2")
    image = job.root / "carla/CameraRGB/001000.png"
    image.rename(job.root / "carla/kept.png")
    image.symlink_to("../kept.png")
    stage("train_gan", *job.own)


def test_dangling_and_circular_links_are_named(job, refused):
    """Neither can be resolved to a file."""
    for target in ("nowhere.png", "001000.png"):
        path = job.root / "carla/CameraRGB/001000.png"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        assert "001000.png" in refused("train_gan", *job.own)


def test_the_check_names_links_and_opens_none(job, capsys, stage, monkeypatch):
    """python datasets.py lists every such file, as any other problem, without a look at what it leads to."""
    for place in ("carla/CameraRGB/001000.png", "carla/CameraMask/002000.png", "camvid/valannot/f001.png"):
        move_and_link(job.root / place, job.root / "disk2")
    opened, really = [], datasets._open
    monkeypatch.setattr(datasets, "_open", lambda path, *a, **k: (opened.append(path), really(path, *a, **k))[1])
    with pytest.raises(UserError, match="3 problems"):
        stage("datasets", *job.own)
    out = capsys.readouterr().out
    assert all(f"{name}: leads to" in out for name in ("RGB/001000.png", "Mask/002000.png", "valannot/f001.png"))
    assert opened and not [p for p in opened if os.path.islink(p)]
    assert "Traceback" not in out and 'source.exclude: ["001000", "002000"]' in out


def test_the_check_survives_a_data_set_of_links_alone(job, stage, capsys):
    """Then nothing is left to decode."""
    move_and_link(job.root / "camvid/train", job.root / "disk2")
    with pytest.raises(UserError, match="problems"):
        stage("datasets", *job.own)
    assert "target train" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["image", "folder"])
def test_links_out_of_images_are_refused(job, refused, what):
    """evaluate.py --images predicts what is below DIR; a linked folder would be left out, which must not be silent."""
    save_image(job.root / "images/a/b.png", np.zeros((8, 8, 3)))
    path = job.root / ("images/a/b.png" if what == "image" else "images/a")
    move_and_link(path, job.root / "disk2")
    save_image(job.root / "images/c.png", np.zeros((8, 8, 3)))
    line = refused("evaluate", *job.args, "--images", job.root / "images", "--out", job.root / "p")
    assert str(path) in line and "disk2" in line and "copy it" in line
    assert not (job.root / "p").exists()


def test_links_out(tmp_path):
    """Names that begin alike are not the same folder, and '..' in a link counts as where it leads."""
    for folder in ("root", "root2"):
        save_image(tmp_path / folder / "x.png", np.zeros((2, 2, 3)))
    links = {"up": "../root2/x.png", "in": "x.png", "over": "../root/x.png", "gone": "../none", "abs": "/etc/hostname"}
    for name, target in links.items():
        (tmp_path / "root" / name).symlink_to(target)
    paths = sorted((tmp_path / "root").iterdir())
    out = links_out(paths, tmp_path / "root")
    assert {os.path.basename(p) for p in out} == {"up", "gone", "abs"}
    assert out[str(tmp_path / "root/up")] == str((tmp_path / "root2/x.png").resolve())
    assert not links_out(paths, "/")


def test_follow_links_changes_no_result():
    """A run may be continued with another value: what is read is the same."""
    cfgs = [make_cfg(source__images=2, source__follow_links=value) for value in (False, True)]
    assert len({str(Scenes(cfg, "source", "train", True).samples) for cfg in cfgs}) == 1
    assert stage_config(cfgs[0], ("", "source")) == stage_config(cfgs[1], ("", "source"))
