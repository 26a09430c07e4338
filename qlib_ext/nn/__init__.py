"""Network blocks that more than one model uses."""
