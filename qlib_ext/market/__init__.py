"""The embedded market: a simulated A-share-like market whose true alpha is known.

`make_market` writes an ordinary Qlib day store, `make_minute` and `make_ticks` the
minute bars and ticks below it, `make_bonds` convertible bonds on its shares. Nothing in
it is real, and nothing in it is a claim about real markets: it exists so that every
part of this project can be run, and proved, on a machine without data.
"""

from qlib_ext.market.bonds import make_bonds
from qlib_ext.market.intraday import make_minute, make_ticks
from qlib_ext.market.make import build_market, describe_market, make_market, oracle_path
from qlib_ext.market.rates import make_futures

__all__ = [
    "build_market",
    "describe_market",
    "make_bonds",
    "make_futures",
    "make_market",
    "make_minute",
    "make_ticks",
    "oracle_path",
]
