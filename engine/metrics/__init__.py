"""Metrics, each plain and for all resamples of a bootstrap at once."""
