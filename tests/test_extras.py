"""What is not in the paper, and off without a word in the config: its formulas, and that it does what its key says.

Also what looks at finished runs: kept teachers, the judge of augmented images, figures, and the script of all experiments.
"""

import copy
import json
import os
import stat
import subprocess

import numpy as np
import pytest
import torch
from conftest import REPO, make_camvid, make_carla, make_cfg
from PIL import Image
from test_speed import PLAIN, no_check
from test_stages import write_config

import datasets
from datasets import Batches, Scenes
from losses import IGNORE, class_weights, consistency, cross_entropy, style_loss, style_statistics
from models import DeepLabVGG16, FCN8s, Generator, MultiScaleDiscriminator, build_segmenter
from runtime import KEYS, UserError, load_checkpoint, weights_digest
from train_gan import gan_step
from train_selfens import DomainPasses, track_statistics


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("confidence, balance", [(0.6, 0.0), (0.0, 0.7), (0.5, 1.0)])
def test_weighted_consistency_is_its_formula(confidence, balance):
    """Cells of an unsure teacher count as 0 but remain in the mean; rare classes weigh more, with a mean weight of 1."""
    rng = np.random.default_rng(0)
    s, t = (rng.normal(0, 2, (3, 4, 5, 6)) for _ in range(2))
    t[:, 0] += 2  # a frequent class
    p, q = softmax(s), softmax(t)
    k, per_cell = q.argmax(1), ((p - q) ** 2).mean(1)
    share = np.bincount(k.ravel(), minlength=4) / k.size
    w = np.maximum(share, 0.01) ** -balance
    w = (w / (w * share).sum())[k]
    assert w.mean() == pytest.approx(1)
    expected = (per_cell * w * (q.max(1) >= confidence)).mean()
    a, b = torch.tensor(s, requires_grad=True), torch.tensor(t, requires_grad=True)
    loss = consistency(a, b, confidence, balance)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)  # shares are in float32
    loss.backward()
    assert b.grad is None and a.grad.abs().sum() > 0
    assert float(consistency(a, b)) == pytest.approx(((p - q) ** 2).mean(), rel=1e-12)


def test_class_weights_and_weighted_cross_entropy():
    """(share)^-balance with a mean of 1 over all pixels: 0 changes nothing, 1 gives every class the same say."""
    pixels = np.array([[900, 60, 0], [0, 30, 10]])
    assert class_weights(pixels, 0.0).tolist() == [1, 1, 1]
    w = class_weights(pixels, 1.0).double().numpy()
    np.testing.assert_allclose(w * pixels.sum(0) / 1000, [1 / 3] * 3, rtol=1e-6)
    half = class_weights(pixels, 0.5).double()
    rng = np.random.default_rng(1)
    z, y = torch.tensor(rng.normal(size=(2, 3, 4, 5))), torch.tensor(rng.integers(0, 3, (2, 4, 5)))
    y[0, 0] = IGNORE
    kept = y != IGNORE
    picked = -z.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, y[kept][:, None])[:, 0]
    expected = (picked * half[y[kept]]).sum() / kept.sum()
    assert float(cross_entropy(z, y, weight=half.float())) == pytest.approx(float(expected), rel=1e-6)


def test_style_loss_is_the_distance_of_six_numbers():
    """Mean and deviation of each channel; 0 for the same colours in another place, and differentiable for a flat image."""
    rng = np.random.default_rng(2)
    g, t = rng.uniform(-1, 1, (2, 3, 8, 9)), rng.uniform(-1, 1, (2, 3, 6, 7))
    numbers = [np.concatenate([x.mean((2, 3)), np.sqrt(x.var((2, 3)) + 1e-6)], 1) for x in (g, t)]
    np.testing.assert_allclose(style_statistics(torch.tensor(g)).numpy(), numbers[0], rtol=1e-12)
    expected = np.abs(numbers[0] - numbers[1]).mean()
    assert float(style_loss(torch.tensor(g), torch.tensor(t))) == pytest.approx(expected, rel=1e-12)
    assert float(style_loss(torch.tensor(g), torch.tensor(g).flip(-1))) < 1e-12
    flat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    style_loss(flat, torch.tensor(t[:1]).float()).backward()
    assert torch.isfinite(flat.grad).all()


def test_more_terms_of_the_generator_reach_it_and_are_reported():
    """lambda_style and lambda_rec change G's update, and only where they are set; L_rec is mean |G(x_t, x_t) - x_t|."""
    def one(**more):
        torch.manual_seed(0)
        G, D = Generator(4, 4, 8, 1, 1), MultiScaleDiscriminator(4, 2, 1)
        f_seg = FCN8s(3, 0.04).eval().requires_grad_(False)
        x_s, x_t, y = torch.rand(2, 3, 32, 32) - 0.5, torch.rand(2, 3, 32, 32) * 2 - 1, torch.randint(0, 3, (2, 32, 32))
        before = float((G(x_t, x_t) - x_t).abs().mean())
        opts = [torch.optim.SGD(net.parameters(), 0.1) for net in (G, D)]
        terms = gan_step(G, D, f_seg, *opts, x_s, x_t, y, 1.0, PLAIN, no_check, **more)
        return terms, G.state_dict(), before

    plain, style, rec = one(), one(lambda_style=5.0), one(lambda_rec=5.0)
    assert set(plain[0]) == {"L_D", "L_GAN", "L_sem"}
    assert set(style[0]) - set(plain[0]) == {"L_style"} and set(rec[0]) - set(plain[0]) == {"L_rec"}
    assert float(rec[0]["L_rec"]) == pytest.approx(rec[2], rel=1e-5)
    assert len({weights_digest(one[1]) for one in (plain, style, rec)}) == 3
    assert style[0]["L_sem"] == plain[0]["L_sem"]
    halves = one(lambda_style=5.0, lambda_rec=5.0, accumulate=2)
    whole = one(lambda_style=5.0, lambda_rec=5.0)
    for name, value in whole[1].items():
        torch.testing.assert_close(halves[1][name], value, atol=2e-5, rtol=1e-3)


def test_spectral_norm_can_be_left_out():
    """The ablation's D has plain convolutions, of the same shapes."""
    with_it, without = MultiScaleDiscriminator(4, 2, 2), MultiScaleDiscriminator(4, 2, 2, spectral=False)
    assert any("parametrizations" in name for name in with_it.state_dict())
    assert not any("parametrizations" in name for name in without.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert [m.shape for m in with_it(x)] == [m.shape for m in without(x)]


# ------------------------------------------------------------------------------------------------ what source is drawn


class FewCars(Scenes):
    """Ten images of class 0; the last one has a block of class 1 as well."""

    def __init__(self):
        self.size, self.role, self.classes = (20, 20), "source", {"road": (1, 1, 1), "car": (2, 2, 2), "never": (3, 3, 3)}

    def __len__(self):
        return 10

    def image(self, i):
        return torch.full((3, 20, 20), i, dtype=torch.uint8)

    def label(self, i):
        y = torch.zeros(20, 20, dtype=torch.uint8)
        if i == 9:
            y[:4, :5] = 1
        return y


def test_rare_classes_are_drawn_by_their_share():
    """P(c) ~ exp((1 - f_c) / T) over the classes that are there; an image of the class then. Off, each image once an epoch."""
    source = FewCars()
    f = np.array([1 - 20 / 4000, 20 / 4000])
    p, images = datasets.images_by_class(source, 0.5)
    expected = np.exp((1 - f) / 0.5)
    np.testing.assert_allclose(p, [*(expected / expected.sum()), 0], rtol=1e-12)
    assert [some.tolist() for some in images] == [[*range(10)], [9], []]

    def drawn(**keys):
        batches = Batches(make_cfg(flip=False, **keys), "selfens", 1, None, source=source)
        return [int(batches[k]["x_s"][0, 0, 0, 0]) for k in range(400)]

    plain, rare = drawn(), drawn(selfens__rare=0.5)
    assert plain.count(9) == 40
    expected = 400 * (p[1] + p[0] / 10)
    assert abs(rare.count(9) - expected) < 5 * np.sqrt(expected)
    assert rare == drawn(selfens__rare=0.5) and len(set(rare)) == 10
    assert drawn(gan__rare=0.5) == plain  # each stage has its own key
    tiny = datasets.images_by_class(source, 1e-6)[0]
    assert tiny.tolist() == [0, 1, 0]


class Shares:
    """A thousand images with any mixture of five classes, the last one in none of them."""

    def __init__(self):
        mixed = np.random.default_rng(0).dirichlet([5, 2, 1, 0.3], 1000)
        self.shares = np.concatenate([mixed, np.zeros((1000, 1))], 1)


def test_source_images_are_drawn_like_the_target_in_content():
    """Of all probabilities with the target's mean shares the nearest to uniform, as far as enough images are left.

    Those, and no others, have that mean and a logarithm that is affine in the shares (Hainmueller 2012).
    """
    source, target = Shares(), np.array([0.4, 0.35, 0.1, 0.15, 0])
    p = datasets.images_like(source, target, 0.01)
    assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0
    np.testing.assert_allclose(p @ source.shares, target, atol=1e-4)
    _, residual, *_ = np.linalg.lstsq(source.shares, np.log(p), rcond=None)  # the shares sum to 1: that is the constant
    assert residual.sum() < 1e-12
    half = datasets.images_like(source, target, 0.5)
    assert 1 / (half**2).sum() == pytest.approx(500, rel=1e-6)
    distances = [np.abs(q @ source.shares - target).sum() for q in (p, half, np.full(1000, 1 / 1000))]
    assert distances == sorted(distances)
    np.testing.assert_allclose(datasets.images_like(source, target, 1), 1 / 1000, rtol=1e-6)
    # Out of reach: all sky and a class that no source image has. As near as enough images allow, and no error.
    far = datasets.images_like(source, np.array([0, 0, 0, 0.5, 0.5]), 0.02)
    assert np.isfinite(far).all() and 1 / (far**2).sum() == pytest.approx(20, rel=1e-6)
    assert (far @ source.shares)[3] > 3 * source.shares[:, 3].mean()


def test_weights_draw_images_and_within_a_class_too():
    """Drawn as often as they weigh; of the images that have the class that `rare` drew, likewise."""
    source, weights = FewCars(), np.array([0.5, 0.3, *[0.2 / 8] * 8])

    def drawn(**keys):
        batches = Batches(make_cfg(flip=False, **keys), "selfens", 1, None, source=source, weights=weights)
        return [int(batches[k]["x_s"][0, 0, 0, 0]) for k in range(1000)]

    plain, rare = drawn(), drawn(selfens__rare=1e-6)
    assert [plain.count(i) / 1000 for i in range(10)] == pytest.approx(weights, abs=0.05)
    assert set(rare) == {9}  # the only one with a car
    assert drawn(selfens__rare=0.5).count(0) > drawn(selfens__rare=0.5).count(1) > 0


def test_guides_are_drawn_anew_and_content_is_not_jittered():
    """Another guide each time an image comes up; content is x_s as it was, flipped and cropped with it."""
    source, guides = FewCars(), FewCars()
    batches = Batches(make_cfg(), "selfens", 2, [8, 12], source=source, guides=guides, jitter=1.0)
    seen = {}
    for step in range(20):
        batch = batches[step]
        assert batch["x_s"].shape == batch["content"].shape == (2, 3, 8, 12) and batch["style"].shape == (2, 3, 20, 20)
        for k in range(2):
            seen.setdefault(int(batch["content"][k, 0, 0, 0]), []).append(int(batch["style"][k, 0, 0, 0]))
            assert len(batch["content"][k].unique()) == 1 < len(batch["x_s"][k].unique())
    assert len(seen) == 10 and all(len(styles) == 4 for styles in seen.values())
    assert sum(len(set(styles)) > 1 for styles in seen.values()) > 8
    assert torch.equal(batches[7]["style"], batches[7]["style"])


# -------------------------------------------------------------------------------------------------- on a finished run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config, and its run: GAN, images, self-ensembling and tgcf_da with kept teachers, Source Only, all evaluated."""
    root = tmp_path_factory.mktemp("extras")
    make_carla(root / "carla")
    make_camvid(root / "camvid")
    config = write_config(root, source__root=str(root / "carla"), target__root=str(root / "camvid"), selfens__batch_norm=True)
    call(config, "train_gan")
    call(config, "augment")
    for variant in ("source_only", "self_ensembling", "tgcf_da", "tgcf_da_se", "target_only"):
        call(config, "train_selfens", f"selfens.variant={variant}", "selfens.snapshot_every=2")
        call(config, "evaluate", f"selfens.variant={variant}")
    return config, root / "out" / "run"


def call(config, name, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{name}.py", str(config), *map(str, argv)])
        __import__(name).main()


def test_kept_teachers_and_their_curve(made, capsys):
    """Every second step's teacher; the last one is the run's own, so the curve ends at evaluate.py's number."""
    config, run = made
    kept = sorted(p.name for p in (run / "selfens/tgcf_da_se").glob("teacher-*"))
    assert kept == ["teacher-0000002.pt", "teacher-0000004.pt"]
    call(config, "evaluate", "--curve")
    assert capsys.readouterr().out.count("\n       ") == 2
    curve = json.loads((run / "eval/curves/tgcf_da_se_val.json").read_text())
    result = json.loads((run / "eval/tgcf_da_se_teacher_val.json").read_text())
    assert curve["step"] == [2, 4]
    assert curve["miou"][-1] == result["miou"] and curve["iou"][-1] == [*result["per_class"].values()]
    teachers = [load_checkpoint(run / f"selfens/tgcf_da_se/{name}.pt", "")["teacher"] for name in ("teacher-0000004", "last")]
    assert weights_digest(teachers[0]) == weights_digest(teachers[1])
    # How often teachers are kept changes nothing else, and may change in a run.
    call(config, "train_selfens", "selfens.snapshot_every=3", "name=other", "selfens.variant=source_only")
    other = load_checkpoint(run.parent / "other/selfens/source_only/last.pt", "")["student"]
    assert weights_digest(other) == weights_digest(load_checkpoint(run / "selfens/source_only/last.pt", "")["student"])
    call(config, "train_selfens", "selfens.snapshot_every=0", "selfens.variant=source_only")
    with pytest.raises(UserError, match="no teachers were kept"):
        call(config, "evaluate", "--curve", "name=nowhere")


def test_the_judge_of_augmented_images(made, capsys, tmp_path):
    """Source images themselves keep every label and follow no guide; another set of images is told from them."""
    config, run = made
    judge = run / "gan/fseg/last.pt"
    call(config, "evaluate", "--augmented", judge)
    assert "is the f_seg that G was trained with" in capsys.readouterr().out
    ours = json.loads((run / "eval/augmented/gan.json").read_text())
    assert 0 <= ours["agreement"] <= 1 and ours["images"] == 12 and ours["method"] == "gan"
    same = ("name=same", "augment.method=folder", f"augment.folder={config.parent / 'carla/CameraRGB'}")
    call(config, "augment", *same)
    call(config, "evaluate", *same, "--augmented", judge)
    assert "attention" not in capsys.readouterr().out  # that run has no f_seg of its own
    result = json.loads((run.parent / "same/eval/augmented/folder.json").read_text())
    assert result["agreement"] == 1 and set(result["agreement per class"].values()) <= {1.0, None}
    assert result["style distance"] == result["style distance of the source"]
    call(config, "augment", "name=reinhard", "augment.method=reinhard")
    call(config, "evaluate", "name=reinhard", "augment.method=reinhard", "--augmented", judge)
    moved = json.loads((run.parent / "reinhard/eval/augmented/reinhard.json").read_text())
    assert moved["style distance"] < 0.5 * result["style distance"] and moved["style correlation"] > 0.5
    with pytest.raises(UserError, match="last.pt of a gan/fseg folder"):
        call(config, "evaluate", "--augmented", run / "gan/last.pt")


def test_the_table_says_how_much_of_the_gap_is_closed(made, tmp_path, capsys):
    """From Source Only (0) to Target Only (100) of the same table; runs that differ in their seed alone are one row."""
    config, run = made
    for name, seed, mious in (("a", 0, (0.2, 0.3, 0.6)), ("a", 1, (0.4, 0.5, 0.8)), ("b", 0, (None, 0.5, None))):
        for variant, miou in zip(("source_only", "tgcf_da_se", "target_only"), mious, strict=True):
            if miou is not None:
                result = json.loads((run / f"eval/{variant}_teacher_val.json").read_text())
                result["config"] |= {"name": f"{name}-{seed}", "seed": seed}
                path = tmp_path / f"{name}-{seed}/eval/{variant}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result | {"miou": miou}))
    call(config, "evaluate", "--table", *[tmp_path / r for r in ("a-0", "a-1", "b-0")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [["a", "source_only"], ["a", "tgcf_da_se"], ["a", "target_only"], ["b", "tgcf_da_se"]]
    assert [row[row.index("±") + 2 if "±" in row else 7] for row in rows] == ["0", "25", "100", "50"]


@pytest.mark.parametrize("choice, domains", [("seen", {"x_t"}), ("all", {"x_s", "x_g", "x_t"}), ("target", {"x_t"})])
def test_batch_norm_statistics_come_from_the_chosen_images(made, monkeypatch, choice, domains):
    """tgcf_da_se: the teacher that is saved is normalised by statistics of these images and no others."""
    import train_selfens

    config, run = made
    seen, original = [], train_selfens.estimate_statistics
    monkeypatch.setattr(train_selfens, "estimate_statistics", lambda model, batches, cast: (
        seen.append(len(batches)), original(model, batches, cast)))
    other = run.parent / f"statistics-{choice}"
    other.mkdir()
    os.symlink(run / "augmented", other / "augmented")
    call(config, "train_selfens", f"name={other.name}", f"selfens.statistics={choice}")
    assert set(seen) == {32 * len(domains)}


def test_target_images_can_borrow_the_labelled_images_statistics():
    """borrows: joined and one by one alike, the last domain is normalised by the running statistics of the one before it."""
    torch.manual_seed(0)
    nets = [DeepLabVGG16(3, 0.05, True, 0.0, (1, 2))]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    a, b, t = (torch.rand(2, 3, 32, 48) - k / 2 for k in range(3))
    joined, apart = (DomainPasses(net.train(), borrows=True) for net in nets[:2])
    outputs = joined([a, b, t]), apart.one_by_one([a, b, t])
    for x, y in zip(*outputs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    track_statistics(nets[2], True)
    nets[2](b)
    for x, y, z in zip(*(net.buffers() for net in nets), strict=True):
        if x.is_floating_point():  # of the rest, nobody reads the number of batches
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(x, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0][2], nets[2].eval()(t), atol=1e-4, rtol=1e-4)
    assert all(m.training for m in nets[1].modules())


def test_borrowed_statistics_do_not_depend_on_saves_and_sheets(made):
    """There the teacher's running statistics are part of every step, so nothing that happens between steps may touch them."""
    config, run = made
    found = []
    for every in (1, 100):
        folder = run.parent / f"borrowed-{every}"
        folder.mkdir()
        os.symlink(run / "augmented", folder / "augmented")
        call(config, "train_selfens", f"name={folder.name}", "selfens.statistics=labelled", f"save_every={every}",
             f"sheet_every={every}", f"selfens.snapshot_every={every}")
        state = load_checkpoint(folder / "selfens/tgcf_da_se/last.pt", "")
        found.append([weights_digest(state[part]) for part in ("student", "teacher")])
    assert found[0] == found[1]
    own = load_checkpoint(run / "selfens/tgcf_da_se/last.pt", "")
    assert weights_digest(own["student"]) != found[0][0]


def test_repainted_in_each_step(made, monkeypatch):
    """x_g is what G makes of the step's x_s and guides, as a PNG would hold it; augment.py's images are not needed."""
    import train_selfens
    from augment import build_translator
    from runtime import load_config

    config, run = made
    seen, original = [], train_selfens.selfens_step
    monkeypatch.setattr(train_selfens, "selfens_step", lambda *args: (seen.append(args[4]), original(*args))[1])
    for name, lengths in (("repaint", [4]), ("again", [2, 4])):  # the second one is stopped, and goes on
        (run.parent / name).mkdir()
        os.symlink(run / "gan", run.parent / name / "gan")
        seen.clear()
        for steps in lengths:
            call(config, "train_selfens", f"name={name}", "selfens.repaint=true", "selfens.variant=tgcf_da",
                 "selfens.schedule=constant", f"selfens.steps={steps}")
    cfg = load_config(str(config), [f"output={run.parent}", "name=repaint"])
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    batches = Batches(cfg, "selfens", cfg.selfens.batch, cfg.selfens.crop, source=source, guides=target)
    G = build_translator(cfg, source, {})[0]
    assert len(seen) == 4 and [*seen[0]] == ["x_s", "x_g"]
    for step, x in enumerate(seen):
        batch = batches[step]
        with torch.no_grad():
            x_g = G(*(batch[name].float() / 127.5 - 1 for name in ("content", "style")))
        assert not x["x_g"].requires_grad
        torch.testing.assert_close(x["x_s"], batch["content"].float() / 127.5 - 1)
        torch.testing.assert_close(x["x_g"], x_g.clamp(-1, 1), atol=1.2 / 255, rtol=0)
        levels = (x["x_g"] + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    a, b = (load_checkpoint(run.parent / name / "selfens/tgcf_da/last.pt", "") for name in ("repaint", "again"))
    assert [weights_digest(a[part]) == weights_digest(b[part]) for part in ("student", "teacher")] == [True, True]


def test_repainting_needs_a_translator(made, tmp_path):
    """Ready images of another tool cannot be painted anew, and G must be there."""
    config, run = made
    keys = ["selfens.repaint=true", "selfens.variant=tgcf_da"]
    with pytest.raises(UserError, match="train_gan.py with this config first"):
        call(config, "train_selfens", f"output={tmp_path}", *keys)
    for image in (run / "augmented/style0").rglob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="selfens.repaint=true: augment.method=folder has no translator"):
        call(config, "train_selfens", f"output={tmp_path}", *keys, "augment.method=folder", f"augment.folder={tmp_path}",
             "augment.styles_per_image=1")


def test_content_is_read_by_fseg_and_drawn_by_both_stages(made, monkeypatch, capsys):
    """class_shares is the mean of f_seg's softmax over target images; source images are drawn by it, Target Only's are not."""
    import train_gan
    import train_selfens
    from evaluate import class_shares, load_fseg
    from runtime import load_config

    config, run = made
    cfg = load_config(str(config), [f"output={run.parent}"])
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    f_seg, digest = load_fseg(run / "gan/fseg/last.pt", source.classes, "cpu")
    shares = class_shares(f_seg, target, 2, torch.device("cpu"), "float32")
    with torch.no_grad():
        z = f_seg(torch.stack([target.image(i) for i in range(len(target))]) / 127.5 - 1).double().numpy()
    np.testing.assert_allclose(shares, softmax(z).mean((0, 2, 3)), rtol=1e-4)
    expected, drawn = datasets.images_like(source, shares, 0.5), []
    assert expected.std() > 0
    for module in (train_gan, train_selfens):
        monkeypatch.setattr(module, "Batches", lambda *args, weights=None, **keys: (
            drawn.append(weights), Batches(*args, weights=weights, **keys))[1])
    (run.parent / "content").mkdir()
    keys = ["name=content", "gan.content=0.5", "selfens.content=0.5"]
    with pytest.raises(UserError, match="selfens.content reads the target by f_seg: run train_gan.py"):
        call(config, "train_selfens", *keys, "selfens.variant=source_only")
    call(config, "train_gan", *keys)
    assert [weights is None for weights in drawn] == [True, False]  # f_seg's and the GAN's
    call(config, "train_selfens", *keys, "selfens.variant=source_only")
    for weights in drawn[1:]:
        np.testing.assert_allclose(weights, expected, rtol=0.05)
    call(config, "train_selfens", *keys, "selfens.variant=target_only")
    assert drawn[-2:] == [None, None]
    state = load_checkpoint(run.parent / "content/selfens/source_only/last.pt", "")
    assert state["data"]["f_seg"] == digest and state["data"]["target train"] == target.digest
    assert "selfens: content, source / target as f_seg reads it / source as drawn: " in capsys.readouterr().out


def test_source_only_can_be_normalised_by_target_images(made):
    """statistics=target re-estimates them for a variant that never sees a target image; its weights stay the same."""
    config, run = made
    call(config, "train_selfens", "name=target-statistics", "selfens.variant=source_only", "selfens.statistics=target")
    paths = (run.parent / name / "selfens/source_only/last.pt" for name in ("run", "target-statistics"))
    a, b = (load_checkpoint(path, "")["teacher"] for path in paths)
    differ = {name.rpartition(".")[2] for name in a if not torch.equal(a[name], b[name])}
    assert differ == {"running_mean", "running_var"}


def test_the_student_can_start_from_fsegs_trunk(made, tmp_path):
    """selfens.pretrained=fseg: the convolutions are f_seg's; what is missing, unfinished or of another width is named."""
    config, run = made
    from runtime import load_config

    def cfg(*items):
        return load_config(str(config), [f"output={run.parent}", *items])

    f_seg = load_checkpoint(run / "gan/fseg/last.pt", "")["f_seg"]
    net = build_segmenter(cfg(), 10, "fseg").state_dict()
    trunk = [name for name in net if name.startswith("features.")]
    assert len(trunk) > 13 and all(torch.equal(net[name], f_seg[name]) for name in trunk)
    with pytest.raises(UserError, match=r"selfens.pretrained=fseg takes f_seg's trunk"):
        build_segmenter(cfg("name=nowhere"), 10, "fseg")
    with pytest.raises(UserError, match="selfens.width and selfens.batch_norm must be fseg's"):
        build_segmenter(cfg("selfens.width=0.1"), 10, "fseg")
    folder = tmp_path / "half/gan/fseg"
    folder.mkdir(parents=True)
    torch.save(load_checkpoint(run / "gan/fseg/last.pt", "") | {"step": 2}, folder / "last.pt")
    with pytest.raises(UserError, match="training stopped at step 2"):
        build_segmenter(cfg("name=half", f"output={tmp_path}"), 10, "fseg")
    (tmp_path / "warm").mkdir()
    os.symlink(run / "gan", tmp_path / "warm/gan")
    call(config, "train_selfens", f"output={tmp_path}", "name=warm", "selfens.pretrained=fseg", "selfens.variant=source_only")


def test_all_of_it_together_trains_and_resumes(made):
    """Every key that is off in the paper's configuration switched on: the stages run, and write finite terms."""
    config, run = made
    on = ["name=plus", "fseg.sup_balance=0.5", "fseg.rare=0.2", "gan.rare=0.2", "gan.lambda_style=1", "gan.lambda_rec=1",
          "gan.warmup_lr=1e-3", "gan.spectral_norm=false", "selfens.pretrained=fseg", "selfens.con_confidence=0.2",
          "selfens.con_balance=0.5", "selfens.jitter=0.5", "selfens.sup_balance=0.5", "selfens.rare=0.2",
          "gan.content=0.5", "selfens.content=0.5", "selfens.repaint=true"]  # fmt: skip
    for name in ("train_gan", "augment", "train_selfens", "evaluate"):
        call(config, name, *on)
    line = json.loads((run.parent / "plus/gan/log.jsonl").read_text().splitlines()[-1])
    assert {"L_D", "L_GAN", "L_sem", "L_style", "L_rec"} <= line.keys()


def test_a_key_that_is_newer_than_the_run_has_its_default(made, tmp_path):
    """A key is added with the value that leaves things as they were, so older runs go on, unless it is given another."""
    config, run = made
    path = run.parent / "older/selfens/source_only"
    path.mkdir(parents=True)
    state = load_checkpoint(run / "selfens/source_only/last.pt", "")
    del state["config"]["selfens.con_balance"]
    torch.save(state, path / "last.pt")
    call(config, "train_selfens", "name=older", "selfens.variant=source_only")
    with pytest.raises(UserError, match=r"selfens.con_balance \(0.0 then, 0.5 now\)"):
        call(config, "train_selfens", "name=older", "selfens.variant=source_only", "selfens.con_balance=0.5")
    assert KEYS["selfens.con_balance"].default == 0


# ------------------------------------------------------------------------------------------------------- the figures


def figure(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["figures.py", *map(str, argv)])
        __import__("figures").main()


def test_figures_are_drawn_from_finished_runs(made, tmp_path, capsys):
    """Each command writes one picture of a sensible size, and prints the numbers that it shows."""
    config, run = made
    for variant in ("self_ensembling", "tgcf_da_se"):
        call(config, "evaluate", "--curve", f"selfens.variant={variant}")
    capsys.readouterr()
    for name in ("curve", "share"):
        figure(name, run, "--out", tmp_path / f"{name}.png")
    figure("share", run)
    for name in ("variants", "training", "styles"):
        figure(name, config, "--out", tmp_path / f"{name}.png")
    out = capsys.readouterr().out
    assert "highest at step" in out and "rank correlation" in out and "content kept" in out
    for name in ("curve", "share", "variants", "training", "styles"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 80 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
            assert (tmp_path / f"{name}.png").stat().st_size < 300_000
    assert (run / "figures/share.png").is_file()


def test_the_figures_row_of_time_is_the_sheets(made, tmp_path):
    """The training sheet cuts rows out of train_selfens.py's sheets: the target image must come out whole, at its place."""
    config, run = made
    figure("training", config, "--out", tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as ours, Image.open(run / "selfens/tgcf_da_se/sheets/consistency-0000004.png") as sheet:
        ours, sheet = np.asarray(ours.convert("RGB")), np.asarray(sheet.convert("RGB"))
    assert ours.shape[1] == sheet.shape[1]
    height = round(32 * 120 / 48)
    np.testing.assert_array_equal(ours[16 : 16 + height, 124:], sheet[16 : 16 + height, 124:])  # the step stands on the first
    assert (ours[16 : 16 + height, :120] == sheet[16 : 16 + height, :120]).mean() > 0.7


@pytest.mark.parametrize("argv, named", [
    (["curve"], "name the run folders"), (["curve", "nowhere"], "nowhere: no such run folder"), (["pie"], "curve | share"),
    ([], "curve | share"),
])  # fmt: skip
def test_figures_of_nothing_are_one_line(argv, named):
    with pytest.raises(UserError, match=named.replace("|", r"\|")):
        figure(*argv)


# ------------------------------------------------------------------------------------------------------ the experiments


@pytest.fixture
def experiments(tmp_path):
    """(run(*rows), calls()): experiments.sh in a copy where `python` only writes down what it was asked."""
    (tmp_path / "experiments.sh").write_text((REPO / "experiments.sh").read_text())
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n! grep -qF -- "$*" {tmp_path}/broken 2> /dev/null\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def run(*rows):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", "experiments.sh", *rows], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"})
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout + done.stderr

    run.folder = tmp_path
    return run


def test_every_row_of_the_experiments_has_valid_keys(experiments):
    """`list` names every row; each config is there and each override is a key with a valid value."""
    from runtime import load_config

    listed = experiments("list")[2].splitlines()
    assert len(listed) > 30
    names = [line.split()[0] for line in listed]
    assert len(set(names)) == len(names)
    for line in listed:
        words = line.split()
        config = next(word for word in words if word.endswith(".yaml"))
        load_config(str(REPO / config), [word for word in words if "=" in word])


def test_experiments_run_once_in_order_and_go_on_where_they_stopped(experiments):
    """A row's stages in order, generator first; a stage that fails stops the row; what is done is not done again."""
    keys = "configs/idd_camvid.yaml selfens.snapshot_every=100 sheet_every=200 name=idd-1 seed=1"
    broken = f"train_selfens.py {keys} selfens.variant=tgcf_da"
    (experiments.folder / "broken").write_text(broken + "\n")
    status, calls, _ = experiments("idd-1")
    assert status == 1 and calls[-1] == broken
    assert [c.split()[0].removesuffix(".py") for c in calls] == [
        "train_selfens", "evaluate", "train_selfens", "evaluate", "evaluate", "train_gan", "augment", "train_gan", "evaluate",
        "train_selfens"]  # fmt: skip
    assert "name=idd-judge-100 seed=100" in calls[7] and "--augmented runs/idd-judge-100/gan/fseg/last.pt" in calls[8]
    (experiments.folder / "broken").unlink()
    status, calls, _ = experiments("idd-1")
    assert status == 0 and calls[0] == broken and sum("train" in c for c in calls) == 3
    assert experiments("idd-1")[:2] == (0, [])
    assert (experiments.folder / "runs/minutes.tsv").read_text().count("idd-1\t") == 15


def test_ablations_borrow_what_they_do_not_change(experiments):
    """An ablation of stage 3 takes the main run's images, one of the GAN its f_seg: made once, by the main row's command."""
    status, calls, _ = experiments("idd-delta-con-10-0", "idd-styles-4-0", "idd-lambda-sem-30-0")
    assert status == 0
    assert [c.split()[0] for c in calls].count("train_gan.py") == 3  # idd-0's, the judge's, lambda_sem's
    assert calls[0].split()[:2] == ["train_gan.py", "configs/idd_camvid.yaml"] and "name=idd-0 " in calls[0]
    runs = experiments.folder / "runs"
    assert os.readlink(runs / "idd-delta-con-10-0/augmented") == "../idd-0/augmented"
    assert os.readlink(runs / "idd-styles-4-0/gan") == "../idd-0/gan" and not (runs / "idd-styles-4-0/augmented").is_symlink()
    assert experiments("no-such-row")[0] == 1
