"""Settings of other libraries as ours: what `proximo convert` prints."""
