"""Deep-learning stock-selection factors as native Qlib parts."""

__version__ = "0.1.0"
