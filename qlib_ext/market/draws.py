"""Random streams of the embedded market: one for each purpose, all from one seed."""

import numpy as np

__all__ = ["ar1", "draw", "student"]


def draw(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one purpose: independent streams from one seed.

    A stream depends on `seed` and its purpose only, so a change to one part of the
    market does not shuffle the others.
    """
    keys = [
        p if isinstance(p, int) else int.from_bytes(p.encode(), "big") for p in purpose
    ]
    return np.random.default_rng([seed, *keys])


def student(rng: np.random.Generator, shape: tuple[int, ...], df: float) -> np.ndarray:
    """Draw Student t values of unit variance."""
    return rng.standard_t(df, shape) / np.sqrt(df / (df - 2))


def ar1(
    rng: np.random.Generator, t: int, shape: tuple[int, ...], phi: float
) -> np.ndarray:
    """Draw Gaussian AR(1) paths of unit variance, [t, *shape]."""
    x = rng.standard_normal((t, *shape))
    for i in range(1, t):
        x[i] = phi * x[i - 1] + np.sqrt(1 - phi**2) * x[i]
    return x
