"""What a user may write, and what follows from it; nothing here imports torch, Ray or an engine."""
