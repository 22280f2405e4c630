"""Translates the source images with a tool that is not ours, for augment.method=folder: scikit-image's histogram matching.

    pip install scikit-image
    python tests/match_histograms.py CFG --out DIR [key=value ...]
    python augment.py CFG augment.method=folder augment.folder=DIR [key=value ...]

Each channel of a source image gets the histogram of the same channel of its guide, the one that augment.py draws for that
image and writes to its manifest. Images are matched at source.size and written as PNG under the source image's name, below
DIR or, where augment.styles_per_image is more than 1, DIR/style0, DIR/style1, ... Those that are there are left alone.
"""

import sys
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from datasets import Scenes  # noqa: E402
from runtime import UserError, atomic_write, command_line, random_generator, run_main  # noqa: E402


def main() -> None:
    def arguments(parser):
        parser.add_argument("--out", required=True, help="folder for the images")

    cfg, args = command_line(__doc__, ("", "source", "target", "augment"), arguments)
    try:
        from skimage.exposure import match_histograms
    except ImportError:
        raise UserError("scikit-image is not installed, and nothing else needs it; run pip install scikit-image") from None
    source, target = Scenes(cfg, "source", "train", labels=False), Scenes(cfg, "target", "train", labels=False)
    styles, made, seconds = cfg.augment.styles_per_image, 0, 0.0
    for i in tqdm(range(styles * len(source)), desc="match_histograms", mininterval=10):
        name = source.samples[i % len(source)].name
        file = Path(args.out, f"style{i // len(source)}" if styles > 1 else "", f"{name}.png")
        if file.exists():
            continue
        guide = int(random_generator(cfg.seed, "augment", i).integers(len(target)))
        x_s, x_t = (scenes.image(n).permute(1, 2, 0).numpy() for scenes, n in ((source, i % len(source)), (target, guide)))
        start = time.perf_counter()
        x_g = match_histograms(x_s, x_t, channel_axis=-1)
        made, seconds = made + 1, seconds + time.perf_counter() - start
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, lambda out, x_g=x_g: Image.fromarray(x_g.round().clip(0, 255).astype("uint8")).save(out, "PNG"))
    print(f"match_histograms: {made} images made in {args.out}, {1000 * seconds / max(made, 1):.1f} ms each without reading "
          "and writing")


if __name__ == "__main__":
    run_main(main)
