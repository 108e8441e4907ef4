from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.optim import swa_utils

import fxprune
from fxprune.errors import GraphError
from fxprune.layers.zero_keeper import _watching
from tests.fine_tuning.small_net import IMAGES, Net, Train, filled, zero_masks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum and weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn="strong_wolfe"),
}


class Noisy(torch.optim.Optimizer):
    """Adds noise to every weight, as Langevin dynamics does: no mask on gradients can stop that."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {})  # type: ignore[arg-type]

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p) * 0.1)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: up along the gradient, then a step of another optimizer from there."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {})  # type: ignore[arg-type]
        self.base = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        parameters = self.base.param_groups[0]["params"]
        with torch.enable_grad():
            closure()
        moves = [0.1 * p.grad / p.grad.norm().clamp_min(1e-8) for p in parameters]
        for p, move in zip(parameters, moves, strict=True):
            p.add_(move)
        with torch.enable_grad():
            closure()
        for p, move in zip(parameters, moves, strict=True):
            p.sub_(move)
        self.base.step()


def test_training_fills_the_zeros_of_a_model_that_does_not_keep_them(
    compiled: fxprune.CompiledModule, train: Train
) -> None:
    masks = zero_masks(compiled)
    train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert filled(compiled, masks) > 0.9 * sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "noisy", "sam"])
def test_zeros_stay_in_every_optimizer(name: str, compiled: fxprune.CompiledModule, train: Train) -> None:
    make = {**OPTIMIZERS, "noisy": Noisy, "sam": SAM}[name]
    masks, before = zero_masks(compiled), copy.deepcopy(compiled.state_dict())
    handle = fxprune.keep_zeros(compiled)
    assert handle.layers == {"conv1": 144, "conv2": 288, "fc": 16}
    train(compiled, make(compiled.parameters()))
    assert filled(compiled, masks) == 0
    assert not torch.equal(compiled.state_dict()["conv2.weight"], before["conv2.weight"])


def test_an_optimizer_with_a_state_from_before_does_not_fill_them(
    compiled: fxprune.CompiledModule, train: Train
) -> None:
    masks = zero_masks(compiled)
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.01)
    train(compiled, optimizer)
    assert filled(compiled, masks) > 0
    fxprune.restore_zeros(compiled)
    fxprune.keep_zeros(compiled)
    train(compiled, optimizer)
    assert filled(compiled, masks) == 0


def test_a_loop_of_ones_own_does_not_fill_them(compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    for _ in range(3):
        compiled(images).sum().backward()
        for p in compiled.parameters():
            p.data -= 0.01 * p.grad
    assert filled(compiled, masks) == 0
    for p in compiled.parameters():
        p.data += 0.1
    assert all((compiled.state_dict()[name][mask] == 0).all() for name, mask in masks.items())


def test_gradients_are_those_of_the_pruned_network(compiled: fxprune.CompiledModule, images: Tensor) -> None:
    compiled(images).sum().backward()
    wanted = {name: p.grad.clone() for name, p in compiled.named_parameters()}
    compiled.zero_grad()
    fxprune.keep_zeros(compiled)
    masks = zero_masks(compiled)
    for half in images.split(16):  # accumulated
        compiled(half).sum().backward()
    for name, p in compiled.named_parameters():
        mask = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        torch.testing.assert_close(p.grad, wanted[name].masked_fill(mask, 0), rtol=1e-4, atol=1e-5)
        assert (p.grad[mask] == 0).all()


def test_infinite_gradients_of_kept_zeros_do_not_become_nan() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, 1.0]])
    fxprune.keep_zeros(layer)
    (layer.weight * torch.tensor([[float("inf"), 2.0]])).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0.0, 2.0]]


def test_two_forwards_before_one_backward(compiled: fxprune.CompiledModule, images: Tensor) -> None:
    fxprune.keep_zeros(compiled)
    (compiled(images).sum() + compiled(images).square().sum()).backward()


def test_it_works_with_a_scaler_and_autocast(compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    optimizer, scaler = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu")
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (compiled(images) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert filled(compiled, masks) == 0


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)])
def test_averaged_models_have_the_zeros(average: object, compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    averaged = swa_utils.AveragedModel(compiled, multi_avg_fn=average)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        compiled(images).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(compiled)
    assert filled(averaged.module, masks) == 0
    assert not fxprune.filled_zeros(averaged)
    assert fxprune.filled_zeros(averaged).recorded == 448


def test_what_is_loaded_gets_the_zeros(compiled: fxprune.CompiledModule) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    ones = {name: torch.ones_like(tensor) for name, tensor in compiled.state_dict().items()}
    for assign in (False, True):
        compiled.load_state_dict(ones, assign=assign)
        assert filled(compiled, masks) == 0
        assert (compiled.state_dict()["conv1.bias"] == 1).all()


@pytest.mark.parametrize("change", ["half", "double", "to meta and back", "replaced", "unfrozen"])
def test_weights_that_change_are_followed(change: str, compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    if change == "unfrozen":
        compiled.requires_grad_(False)
    fxprune.keep_zeros(compiled)
    if change == "half":
        compiled.bfloat16()
    elif change == "double":
        compiled.double()
    elif change == "to meta and back":
        state = compiled.state_dict()
        compiled.to("meta").to_empty(device="cpu").load_state_dict(state)
    elif change == "replaced":
        compiled.get_submodule("conv2").weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    compiled.requires_grad_(True)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(images.to(next(compiled.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        assert filled(compiled, masks) == 0
    assert all((compiled.get_parameter(name).grad[mask] == 0).all() for name, mask in masks.items())


def test_parameters_can_be_swapped(compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        compiled.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(images.double()).square().mean().backward()
        optimizer.step()
        assert filled(compiled, masks) == 0


def test_a_deep_copy_keeps_its_zeros_by_itself(compiled: fxprune.CompiledModule, train: Train) -> None:
    masks = zero_masks(compiled)
    handle = fxprune.keep_zeros(compiled)
    copied = copy.deepcopy(compiled)
    handle.remove()
    train(copied, Noisy(copied.parameters()))
    assert filled(copied, masks) == 0
    copied.conv1.weight.data += 1
    copied(torch.ones(1, *IMAGES))
    assert filled(copied, masks) == 0
    train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert filled(compiled, masks) > 0
    fxprune.keep_zeros(copied).remove()
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1))
    assert filled(copied, masks) > 0


def test_it_can_be_removed_and_leaves_nothing_behind(compiled: fxprune.CompiledModule, train: Train) -> None:
    masks = zero_masks(compiled)
    watching = len(_watching)
    handle = fxprune.keep_zeros(compiled)
    handle.remove()
    handle.remove()
    assert len(_watching) == watching
    assert not compiled._forward_pre_hooks
    assert not any(p._backward_hooks for p in compiled.parameters())
    train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert filled(compiled, masks) > 0


def test_a_model_that_is_gone_is_not_kept_alive(compiled: fxprune.CompiledModule) -> None:
    gc.collect()
    watching = len(_watching)
    copied = copy.deepcopy(compiled)
    fxprune.keep_zeros(copied)
    assert len(_watching) == watching + 1
    del copied
    gc.collect()
    assert len(_watching) == watching


def test_with_blocks_end_what_they_began_and_nothing_else(compiled: fxprune.CompiledModule, train: Train) -> None:
    masks = zero_masks(compiled)
    with fxprune.keep_zeros(compiled):
        with fxprune.keep_zeros(compiled):
            pass
        train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
        assert filled(compiled, masks) == 0
    train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    assert filled(compiled, masks) > 0


def test_compiling_again_does_not_take_the_old_masks_along(
    compiled: fxprune.CompiledModule, images: Tensor, train: Train
) -> None:
    fxprune.keep_zeros(compiled)
    again = fxprune.compile(compiled, images.split(16), "1:4", method="magnitude", device="cpu", progress=False)
    assert not any(p._backward_hooks for p in again.parameters())
    masks = zero_masks(again)
    train(again, torch.optim.SGD(again.parameters(), lr=0.1))
    assert filled(again, masks) > 0.9 * sum(int(mask.sum()) for mask in masks.values())


def test_nothing_else_is_disturbed(compiled: fxprune.CompiledModule, images: Tensor, tmp_path: Path) -> None:
    keys, code = list(compiled.state_dict()), compiled.code
    fxprune.keep_zeros(compiled)
    assert list(compiled.state_dict()) == keys
    fxprune.save(compiled, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt")
    assert fxprune.diff(compiled, loaded).is_empty
    assert loaded.report == compiled.report
    assert repr(fxprune.keep_zeros(loaded)) == "KeptZeros(448 zeros in 3 layers)"
    fxprune.export_onnx(compiled, tmp_path / "model.onnx", images)
    fxprune.validate_onnx(compiled, tmp_path / "model.onnx", images.split(16), progress=False)
    exported = torch.export.export(compiled, (images,))
    assert not any("fill" in str(node.target) or "mul" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(images), compiled(images))
    assert torch.fx.symbolic_trace(compiled).code.replace("\n", "") == code.replace("\n", "")
    torch.testing.assert_close(pickle.loads(pickle.dumps(compiled))(images), compiled(images))
    torch.testing.assert_close(torch.jit.trace(compiled, images)(images), compiled(images))
    with torch.inference_mode():
        compiled(images)


def test_a_plain_module_keeps_its_zeros_through_a_pickle(images: Tensor, train: Train) -> None:
    model = Net()
    model.conv2.weight.data[:, ::2] = 0
    nn.init.zeros_(model.fc.weight)  # not trained yet: it has to learn
    assert fxprune.keep_zeros(model).layers == {"conv2": 288}
    masks = {"conv2.weight": model.conv2.weight == 0}
    for network in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        train(network, OPTIMIZERS["momentum and weight decay"](network.parameters()))
        assert filled(network, masks) == 0
        assert (network.fc.weight != 0).all()


def test_a_layer_by_itself(train: Train) -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data[:, 1] = 0
    fxprune.keep_zeros(layer)
    for kept in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        optimizer = torch.optim.SGD(kept.parameters(), lr=0.1)
        kept(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        assert (kept.weight[:, 1] == 0).all()


def test_factored_and_pruned_layers(dense: nn.Module, images: Tensor, train: Train) -> None:
    factored = fxprune.low_rank(dense, images.split(16), "ratio:0.6", device="cpu", progress=False)
    compiled = fxprune.compile(factored, images.split(16), "2:4", method="magnitude", device="cpu", progress=False)
    masks = zero_masks(compiled)
    assert any(name.startswith("conv2.0") or name.startswith("conv2.1") for name in masks)
    fxprune.keep_zeros(compiled)
    train(compiled, torch.optim.AdamW(compiled.parameters(), lr=0.01))
    assert filled(compiled, masks) == 0


@pytest.mark.parametrize("wrapper", [nn.DataParallel, lambda m: nn.Sequential(m, nn.Linear(4, 3))])
def test_a_module_around_the_model(wrapper: Callable, compiled: fxprune.CompiledModule, train: Train) -> None:
    masks = zero_masks(compiled)
    whole = wrapper(compiled)
    assert sum(fxprune.keep_zeros(whole).layers.values()) == 448
    train(whole, torch.optim.SGD(whole.parameters(), lr=0.1))
    assert filled(compiled, masks) == 0


def test_torch_compile_traces_none_of_it(compiled: fxprune.CompiledModule, train: Train) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    train(fast, OPTIMIZERS["momentum and weight decay"](fast.parameters()), steps=3)
    assert filled(compiled, masks) == 0
    assert all((compiled.get_parameter(name).grad[mask] == 0).all() for name, mask in masks.items())


def test_there_must_be_zeros(compiled: fxprune.CompiledModule, train: Train) -> None:
    with pytest.raises(GraphError, match="Net has no zeros to keep"):
        fxprune.keep_zeros(Net())
    train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1))
    with pytest.raises(GraphError, match=r"nothing left to keep in conv1, conv2, fc: .*restore_zeros"):
        fxprune.keep_zeros(compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu(fused: bool, compiled: fxprune.CompiledModule, images: Tensor) -> None:
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    compiled.cuda()
    optimizer, scaler = torch.optim.AdamW(compiled.parameters(), lr=0.01, fused=fused), torch.amp.GradScaler("cuda")
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (compiled(images.cuda()) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert filled(compiled, masks) == 0
    assert not fxprune.filled_zeros(compiled)


def _distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    compiled = fxprune.load(f"{folder}/model.pt").train()
    masks = zero_masks(compiled)
    fxprune.keep_zeros(compiled)
    parallel = nn.parallel.DistributedDataParallel(compiled)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(rank)
    for _ in range(4):
        optimizer.zero_grad()
        parallel(torch.randn(8, *IMAGES)).square().mean().backward()
        optimizer.step()
    assert filled(compiled, masks) == 0
    torch.save(compiled.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(compiled: fxprune.CompiledModule, tmp_path: Path) -> None:
    fxprune.save(compiled, tmp_path / "model.pt")
    torch.multiprocessing.start_processes(_distributed, (str(tmp_path),), nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv2.weight"], compiled.state_dict()["conv2.weight"])
