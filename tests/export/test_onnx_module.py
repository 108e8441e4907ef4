from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxprune.errors import ValidationError
from fxprune.export.onnx_module import OnnxModule

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((12, 5)).astype(np.float32)


def classifier(path: Path, batch: int | str = "N", inputs: int = 1, half: bool = False) -> OnnxModule:
    """Flatten and one matrix product, of images 3 x 2 x 2."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [helper.make_node("Flatten", ["x0"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    ports = [helper.make_tensor_value_info(f"x{i}", kind, [batch, 3, 2, 2]) for i in range(inputs)]
    out = helper.make_tensor_value_info("y", kind, [batch, 5])
    weight = numpy_helper.from_array(WEIGHT.astype(np.float16) if half else WEIGHT, "w")
    graph = helper.make_graph(nodes, "g", ports, [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    return OnnxModule(path)


@pytest.mark.parametrize("batch", ["N", 4])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_it_computes_what_the_file_says_for_any_number_of_images(tmp_path: Path, batch: int | str, count: int) -> None:
    x = torch.randn(count, 3, 2, 2)
    torch.testing.assert_close(classifier(tmp_path / "m.onnx", batch)(x), x.flatten(1) @ torch.from_numpy(WEIGHT))


def test_float32_images_may_go_into_a_float16_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 2, 2)
    found = classifier(tmp_path / "m.onnx", half=True)(x)
    torch.testing.assert_close(found.float(), x.flatten(1) @ torch.from_numpy(WEIGHT), rtol=2e-2, atol=2e-2)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    module = classifier(tmp_path / "m.onnx")
    for shape in ((4, 1, 2, 2), (4, 12)):
        with pytest.raises(ValidationError, match=r"m\.onnx takes .*the images are"):
            module(torch.randn(shape))
    with pytest.raises(ValidationError, match="takes 2 inputs"):
        classifier(tmp_path / "two.onnx", inputs=2)
    with pytest.raises(ValidationError, match=r"no file .*absent\.onnx"):
        OnnxModule(tmp_path / "absent.onnx")
