"""A YOLO detector pruned 2:4: do the same boxes come out?

    python examples/yolo_detector.py                                       YOLO11n as its yaml file says, random weights
    python examples/yolo_detector.py --weights yolo11n.pt --images photos  trained weights, and a folder of pictures

Boxes of the dense and of the pruned network are matched by their overlap: of each picture's best boxes, how many have a partner
of the same class in the other network's, with an intersection over union of at least one half? Random weights say little about
boxes; they show that it runs, offline. Needs ultralytics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, box_iou

import fxprune


def network(name: str, weights: Path | None) -> nn.Module:
    """A detection network of ultralytics', by the name of its yaml file or from a file of weights."""
    if weights is not None:
        from ultralytics import YOLO

        return YOLO(str(weights)).model.float().eval()
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False).eval()


def pictures(folder: Path | None, size: int, count: int) -> Tensor:
    """Pictures of a folder, (N, 3, size, size) in [0, 1]; without one coarse noise."""
    if folder is None:
        coarse = torch.rand(count, 3, size // 16, size // 16, generator=torch.Generator().manual_seed(0))
        return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in (".jpg", ".jpeg", ".png")][:count]
    return torch.stack([resize(decode_image(str(file), ImageReadMode.RGB), [size, size]) for file in files]) / 255


def boxes(found: Tensor | tuple[Tensor, ...], best: int) -> list[tuple[Tensor, Tensor]]:
    """The best boxes of each picture, (x1, y1, x2, y2), and their classes, after non-maximum suppression."""
    predictions = found if isinstance(found, Tensor) else found[0]  # (N, 4 + classes, anchors)
    chosen = []
    for of_picture in predictions:
        corners = box_convert(of_picture[:4].T, "cxcywh", "xyxy")
        scores, classes = of_picture[4:].max(0)
        keep = batched_nms(corners, scores, classes, 0.6)[:best]
        chosen.append((corners[keep], classes[keep]))
    return chosen


def matched(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], overlap: float = 0.5) -> float:
    """Share of boxes that have a partner of their class, each partner taken once."""
    iou = box_iou(ours[0], theirs[0]) * (ours[1][:, None] == theirs[1])
    pairs = 0
    while iou.numel() and float(iou.max()) >= overlap:
        row, column = divmod(int(iou.argmax()), iou.shape[1])
        iou[row], iou[:, column] = 0, 0
        pairs += 1
    return pairs / max(len(ours[0]), 1)


@torch.no_grad()
def main(
    name: str = "yolo11n",
    weights: Path | None = None,
    images: Path | None = None,
    folder: Path = Path("out/yolo"),
    size: int = 160,
    count: int = 64,
) -> float:
    """Run the example; the ONNX file goes into `folder`. Returns the share of matched boxes."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = network(name, weights)
    given = pictures(images, size, count)
    compiled = fxprune.compile(model, given.split(16), "2:4", method="sparsegpt", progress=False)
    print(compiled.report.summary)

    test = given[: min(16, len(given))]
    pairs = zip(boxes(model(test), best=20), boxes(compiled(test), best=20), strict=True)
    share = sum(matched(dense, pruned) for dense, pruned in pairs) / len(test)
    print(
        f"{share:.1%} of the dense network's boxes have a partner of their class in the pruned one's (overlap of half or more)"
    )
    print(fxprune.export_onnx(compiled, folder / f"{name}.onnx", test[:4]).summary)
    return share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="yolo11n", help="a yaml file of ultralytics', such as yolov8n or yolo11n")
    parser.add_argument("--weights", type=Path, help="trained weights, a .pt file of ultralytics'")
    parser.add_argument("--images", type=Path, help="a folder of pictures to calibrate on")
    parser.add_argument("--folder", type=Path, default=Path("out/yolo"), help="where the ONNX file goes")
    parser.add_argument("--size", type=int, default=160, help="height and width, a multiple of 32")
    arguments = parser.parse_args()
    main(arguments.name, arguments.weights, arguments.images, arguments.folder, arguments.size)
