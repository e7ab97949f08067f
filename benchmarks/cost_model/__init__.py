"""Predicted times against measured ones, and whether a decision was ever a loss."""
