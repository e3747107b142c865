"""Training and scoring on FSDP2: a sharded model, an optimizer, and the plan of ranks."""
