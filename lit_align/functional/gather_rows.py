"""Index rows of a matrix with a deterministic gradient."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding


def read_rows(matrix_MH: Tensor, read_S: Tensor) -> Tensor:
    """`matrix_MH[read_S]`, deterministic in backward.

    On a CPU, threads accumulate the gradient of an index in any order, so the gradient of a row that is read three
    times differs in its last digit from run to run. An embedding accumulates in order.

    Args:
        matrix_MH: shape (M, H).
        read_S: indices of rows. Shape (S,).

    Returns:
        Shape (S, H).
    """
    return embedding(read_S, matrix_MH)
