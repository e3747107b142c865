"""Stand-alone programs that turn downloaded data sets into our record files."""
