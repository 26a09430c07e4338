"""Vendor files: one YAML language that describes them, presets, and their readers."""
