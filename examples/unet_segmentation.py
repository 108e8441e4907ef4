"""A U-Net pruned 2:4: how many pixels keep their class?

    python examples/unet_segmentation.py                          segmentation_models_pytorch's U-Net with a ResNet-18
    python examples/unet_segmentation.py --weights mine.pt        with trained weights of yours

Without weights the network is a random one, trained for some seconds to tell discs from squares, so that the
example runs offline. Without segmentation_models_pytorch it is torchvision's LRASPP.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

CLASSES, SIZE = 3, 64  # Background, disc, square.
COLOURS = torch.tensor([[0.3, 0.3, 0.3], [0.7, 0.2, 0.2], [0.2, 0.2, 0.7]])


def network() -> nn.Module:
    """A segmentation network with random weights."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    return smp.Unet("resnet18", encoder_depth=3, decoder_channels=(64, 32, 16), encoder_weights=None, classes=CLASSES)


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures, (count, 3, SIZE, SIZE), of a disc and a square each, and the class of every pixel."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(14, SIZE - 14, (count, 2, 2, 1, 1), generator=generator)
    radii = torch.randint(6, 14, (count, 2, 1, 1), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    down, right = (rows - centres[:, :, 0]).abs(), (columns - centres[:, :, 1]).abs()
    disc = down[:, 0] ** 2 + right[:, 0] ** 2 < radii[:, 0] ** 2
    square = torch.maximum(down[:, 1], right[:, 1]) < radii[:, 1]
    masks = torch.where(square, 2, disc.long())
    colours = COLOURS + 0.4 * torch.rand(count, CLASSES, 3, generator=generator)
    pictures = torch.einsum("nchw,ncd->ndhw", F.one_hot(masks, CLASSES).movedim(-1, 1).float(), colours)
    return pictures + 0.1 * torch.randn(pictures.shape, generator=generator), masks


def logits(model: nn.Module, pictures: Tensor) -> Tensor:
    """Scores of every pixel, (N, CLASSES, H, W)."""
    found = model(pictures)
    return found["out"] if isinstance(found, dict) else found


def train(model: nn.Module, steps: int) -> None:
    """A few steps on fresh scenes."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for step in range(steps):
        pictures, masks = scenes(8, seed=1000 + step)
        loss = F.cross_entropy(logits(model, pictures), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def main(folder: Path = Path("out/unet"), weights: Path | None = None, steps: int = 60, images: int = 64) -> float:
    """Run the example; the ONNX file goes into `folder`. Returns the share of pixels that keep their class."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = network()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        with torch.enable_grad():
            train(model, steps)
    pictures, _ = scenes(images, seed=1)
    compiled = fxprune.compile(model.eval(), pictures.split(32), "2:4", method="sparsegpt", progress=False)
    print(compiled.report.summary)

    test, masks = scenes(64, seed=2)
    dense, pruned = (logits(m, test).argmax(1) for m in (model, compiled))
    agreement = float((dense == pruned).float().mean())
    for name, found in (("dense", dense), ("pruned", pruned)):
        overlap = [((found == c) & (masks == c)).sum() / ((found == c) | (masks == c)).sum() for c in range(CLASSES)]
        print(f"{name}: mean intersection over union {float(torch.stack(overlap).mean()):.1%}")
    print(f"{agreement:.2%} of the pixels keep their class")
    print(fxprune.export_onnx(compiled, folder / "unet.onnx", test[:4]).summary)
    return agreement


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/unet"), help="where the ONNX file goes")
    parser.add_argument("--weights", type=Path, help="a state dict; without one the network is trained on the scenes")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.weights, arguments.steps)
