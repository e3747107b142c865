"""State on disk: sharded checkpoints, the run's state, and conversion to Hugging Face format."""
