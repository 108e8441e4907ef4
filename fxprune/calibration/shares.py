"""Which batches of a calibration set are a process's own, where several processes share the work.

1. A loader with a DistributedSampler gives each process its share. What the sampler repeats to make shares equal is left out.
2. Of any other loader the first batches are compared. Where all processes have the same one, they have the whole set: batch i
   is that of process i mod N, and the others pass over it. Where no two have the same one, each loader is a share.
3. Anything between is an error, and so is a DataLoader that shuffles in another order in each process, since that is no share.

The set as a whole has an order: the first batches of all processes, then the second ones, and so on. Of a loader that all have
it is the loader's own. By it images are numbered, so that what is held out and what is sampled is what one process would take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from itertools import count as numbers
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from fxprune.calibration.batches import EMPTY, check_loader, count, take, tensors_in
from fxprune.errors import CalibrationError
from fxprune.runtime.processes import from_process, gathered, telling, world

SAMPLED = 4096  # Numbers of a batch that tell it from another one.


class SharedLoader:
    """A loader of which this process reads its own batches, and whose first batches all processes can look at.

    Args:
        loader: of this process.
        is_share: whether it holds this process's batches alone; None finds out, by the rule above.
        ahead: images of the whole set that stay known when the batches are held.
    """

    def __init__(self, loader: Iterable[Any], *, is_share: bool | None = None, ahead: int = 1) -> None:
        self._given = loader
        self._is_share = is_share
        self._ahead = ahead
        self._is_dealt_out = self._is_held = False
        self._own: _Ahead | None = None  # What the loader gives here, once it has been started.
        self._head: list[Any] = []  # Of the whole set.
        self._next: Iterator[Any] | None = None  # What follows it.
        self._seen: list[_Seen] = []

    def head(self, images: int = 1) -> list[Any]:
        """The first batches of the whole set, with so many images together if there are.

        Raises:
            CalibrationError: if there are none, one cannot be used, or it cannot be told which are whose.
        """
        self._start()
        seen, known = 0, iter(self._head)
        found: list[Any] = []
        while seen < images:
            batch = next(known, None)
            if batch is None:
                batch = next(self._next or iter(()), None)
                if batch is None:
                    break
                self._head.append(batch)
                known = iter(())
            found.append(batch)
            seen += count(batch)
        if not found:
            raise CalibrationError(EMPTY)
        return found

    def __iter__(self) -> Iterator[Any]:
        """This process's own batches; there may be none."""
        own = self._start()
        return iter(own) if self._is_share else self._dealt_out(own)

    def number(self, own: int) -> int:
        """By which number a user knows one of this process's own batches: in the loader, from 0."""
        here = world()
        return own * here.count + here.number if self._is_dealt_out else own

    def hold(self) -> list[Any]:
        """This process's own batches, kept from now on."""
        if not self._is_held:
            self._is_held = True
            self.head(self._ahead)
            self._own, self._is_share = _Ahead(list(self)), True
            self._next = islice(self._of_shares(), len(self._head), None)
        return list(self)

    def _start(self) -> _Ahead:
        """Begin to read, and find out what is whose."""
        if self._own is None:
            with telling():
                check_loader(self._given)
                sampler = _sampler(self._given)
                loader = self._given if sampler is None else _without_repeats(self._given, sampler)
                self._own = _Ahead(loader)
                first = None if sampler or self._is_share is not None else next(iter(self._own.first(1)), None)
            if self._is_share is None:
                self._seen = gathered(_Seen.of(self._given, sampler, first))
        if self._is_share is None:
            self._is_share = is_share(self._seen)  # The same error each time, if there is one.
            self._is_dealt_out = not self._is_share
        if self._next is None:
            self._next = self._of_shares() if self._is_share else self._of_loader()
        return self._own

    def _of_loader(self) -> Iterator[Any]:
        """The batches of a loader that all processes have."""
        assert self._own is not None
        for k in numbers():
            with telling():
                batches = self._own.first(k + 1)
            if len(batches) <= k:
                return
            yield batches[k]

    def _of_shares(self) -> Iterator[Any]:
        """The batches of the whole set, sent by those that have them."""
        assert self._own is not None
        for k in numbers():
            with telling():
                batches = self._own.first(k + 1)
            own = batches[k] if len(batches) > k else None
            has_one = gathered(own is not None)
            if not any(has_one):
                return
            for number in (number for number, has in enumerate(has_one) if has):
                yield from_process(number, own)

    def _dealt_out(self, batches: _Ahead) -> Iterator[Any]:
        """This process's batches among those of a loader that all have."""
        here, seen = world(), 0
        for batch in batches:
            if seen % here.count == here.number:
                yield batch
            seen += 1
        ends = gathered(seen)
        if len({*ends}) > 1:
            raise CalibrationError(
                "the calibration loaders of the processes begin with the same batch, and then go on differently: they have "
                f"{', '.join(map(str, ends))} batches. Give all processes the same loader, or each its own share"
            )


class _Ahead:
    """An iterable that is started once only, and whose first items can be looked at before it is read."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.is_kept = isinstance(items, (list, tuple))
        self._items = items
        self._rest = iter(items)
        self._seen: list[Any] = []

    def first(self, items: int) -> list[Any]:
        """So many, or as many as there are."""
        self._seen += islice(self._rest, max(0, items - len(self._seen)))
        return self._seen[:items]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items) if self.is_kept else chain(self._seen, self._rest)


@dataclass(frozen=True)
class _Seen:
    """What a process tells the others about its loader.

    Attributes:
        sampler: number of the process and count of processes that its DistributedSampler is for; None without one.
        first: a hash of its first batch; "" without one.
        shuffles: whether it draws the order of its images itself.
    """

    sampler: tuple[int, int] | None
    first: str
    shuffles: bool

    @classmethod
    def of(cls, loader: Iterable[Any], sampler: DistributedSampler[Any] | None, first: Any) -> _Seen:
        shuffles = isinstance(getattr(_batch_sampler(loader), "sampler", None), RandomSampler)
        place = None if sampler is None else (sampler.rank, sampler.num_replicas)
        return cls(place, "" if first is None else fingerprint(first), shuffles)


def is_share(seen: list[_Seen]) -> bool:
    """Whether the processes' loaders are shares of one set, rather than the whole of it each.

    Args:
        seen: of each process.

    Raises:
        CalibrationError: it cannot be told.
    """
    remedy = "give all processes the same loader, whose batches are then dealt out, or each its own share of the images"
    if any(one.sampler for one in seen):
        for number, one in enumerate(seen):
            if one.sampler != (number, len(seen)):
                has = "none" if one.sampler is None else "one for process {} of {}".format(*one.sampler)
                raise CalibrationError(
                    f"some calibration loaders have a DistributedSampler; process {number} of {len(seen)} has {has}: {remedy}"
                )
        return True
    firsts = [one.first for one in seen if one.first]
    if len({*firsts}) == 1 and len(firsts) == len(seen):
        return False
    if all(one.shuffles for one in seen):
        raise CalibrationError(
            "the calibration DataLoader shuffles the images in another order in each process, so that it is neither the same "
            "loader nor a share of one; leave shuffle=True out, or give it a DistributedSampler"
        )
    if len({*firsts}) < len(firsts):
        raise CalibrationError(f"some processes have the same first calibration batch, and others do not; {remedy}")
    return bool(firsts)


def fingerprint(batch: Any) -> str:
    """A hash of a batch's shapes and some of its numbers."""
    digest = hashlib.sha256()
    for x in tensors_in(batch):
        some = x.detach().reshape(-1)[:: max(1, x.numel() // SAMPLED)]
        digest.update(str((tuple(x.shape), x.dtype, float(x.sum(dtype=torch.float64)), some.tolist())).encode())
    return digest.hexdigest()


def _batch_sampler(loader: Iterable[Any]) -> Any:
    return loader.batch_sampler if isinstance(loader, DataLoader) else None


def _sampler(loader: Iterable[Any]) -> DistributedSampler[Any] | None:
    """The sampler that makes a loader a share; one of a subclass may do something else and is not known."""
    sampler = getattr(_batch_sampler(loader), "sampler", None)
    return sampler if type(sampler) is DistributedSampler else None


def _without_repeats(loader: Iterable[Any], sampler: DistributedSampler[Any]) -> Iterator[Any]:
    """The batches of a share without the images at its end that are another process's: it is filled up with them."""
    images: Any = sampler.dataset
    left = len(sampler)
    if not sampler.drop_last:
        left = len(range(sampler.rank, len(images), sampler.num_replicas))
    for batch in loader:
        if left <= 0:
            return
        yield batch if count(batch) <= left else take(batch, slice(left))
        left -= count(batch)
