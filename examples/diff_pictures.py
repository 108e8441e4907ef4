"""The pictures of docs/diff.md: the page that `fxprune.diff` writes, and masks, of ResNet-20 pruned 2:4.

    python examples/diff_pictures.py resnet20.th cifar10.npz docs/images

The page is photographed with Chromium, which has to be installed: on Debian, apt-get install chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

import fxprune
from fxprune.data import calibration_loader, load_data
from fxprune.experiments.checkpoints import load_weights
from fxprune.plots import mask_pictures, save_figure

LAYERS = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")


def main() -> None:
    """Prune, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="of ResNet-20")
    parser.add_argument("data", help="name or file of a data set")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    args = parser.parse_args()
    model = load_weights(fxprune.models.create("resnet20"), args.weights).eval()
    info = fxprune.models.model_info("resnet20")
    images = calibration_loader(load_data(args.data, mean=info.mean, std=info.std).train, images=256)
    compiled = fxprune.compile(model, images, "2:4", progress=False)
    weights = {name: compiled.get_submodule(name).weight for name in LAYERS}
    save_figure(mask_pictures(weights, "ResNet-20, 2:4"), args.folder / "masks", formats=("png",), dpi=110)
    result = fxprune.diff(model, compiled, example_inputs=next(iter(images))[0])
    print(result)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium is installed; the picture of the page is left out")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "diff.html"
        result.to_html(page)
        picture = (args.folder / "diff.png").resolve()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,720"]
        subprocess.run([browser, *flags, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("RGB").quantize(96).save(picture, optimize=True)


if __name__ == "__main__":
    main()
