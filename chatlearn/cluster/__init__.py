"""Ray, and nothing but Ray: which process lives where, and how the driver talks to it."""
