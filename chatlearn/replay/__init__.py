"""Runs a recorded training step again, in one way or in many, without Ray and without a rollout engine."""
