"""VGG-16 with BatchNorm for 32x32 images (Simonyan & Zisserman 2014, configuration D)."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.models.registry import register

# Output channels of each conv, relative to the first; "M" is a 2x2 max pooling.
CONFIGURATION_D: tuple[int | str, ...] = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")


@register(
    "vgg16_cifar",
    input_shape=(3, 32, 32),
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    source="Simonyan & Zisserman 2014, configuration D, with BatchNorm",
)
class VGG16Cifar(nn.Module):
    """Thirteen 3x3 convs, pooled to 1x1, then the paper's 4096-4096 classifier.

    torchvision's layer names; the first linear layer has 512 inputs instead of 25,088.

    Args:
        num_classes: width of the output.
        in_channels: channels of the input image.
        width: channels of the first stage.
        hidden: width of the two hidden linear layers; None: 64 times `width`.
        dropout: probability of dropping a hidden activation in training.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        hidden: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = 64 * width if hidden is None else hidden
        layers: list[nn.Module] = []
        channels = in_channels
        for item in CONFIGURATION_D:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = item * width
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W), H and W at least 32, to logits (N, num_classes)."""
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        logits: torch.Tensor = self.classifier(x)
        return logits
