"""What a model may see: Qlib data handlers, labels, processors and risk exposures."""
