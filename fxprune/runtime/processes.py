"""Several processes at work on one thing: what they tell each other, how they share work out, and how an error ends them all.

They are those of the default group of torch.distributed. Where none is initialised there is one process, and each function here
gives back what it was given. All processes have to make the same calls in the same order; so what decides which calls are made
has to be the same in all of them, which is why it is exchanged, and not worked out from sums that rounding could make differ.

Every exchange begins with a word from each process, and the word may be that it has failed: inside `together`, an error in one
process is told to the others at their next exchange, and ends them too.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fxprune.errors import FxPruneError, ProcessError

T = TypeVar("T")
R = TypeVar("R")

SHORT = 504  # Bytes that go with the first word; what is longer takes a second exchange.
SMALL = 2**16  # Numbers of tensors that are summed in one go.
PATIENCE = timedelta(seconds=20)  # How long a process that has failed waits to tell the others.
LONGEST_WAIT = timedelta(hours=24)  # For a process that scores or exports while the others wait.
_LENGTH = 8


@dataclass(frozen=True)
class World:
    """The processes, and this one among them.

    Attributes:
        number: of this process, from 0.
        count: of all.
    """

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that reports and writes files."""
        return self.number == 0

    def share(self, items: int) -> slice:
        """Which of so many things in a row are this process's: as many for each as for any other, or one more."""
        return slice(items * self.number // self.count, items * (self.number + 1) // self.count)


@dataclass
class _State:
    """What is known of the other processes at the moment.

    Attributes:
        alone: how many times `alone` has been entered.
        together: whether `together` has been.
        lost: what has gone wrong in one of them, after which there are no exchanges any more.
    """

    alone: int = 0
    together: bool = False
    lost: str = ""


@dataclass(frozen=True)
class _Word:
    """What one process says in an exchange: a value, or what has gone wrong."""

    value: Any = None
    failure: str = ""


_state = _State()


def world() -> World:
    """The processes that work together here; one, `alone` or where torch.distributed is not initialised."""
    if _state.alone or not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself, as if there were no others."""
    _state.alone += 1
    try:
        yield
    finally:
        _state.alone -= 1


@contextmanager
def together() -> Iterator[None]:
    """Inside, an error in one process ends all of them, each with an error; none leaves before all have come to the end.

    The first process alone shows warnings.

    Raises:
        ProcessError: another process failed; its number and its message.
    """
    here = world()
    if here.count == 1 or _state.together:
        yield
        return
    _state.together = True
    try:
        with telling(), warnings.catch_warnings():
            if not here.is_first:
                warnings.simplefilter("ignore")
            yield
            gathered(None)
    finally:
        _state.together, _state.lost = False, ""


@contextmanager
def telling() -> Iterator[None]:
    """Inside, an error is told to the other processes at once: where it might be caught, and this process would go on."""
    try:
        yield
    except BaseException as error:  # Ctrl-C too.
        if world().count > 1 and not _state.lost:
            _tell(error)
        raise


def gathered(value: T) -> list[T]:
    """What each process gives, in the order of the processes. It is pickled; tensors on a GPU arrive on one's own."""
    if world().count == 1:
        return [value]
    return [word.value for word in _exchanged(_Word(value))]


def of_first(value: T) -> T:
    """What the first process gives: for what all would find alike but for rounding, and on which further exchanges depend."""
    return gathered(value)[0]


def agreed(what: str, value: object, *, remedy: str) -> None:
    """Make sure that all processes were given the same.

    Args:
        what: what it is, for the message.
        value: compared by its text.
        remedy: what to do about it.

    Raises:
        ProcessError: they were not.
    """
    texts = gathered(str(value))
    other = next((number for number, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise ProcessError(f"{what} is not the same in process 0 and in process {other}; {remedy}")


def from_process(number: int, value: T) -> T:
    """What one of the processes has, in all of them; of the others `value` is not read. It is pickled, as in `gathered`."""
    here = world()
    if here.count == 1:
        return value
    packed = _packed(value) if here.number == number else b"\0"
    sent = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    length = gathered(len(sent))[number]
    content = sent if here.number == number else sent.new_empty(length)
    content = content.to(_place(content))
    dist.broadcast(content, number)
    if here.number == number:
        return value
    received: T = pickle.loads(content.cpu().numpy().tobytes())
    return received


def on_first(function: Callable[[], T]) -> T:
    """What a function gives in the first process, in all of them: what is measured, or must not be done twice."""
    here = world()
    if here.count == 1:
        return function()
    value: Any = None
    if here.is_first:
        with alone():
            value = function()
    given: T = from_process(0, value)
    return given


def shared(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """A function of each item, worked out in one of the processes, `alone`, and known to all of them afterwards."""
    here = world()
    if here.count == 1:
        return [function(item) for item in items]
    with alone():
        own = [function(item) for item in items[here.number :: here.count]]
    of_all = gathered(own)
    return [of_all[i % here.count][i // here.count] for i in range(len(items))]


def in_order(own: Sequence[T]) -> tuple[list[T], list[int]]:
    """What the processes have, the first things of all of them, then the second ones and so on; and the places of one's own."""
    of_all = gathered(list(own))
    places = sorted((k, number) for number, of in enumerate(of_all) for k in range(len(of)))
    number = world().number
    return [of_all[n][k] for k, n in places], [i for i, (_, n) in enumerate(places) if n == number]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the processes, of tensors of one dtype and device whose shapes are the same in all of them.

    There is no word here (the exchange before it, of what is to be summed, has had it): nothing may fail in between.
    """
    if world().count == 1:
        return list(tensors)
    large = [_sendable(x).clone() for x in tensors if x.numel() > SMALL]
    small = [x for x in tensors if x.numel() <= SMALL]
    together = [_sendable(torch.cat([x.flatten() for x in small]))] if small else []
    for x in (*large, *together):
        dist.all_reduce(x)
    of_small = iter(together[0].split([x.numel() for x in small]) if small else ())
    of_large = iter(large)
    return [(next(of_large) if x.numel() > SMALL else next(of_small)).reshape(x.shape).to(x.device) for x in tensors]


def as_in_first(module: nn.Module) -> None:
    """Give a module's parameters and buffers the values that they have in the first process, bit for bit."""
    if world().count > 1:
        own = [x.data for x in (*module.parameters(), *module.buffers())]
        for x, of_first in zip(own, from_process(0, own), strict=True):
            x.copy_(of_first)


def joined(own: Tensor) -> Tensor:
    """The tensors (n, ...) of all processes as one (sum of n, ...), in the order of the processes; n may be 0."""
    if world().count == 1:
        return own
    lengths = gathered(len(own))
    padded = _sendable(own.new_zeros(max(lengths), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(own.device)


def is_started_by_torchrun() -> bool:
    """Whether there are others beside this process that torchrun, or what sets the same variables, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


@contextmanager
def group_of_torchrun() -> Iterator[None]:
    """Inside, the processes that torchrun has started are a group: over NCCL where each has a GPU of its own, else gloo."""
    if not is_started_by_torchrun() or dist.is_initialized():
        yield
        return
    gpu, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(gpu % gpus)
    own_gpus = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpus and gpus else "gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _exchanged(word: _Word, patience: timedelta | None = None) -> list[_Word]:
    """One word from each process.

    Raises:
        ProcessError: one of the others has failed, now or before.
    """
    if _state.lost:
        raise ProcessError(_state.lost)
    try:
        words = [pickle.loads(content) for content in _bytes_of_all(_packed(word), patience)]
    except RuntimeError as error:  # Of torch.distributed: a process is gone, or has not come.
        _state.lost = (
            f"the processes have lost each other: {error}. All have to make the same calls to the end; what only one is to do "
            "belongs inside `with fxprune.alone():`"
        )
        raise ProcessError(_state.lost) from error
    for number, said in enumerate(words):
        if said.failure:
            _state.lost = f"process {number} of {len(words)} failed: {said.failure}"
            if not word.failure:
                raise ProcessError(_state.lost)
    return words


def _bytes_of_all(own: bytes, patience: timedelta | None) -> list[bytes]:
    parts = _all_gather(len(own).to_bytes(_LENGTH, "little") + own[:SHORT].ljust(SHORT, b"\0"), patience)
    lengths = [int.from_bytes(part[:_LENGTH], "little") for part in parts]
    found = [part[_LENGTH : _LENGTH + length] for part, length in zip(parts, lengths, strict=True)]
    if max(lengths) <= SHORT:
        return found
    rest = _all_gather(own[SHORT:].ljust(max(lengths) - SHORT, b"\0"), patience)
    return [(a + b)[:length] for a, b, length in zip(found, rest, lengths, strict=True)]


def _all_gather(own: bytes, patience: timedelta | None) -> list[bytes]:
    """As many bytes from each process."""
    sent = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    sent = sent.to(_place(sent))
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    work: Any = dist.all_gather(parts, sent, async_op=True)
    work.wait() if patience is None else work.wait(patience)
    return [part.cpu().numpy().tobytes() for part in parts]


def _tell(error: BaseException) -> None:
    """Let the others know that this process has failed, if they still listen."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, FxPruneError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    try:
        _exchanged(_Word(failure=text or type(error).__name__), PATIENCE)
    except (ProcessError, KeyboardInterrupt):  # They have gone, or do not come; the error itself says what matters.
        pass
    _state.lost = _state.lost or text


def _place(x: Tensor) -> torch.device:
    """Where the group takes a tensor: where it is, if it can; else on the CPU, or on this process's GPU."""
    backends = dist.get_backend_config()
    if f"{x.device.type}:" in backends and not (x.is_cuda and "cuda:gloo" in backends):
        return x.device
    return torch.device("cpu") if "cpu:" in backends else torch.device("cuda", torch.cuda.current_device())


def _sendable(x: Tensor) -> Tensor:
    return x.detach().contiguous().to(_place(x))


def _reduced(x: Tensor) -> tuple[Any, ...]:
    """How a tensor is packed: of a view no more than the view; one on a GPU is to be on the receiver's own."""
    rebuild, arguments, *_ = x.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return (_on_gpu, (rebuild, *arguments)) if x.is_cuda else (rebuild, arguments)


def _on_gpu(rebuild: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return rebuild(*arguments).cuda()


_REDUCED: Any = ChainMap({Tensor: _reduced, nn.Parameter: _reduced}, copyreg.dispatch_table)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _REDUCED
    pickler.dump(value)
    return buffer.getvalue()
