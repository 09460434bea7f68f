"""Several processes that train one model: who am I, and what do all of us agree on.

``torchrun`` starts the processes and tells each its place in the environment; a single process needs none of it, and
every function here is then the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from prunefront.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Rank 0 may be loading data or writing a checkpoint to a slow disk while the others wait.
_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one training.

    Attributes:
        rank: This process, from 0; rank 0 alone writes and prints.
        size: All processes.
        local_rank: This process among those of its machine: the number of its GPU.
        device: What small agreements travel through: the GPU for nccl, the CPU for gloo.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the processes; every process gets the sums."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def any(self, *flags: bool) -> list[bool]:
        """Whether any process raised each flag; every process gets the same answer."""
        return [bool(value) for value in self._reduce([float(flag) for flag in flags], distributed.ReduceOp.MAX)]

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, rank by rank, on the CPU.

        Args:
            rows: (N, ...), of equal shape after the first dimension; N may differ between processes.
        """
        if self.size == 1:
            return rows.cpu()
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).cpu()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.total([0.0])

    def _reduce(self, values: Sequence[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor.tolist()]


def place_of_process() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as torchrun tells them; (0, 1, 0) without it.

    Raises:
        ConfigError: If the environment tells only a part, or no numbers.
    """
    if os.environ.get("WORLD_SIZE") is None:
        return 0, 1, 0
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in _VARIABLES)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"torchrun sets {', '.join(_VARIABLES)} to numbers, but the environment has "
            f"{', '.join(f'{name}={os.environ.get(name)}' for name in _VARIABLES)}. Start with torchrun, or unset them."
        ) from error
    return rank, size, local_rank


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the other processes while the block runs; alone when torchrun started none.

    Args:
        device: Where this process trains; GPUs talk through nccl, CPUs through gloo.

    Raises:
        ConfigError: If the environment is incomplete, or the others cannot be reached.
    """
    rank, size, local_rank = place_of_process()
    if size == 1:
        yield World()
        return
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Process {rank} could not reach the other {size - 1}: {' '.join(str(error).split())[:300]}. "
            "Check MASTER_ADDR and MASTER_PORT, or the --rdzv-endpoint of torchrun."
        ) from error
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, device=device if is_cuda else torch.device("cpu"))
    finally:
        distributed.destroy_process_group()
