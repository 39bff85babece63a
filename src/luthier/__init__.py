"""Luthier fits a language model to one task."""
