"""Judging completions, in processes of their own and with a deadline."""
