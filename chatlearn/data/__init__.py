"""Prompts from files, and the order in which training meets them."""
