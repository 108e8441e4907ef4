"""Models by name, and what is known about each of them."""

from __future__ import annotations

# Importing a model's file registers it.
from fxprune.models import cifar_cnn, resnet18_cifar, resnet_cifar, simple_cnn, vgg16_cifar
from fxprune.models.info import ModelInfo
from fxprune.models.registry import create, list_models, model_info, register

__all__ = [
    "ModelInfo",
    "cifar_cnn",
    "create",
    "list_models",
    "model_info",
    "register",
    "resnet18_cifar",
    "resnet_cifar",
    "simple_cnn",
    "vgg16_cifar",
]
