"""Whether engine and trainer say the same of the same tokens, and, where they do not, why."""
