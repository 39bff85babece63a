"""Results that need not be kept for the backward, because they can be made again from what is kept anyway.

A norm keeps its input, a gated product its two factors; the layers that read their results would keep these as well,
another third. What makes a result again goes along with it, as an attribute, to whoever reads it next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor


class Again(NamedTuple):
    """make(*tensors) is the result, bit for bit, while nothing has changed it in place: its version is the same."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    version: int


def with_again(result: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The result, which now can tell how it is made again. `tensors`: what is kept of it anyway."""
    cast(Any, result).luthier_again = Again(make, tuple(tensor.detach() for tensor in tensors), result._version)
    return result


def again(result: Tensor) -> Again:
    """How to make it again; of what cannot be, it is itself what has to be kept."""
    found: Again | None = getattr(result, "luthier_again", None)
    whole = found is not None and found.version == result._version
    return found if whole and found is not None else Again(_itself, (result,), result._version)


def _itself(result: Tensor) -> Tensor:
    return result
