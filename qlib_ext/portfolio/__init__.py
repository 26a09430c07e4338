"""Index enhancement: risk model, optimiser, Qlib strategy, exchange and record."""
