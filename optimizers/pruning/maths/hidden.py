"""A narrower residual stream: SliceGPT (Ashkboos et al. 2024), with one rotation for the whole stream.

Once norms have no gain of their own, a stream that is rotated by an orthogonal Q gives the same outputs: a norm only
sees lengths, what writes into the stream is multiplied by Q and what reads it by Qᵀ. The columns of Q are ordered by
how much of the stream lies along them; the last ones are deleted.

A norm of the sliced stream z must still divide by the length over all `width` components. It does, with the ε that it
had, if the stream is made shorter by c = √(kept/width), which its readers take back:

    z / √(|z|²/width + ε)  =  1/c · cz / √(|cz|²/kept + ε)
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import AnyFloats, Doubles


def principal_directions(covariance: Doubles, kept: int) -> Doubles:
    """The `kept` orthonormal directions [width, kept] that hold most of `covariance` [width, width], best first."""
    _, vectors = np.linalg.eigh(covariance)
    return np.ascontiguousarray(vectors[:, ::-1][:, :kept])


def lost_share(covariance: Doubles, directions: Doubles) -> float:
    """The share of the stream's energy outside of the directions, from 0 to 1."""
    total = float(np.trace(covariance))
    inside = float(np.sum(directions * (covariance @ directions)))
    return max(0.0, 1 - inside / total) if total > 0 else 0.0


def center(writer: AnyFloats) -> AnyFloats:
    """Take the mean of each row from what writes [..., width] into the stream: LayerNorm is an RMS norm behind it."""
    return np.asarray(writer - writer.mean(axis=-1, keepdims=True))


def stream_scale(width: int, kept: int) -> float:
    """The factor of a sliced stream with which a norm over `kept` components divides as one over `width` did."""
    return float(np.sqrt(kept / width))


def tied_mixture(table_moments: Doubles, gain: AnyFloats, directions: Doubles) -> Doubles:
    """A [kept, kept] by which a head goes on multiplying by the table of the embeddings.

    The head should be Qᵀ diag(gain) Tᵀ, the sliced table is T Q: A = argmin |Qᵀ diag(gain) Tᵀ − A (T Q)ᵀ|², which is
    Qᵀ diag(gain) Q, without loss, where nothing is deleted.

    Args:
        table_moments: TᵀT [width, width].
        gain: of the final norm [width].
        directions: Q [width, kept].
    """
    inner = directions.T @ table_moments @ directions
    ridge = 1e-10 * np.trace(inner) / len(inner)
    prior = directions.T @ (gain[:, None] * directions)  # where the table says nothing
    cross = directions.T @ (gain[:, None] * table_moments) @ directions
    return np.asarray(np.linalg.solve(inner + ridge * np.eye(len(inner)), (cross + ridge * prior).T).T)
