"""Translators that are not trained: their formulas against plain numpy in float64, and the way of each through the stages."""

import json

import numpy as np
import pytest
import torch
from conftest import make_cfg, save_image
from PIL import Image
from survive import prepare
from test_survive import FEW

import augment
from datasets import Scenes
from runtime import UserError


def images(seed: int, n=2, size=(24, 32)) -> torch.Tensor:
    """Smooth random images in the middle of [-1, 1], so that nothing is clipped."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 4, 5, generator=g, dtype=torch.float64) * 0.6 - 0.3
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)


def ruderman_lab(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) in (0, 1] -> l alpha beta, as the paper prints it, pixel by pixel."""
    lms = np.log10(np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]) @ rgb[..., None])
    scale = np.diag([1 / np.sqrt(3), 1 / np.sqrt(6), 1 / np.sqrt(2)])
    return (scale @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) @ lms)[..., 0]


def test_reinhard_gives_the_guides_statistics():
    """Mean and deviation of each channel of l alpha beta are the guide's; what is left is the source's own pattern."""
    x_s, x_t = images(0), images(1)
    out = augment.reinhard(x_s, x_t)
    for s, t, o in zip(x_s, x_t, out, strict=True):
        s, t, o = (ruderman_lab((x.permute(1, 2, 0).numpy() + 1) / 2) for x in (s, t, o))
        np.testing.assert_allclose(o.mean((0, 1)), t.mean((0, 1)), atol=1e-9)
        np.testing.assert_allclose(o.std((0, 1)), t.std((0, 1)), atol=1e-9)
        pattern = [(x - x.mean((0, 1))) / x.std((0, 1)) for x in (s, o)]
        np.testing.assert_allclose(*pattern, atol=1e-8)
    torch.testing.assert_close(augment.reinhard(x_s, x_s), x_s, atol=1e-9, rtol=0)


def test_reinhard_survives_black_and_flat_images():
    """log(0) and a deviation of 0 are in every data set's night and fog."""
    for value in (-1.0, 1.0):
        flat = torch.full((1, 3, 8, 8), value)
        for pair in ((flat, images(0, 1).float()), (images(0, 1).float(), flat), (flat, flat)):
            out = augment.reinhard(*pair)
            assert torch.isfinite(out).all() and out.abs().max() <= 1


@pytest.mark.parametrize("beta, reach", [(0.0, 0), (0.09, 2), (0.5, 12)])
def test_fda_swaps_the_low_frequencies_amplitudes(beta, reach):
    """Inside the block the amplitudes are the guide's, outside the source's, and all phases are the source's."""
    x_s, x_t = images(0), images(1)
    out = augment.fda(x_s, x_t, beta)
    s, t, o = (np.fft.fft2(x.numpy() + 1) for x in (x_s, x_t, out))
    fy, fx = np.fft.fftfreq(24, 1 / 24), np.fft.fftfreq(32, 1 / 32)
    inside = (np.abs(fy)[:, None] <= reach) & (np.abs(fx)[None] <= reach)
    expected = np.where(inside, np.abs(t), np.abs(s)) * np.exp(1j * np.angle(s))
    expected = np.fft.ifft2(expected).real - 1
    np.testing.assert_allclose(out.numpy(), expected.clip(-1, 1), atol=1e-9)
    assert np.abs(o - s).max() > 1 if reach else np.abs(o[..., 1, 1] - s[..., 1, 1]).max() < 1e-9


def test_fda_takes_a_guide_of_another_size():
    """Source and target need not have one size; the guide is resized, the result has the source's."""
    out = augment.fda(images(0), images(1, size=(40, 30)), 0.1)
    assert out.shape == (2, 3, 24, 32) and torch.isfinite(out).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("translators")
    return prepare(root, **FEW)


@pytest.mark.parametrize("method", ["reinhard", "fda"])
def test_translators_need_no_generator_and_feed_stage_3(data, stage, tmp_path, method, capsys):
    """The row of another translator: augment.py and train_selfens.py alone, run again like any other."""
    args = [data, f"output={tmp_path}", f"augment.method={method}"]
    stage("augment", *args)
    lines = [json.loads(line) for line in (tmp_path / "run/augmented/manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and {line["generator"] for line in lines} == {"reinhard" if method == "reinhard" else "fda 0.01"}
    stage("augment", *args)
    assert "nothing to do" in capsys.readouterr().out
    stage("train_selfens", *args)
    with pytest.raises(UserError, match="augment.method"):
        stage("train_selfens", data, f"output={tmp_path}", "augment.method=folder")
    with pytest.raises(UserError, match=r"gan/last\.pt: no such checkpoint"):
        stage("augment", data, f"output={tmp_path}")


def test_images_of_another_tool(data, stage, tmp_path, monkeypatch):
    """`folder` takes a file for each source image, of any size, PNG or JPEG, and names the first one that is missing."""
    cfg = make_cfg(source__dataset="carla", source__root=str(data.parent / "carla"), target__dataset="camvid",
                   target__root=str(data.parent / "camvid"), source__images=60, source__size=[32, 48])  # fmt: skip
    samples = Scenes(cfg, "source", "train", labels=True).samples
    for k, sample in enumerate(samples):
        save_image(tmp_path / f"ready/{sample.name}{'.jpg' if k % 2 else '.png'}", np.full((20 + k, 30, 3), 3 * k))
    args = [data, f"output={tmp_path}", "augment.method=folder"]
    with pytest.raises(UserError, match="augment.folder=None"):
        stage("augment", *args)
    args.append(f"augment.folder={tmp_path / 'ready'}")
    stage("augment", *args)
    for k, sample in enumerate(samples):
        image = np.asarray(Image.open(tmp_path / f"run/augmented/style0/{sample.name}.png"))
        assert image.shape == (32, 48, 3) and abs(image.astype(int) - 3 * k).max() <= 1
    stage("train_selfens", *args, "selfens.variant=tgcf_da")
    lost = tmp_path / f"ready/{samples[7].name}.jpg"
    lost.unlink()
    with pytest.raises(UserError, match=rf"{samples[7].name}\.png: no such translated image \(1 of 60"):
        stage("augment", *args, "name=other")
    assert not (tmp_path / "other/augmented/style0").exists()
