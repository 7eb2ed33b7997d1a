"""Small worlds, generated on the spot, in which the demonstrations run without a download."""
