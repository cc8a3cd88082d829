"""Predictions into Label Studio."""
