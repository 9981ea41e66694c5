"""Rows read from a matrix, with the same gradient every time."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding


def read_rows(matrix_MH: Tensor, read_S: Tensor) -> Tensor:
    """`matrix_MH[read_S]`, for rows that are read more than once.

    The gradient of an index is added up on a CPU by threads as they come: of a row that is read three times it differs
    in its last digit from run to run. That of an embedding is added up in order.

    Args:
        matrix_MH: shape (M, H).
        read_S: which rows. Shape (S,).

    Returns:
        Shape (S, H).
    """
    return embedding(read_S, matrix_MH)
