"""How trained weights travel into a rollout engine; both ends of each wire in one file."""
