"""`Level2Handler` by the path that it had: YAML files name it so."""

from data_handlers.aggregates import Level2Handler

__all__ = ["Level2Handler"]
