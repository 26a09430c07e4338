"""`MsHandler` by the path that it had: YAML files name it so."""

from data_handlers.aggregates import MsHandler

__all__ = ["MsHandler"]
