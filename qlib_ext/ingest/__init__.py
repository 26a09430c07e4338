"""Vendor files to a Qlib store: read, check, convert, write, extend."""
