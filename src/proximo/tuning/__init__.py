"""Searching for settings: what may be searched, the study on the disk, its trials, and the loop over them."""
