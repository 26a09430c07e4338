"""Readers of vendor files under the names they had here; see `data_handlers.vendor`."""

from data_handlers.codes import normalise_codes
from data_handlers.vendor.read import find_files, parse_dates, read_source

__all__ = ["find_files", "normalise_codes", "parse_dates", "read_source"]
