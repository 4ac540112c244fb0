"""Pruners made small: weights set to zero, or heads and inner units taken out."""
