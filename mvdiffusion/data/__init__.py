"""Rendered objects as training samples."""
