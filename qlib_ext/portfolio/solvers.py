"""Interior-point and first-order solvers of a `Programme`, tried in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from qlib_ext.portfolio.programme import Programme

__all__ = ["CALLS", "SOLVERS", "Answer"]

SOLVERS = ("CLARABEL", "OSQP", "SCS")
"""Tried in turn; OSQP takes no tracking-error limit and is passed over then."""


@dataclass(frozen=True)
class Answer:
    """What a solver gave back.

    Attributes
    ----------
    status : str
        "optimal", "inaccurate", "infeasible" or the solver's own word.
    x, z : ndarray or None
        Values of the variables, and multipliers of the rows.
    """

    status: str
    x: np.ndarray | None
    z: np.ndarray | None


def _clarabel(programme: Programme) -> Answer:
    import clarabel

    a, b, cones, _ = programme.matrices()
    kinds = [clarabel.ZeroConeT(sum(cones["zero"]))]
    kinds.append(clarabel.NonnegativeConeT(sum(cones["nonneg"])))
    kinds += [clarabel.SecondOrderConeT(size) for size in cones["soc"]]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    solver = clarabel.DefaultSolver(programme.P, programme.q, a, b, kinds, settings)
    done = solver.solve()
    said = str(done.status)
    status = {
        "Solved": "optimal",
        "AlmostSolved": "inaccurate",
        "PrimalInfeasible": "infeasible",
        "AlmostPrimalInfeasible": "infeasible",
    }.get(said, said)
    return Answer(status, np.array(done.x), np.array(done.z))


def _scs(programme: Programme) -> Answer:
    import scs

    a, b, cones, _ = programme.matrices()
    data = {
        "P": sparse.csc_matrix(programme.P),
        "A": sparse.csc_matrix(a),
        "b": b,
        "c": programme.q,
    }
    cone = {"z": sum(cones["zero"]), "l": sum(cones["nonneg"]), "q": cones["soc"]}
    done = scs.SCS(
        data, cone, verbose=False, eps_abs=1e-9, eps_rel=1e-9, max_iters=100_000
    ).solve()
    said = done["info"]["status"]
    status = {
        "solved": "optimal",
        "solved (inaccurate - reached max_iters)": "inaccurate",
        "infeasible": "infeasible",
    }.get(said, said)
    return Answer(status, done["x"], done["y"])


def _osqp(programme: Programme) -> Answer:
    import osqp

    a, b, cones, _ = programme.matrices()
    if cones["soc"]:
        return Answer("takes no tracking-error limit", None, None)
    equal = sum(cones["zero"])
    low = np.r_[b[:equal], np.full(len(b) - equal, -np.inf)]
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(programme.P),
        programme.q,
        sparse.csc_matrix(a),
        low,
        b,
        verbose=False,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=200_000,
        polishing=True,
    )
    done = solver.solve(raise_error=False)
    said = str(done.info.status)
    status = {
        "solved": "optimal",
        "solved inaccurate": "inaccurate",
        "primal infeasible": "infeasible",
        "primal infeasible inaccurate": "infeasible",
    }.get(said, said)
    return Answer(status, np.asarray(done.x), np.asarray(done.y))


CALLS = {"CLARABEL": _clarabel, "OSQP": _osqp, "SCS": _scs}
