"""Proves that a run that is killed goes on as if nothing had happened, on a configuration of one's own."""
