"""What adapters a model has."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of one model: y = x W + scale ((x a) b)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
