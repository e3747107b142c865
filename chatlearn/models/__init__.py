"""What we know about each model family, one record a family."""
