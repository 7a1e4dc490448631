"""SparseGPT: remove inputs of a product one after the other, the later ones making up for those removed.

With E = W − Ŵ, H = E[x xᵀ] = R Rᵀ and R upper triangular, the error of a product falls apart into one square per input
(see `onnxpress.optimizers.quantization.maths.gptq`):

    Σ_k R_kk² ‖E_k + Σ_{j<k} (R_jk / R_kk) E_j‖²

The errors before k being given, a weight that stays becomes t_k = w_k + Σ_{j<k} (R_jk / R_kk) E_j, at no cost, and one
that goes costs R_kk² t_k². The masks are chosen by that cost, a panel of inputs at a time: this is SparseGPT (Frantar &
Alistarh 2023), whose score w² / [H⁻¹]_kk is the same. It solves for each weight once, with those before it frozen.
`refit_masked` goes on from there, or from any other mask, towards the least squares of all weights that stay.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Booleans, Doubles, Floats
from onnxpress.optimizers.pruning.maths.masks import GONE, Pattern, choose_mask, count_of
from onnxpress.optimizers.quantization.maths.gptq import PANEL, check_gram, damped_gram, upper_root


def sparsegpt(
    weight: Floats, gram: Doubles, sparsity: float, pattern: Pattern, *, damping: float = 0.03
) -> tuple[Floats, Booleans]:
    """The pruned weight [inputs, outputs], and its mask.

    Args:
        weight: float32, finite. Where it is zero it stays so, and counts.
        gram: [inputs, inputs], E[x xᵀ]; symmetric, positive semi-definite, finite.
        sparsity, pattern: see `masks.choose`; the sparsity is that of every panel of 128 inputs or a few more, so that
            groups and blocks lie in one.
        damping: times the mean of the diagonal, added to it, which pulls weights to what they were.

    Raises:
        ValueError: `gram` does not fit or is not positive semi-definite, or the pattern does not divide the weight.
    """
    check_gram(gram, weight)
    if reason := pattern.obstacle(*weight.shape):
        raise ValueError(reason)
    root = upper_root(damped_gram(gram, damping))
    costs = np.square(np.diagonal(root)).astype(np.float32)
    feedback = np.asarray(root / np.diagonal(root), np.float32)
    result, errors = np.zeros_like(weight, np.float32), np.zeros_like(weight, np.float32)
    mask = np.ones(weight.shape, np.bool_)
    step = pattern.group or pattern.columns
    panel = -(-PANEL // step) * step
    for start in range(0, len(weight), panel):
        end = min(start + panel, len(weight))
        targets = weight[start:end] + feedback[:start, start:end].T @ errors[:start]
        gone = weight[start:end] == 0
        unit = pattern.group or end - start  # what is chosen at once, by the weights as they are by then
        for place in range(start, end):
            row = place - start
            targets[row] += feedback[start:place, place] @ errors[start:place]
            if row % unit == 0:
                part = slice(row, row + unit)
                ahead = targets[part].copy()
                ahead[1:] += feedback[start:place, place + 1 : place + unit].T @ errors[start:place]
                found = np.square(ahead) * costs[start:end][part, None]
                found[gone[part]] = GONE
                mask[start:end][part] = choose_mask(found, _share(sparsity, start, end, weight, pattern), pattern)
                mask[start:end][part] &= ~gone[part]
            result[place] = np.where(mask[place], targets[row], 0)
            errors[place] = weight[place] - result[place]
    return result, mask


def _share(sparsity: float, start: int, end: int, weight: Floats, pattern: Pattern) -> float:
    """The sparsity of a panel that makes the count of all panels up to its end exact."""
    size = pattern.rows * pattern.columns
    before, after = (count_of(sparsity, place * weight.shape[1] // size) for place in (start, end))
    return float((after - before) * size / ((end - start) * weight.shape[1]))


def refit_masked(
    weight: Floats, start: Floats, mask: Booleans, gram: Doubles, *, damping: float = 0.03, steps: int = 16
) -> Floats:
    """Weights that stay, moved towards the least of tr(Eᵀ H E) by conjugate gradients; those that go are zero.

    All outputs at once, each with its own mask: a step is one product of H with a matrix as large as the weight, where
    solving for each output would take inputs³. The error of an output (with damping) never grows, and begins with that
    of `start` or that of the weight with its mask, whichever is less.

    Args:
        weight: [inputs, outputs] float32, what the product was.
        start: of the same shape, zero where `mask` is False.
        steps: as many as inputs would be exact.
    """
    check_gram(gram, weight)
    hessian = damped_gram(gram, damping).astype(np.float32)
    plain = np.where(mask, weight, np.float32(0))
    better = _errors(weight - plain, hessian) < _errors(weight - start, hessian)
    best = np.where(better, plain, start).astype(np.float32)
    least = _errors(weight - best, hessian)
    current = best.copy()
    inverse = (1 / np.diagonal(hessian))[:, None].astype(np.float32)
    slope = np.where(mask, hessian @ (weight - current), np.float32(0))
    direction = slope * inverse
    power = np.einsum("ij,ij->j", slope, direction)
    for _ in range(steps):
        pushed = hessian @ direction
        curvature = np.einsum("ij,ij->j", direction, pushed)
        length = np.divide(power, curvature, out=np.zeros_like(power), where=curvature > 0)
        current += length * direction
        slope -= length * np.where(mask, pushed, np.float32(0))
        ahead = slope * inverse
        after = np.einsum("ij,ij->j", slope, ahead)
        direction = ahead + np.divide(after, power, out=np.zeros_like(after), where=power > 0) * direction
        power = after
    # Rounding ends the descent where the error is all but nothing.
    return np.where(_errors(weight - current, hessian) <= least, current, best)


def _errors(error: Floats, hessian: Floats) -> Floats:
    """eᵀ H e of every output."""
    found: Floats = np.einsum("ij,ij->j", error, hessian @ error)
    return found
