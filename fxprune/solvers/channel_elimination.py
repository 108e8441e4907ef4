"""Which channels a layer needs least: group OBS, and what the layer's output loses as one after the other goes.

To remove the columns g of W (R x D) and make up for it with the others costs

    cost(g) = tr(W_g (H^-1_gg)^-1 W_g^T)

and leaves W <- W - W_g (H^-1_gg)^-1 H^-1_g: and H^-1 <- H^-1 - H^-1_:g (H^-1_gg)^-1 H^-1_g: (Hassibi & Stork 1993 for one
weight; by structures in ZipLM, Kurtic et al. 2023). Greedily, the cheapest first, one run gives the whole curve. Channels that
several layers read cost the sum over these layers.

H^-1 is downdated lazily: the columns that a removal changes are computed for the channel that goes next, and the whole matrix
once for many removals, in one product, without the rows of what is gone by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAZY_COLUMNS = 256  # Columns removed between two downdates of the whole matrix.


@dataclass(frozen=True)
class ReadUnits:
    """What one layer reads of n units of channels, k columns each, which stand unit after unit.

    Attributes:
        inverse: (n k, n k) the block of H^-1, the inverse of the layer's whole damped Hessian, that belongs to these columns.
        weight: (R, n k) the layer's weights on these columns.
        scale: what an error of its output counts.
    """

    inverse: Tensor
    weight: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Elimination:
    """In which order n units go, and what has been lost when the first i of them are gone.

    Attributes:
        order: (m,) numbers of the units, the first to go first.
        errors: (m + 1,) float64, cumulative, from 0.
    """

    order: Tensor
    errors: Tensor


def eliminate(readers: Sequence[ReadUnits], units: int, *, least: int = 1) -> Elimination:
    """Remove units greedily until `least` are left, summed over the layers that read them.

    Args:
        readers: one for each layer.
        units: n.
        least: that stay.
    """
    device = readers[0].weight.device if readers else torch.device("cpu")
    states = [_Reader(reader, units) for reader in readers]
    gone = torch.zeros(units, dtype=torch.bool, device=device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    for _ in range(units - least):
        cost = torch.zeros(units, dtype=torch.float64, device=device)
        for state in states:
            state.add_costs(cost)
        cost[gone] = torch.inf
        unit = cost.argmin()
        order.append(unit)
        costs.append(cost[unit].clamp_min(0))
        gone[unit] = True
        number = int(unit)
        for state in states:
            state.remove(number)
    if not order:
        return Elimination(gone.new_zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.float64, device=device))
    errors = torch.stack([cost.new_zeros(()), *costs]).cumsum(0)
    return Elimination(torch.stack(order), errors)


class _Reader:
    """One layer's H^-1 and weights as units go. Rows of what is gone are left out at every downdate of the whole matrix."""

    def __init__(self, reader: ReadUnits, units: int) -> None:
        self.scale = reader.scale
        self.size = size = reader.weight.shape[1] // units
        self.inverse = reader.inverse.double()
        self.weight = reader.weight.double().clone()
        blocks = self.inverse.unflatten(0, (units, size)).unflatten(2, (units, size))
        self.diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()  # (n, k, k)
        self.here = list(range(units))  # Units whose rows are held, in their order.
        self.place = {unit: i for i, unit in enumerate(self.here)}
        self.left: set[int] = set(self.here)
        self.changes = self._no_changes()  # Its first `changed` columns: H^-1 is `inverse` less V V^T of them.
        self.changed = 0
        self.index = torch.arange(units, device=self.weight.device)

    def add_costs(self, cost: Tensor) -> None:
        """Add what each unit costs to (units,)."""
        of_units = self.weight.unflatten(1, (-1, self.size)).transpose(0, 1)  # (n, R, k)
        if self.size == 1:
            found = of_units[:, :, 0].square().sum(1) / self.diagonal[:, 0, 0]
        else:
            products = of_units.mT @ of_units
            found = (torch.linalg.inv(self.diagonal) * products).sum((1, 2))
        cost.index_add_(0, self.index, found, alpha=self.scale)

    def remove(self, unit: int) -> None:
        """Downdate weights and diagonal blocks, and note what becomes of the rest of H^-1."""
        at, k = self.place[unit], self.size
        rows = slice(at * k, (at + 1) * k)
        change = self.changes[:, : self.changed]
        panel = torch.addmm(self.inverse[:, rows], change, change[rows].mT, alpha=-1)
        factor = torch.linalg.cholesky(panel[rows])
        step = torch.linalg.solve_triangular(factor, panel.mT, upper=False).mT  # (n k, k)
        of_unit = torch.linalg.solve_triangular(factor, self.weight[:, rows].mT, upper=False).mT
        self.weight -= of_unit @ step.mT
        blocks = step.unflatten(0, (-1, k))
        self.diagonal -= blocks @ blocks.mT
        self.diagonal[at] = torch.eye(k, dtype=self.diagonal.dtype, device=self.diagonal.device)
        self.weight[:, rows] = 0
        self.changes[:, self.changed : self.changed + k] = step
        self.changed += k
        self.left.discard(unit)
        if self.changed + k > self.changes.shape[1]:
            self._downdate()

    def _no_changes(self) -> Tensor:
        return self.weight.new_empty(self.weight.shape[1], max(LAZY_COLUMNS, self.size))

    def _downdate(self) -> None:
        """Bring the whole of H^-1 up to date, without the rows and columns of what is gone."""
        stay = [i for i, unit in enumerate(self.here) if unit in self.left]
        self.here = [self.here[i] for i in stay]
        self.place = {unit: i for i, unit in enumerate(self.here)}
        units = torch.tensor(stay, dtype=torch.long, device=self.weight.device)
        columns = (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()
        change = self.changes[columns, : self.changed]
        self.inverse = torch.addmm(self.inverse[columns][:, columns], change, change.mT, alpha=-1)
        self.weight, self.diagonal, self.index = self.weight[:, columns], self.diagonal[units], self.index[units]
        self.changes, self.changed = self._no_changes(), 0
