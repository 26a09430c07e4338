"""Minute bars and Level-2 ticks to one row a day."""
