"""From samples to micro-batches and back: planning on integers, layout by a column table."""
