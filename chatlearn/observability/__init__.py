"""What a person sees of a run: the journal, its sinks, and the numbers worth reading."""
