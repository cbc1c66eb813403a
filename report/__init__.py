"""Metrics, predictions, the report page and pictures."""
