"""ResNet-18 for 32x32 images: a 3x3 stem with stride 1 and no max pooling."""

from __future__ import annotations

from torch import nn

from fxprune.models.registry import register


@register(
    "resnet18_cifar",
    input_shape=(3, 32, 32),
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    source="He et al. 2015, with the usual CIFAR stem",
)
def resnet18_cifar(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build torchvision's ResNet-18, with its layer names, for (in_channels, 32, 32) images.

    Args:
        num_classes: width of the output.
        in_channels: channels of the input image.
        width: channels of the first stage; each later stage has twice as many.
    """
    from torchvision.models.resnet import BasicBlock, ResNet  # on first use: it takes as long to import as torch does

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    # torchvision's forward calls maxpool, so the layer stays and does nothing.
    model.maxpool = nn.Identity()
    if width != 64:
        model.bn1, model.inplanes = nn.BatchNorm2d(width), width
        for stage in range(4):
            layer = model._make_layer(BasicBlock, width * 2**stage, 2, stride=1 if stage == 0 else 2)
            setattr(model, f"layer{stage + 1}", layer)
        model.fc = nn.Linear(8 * width, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    built: nn.Module = model
    return built
