"""What a run leaves on disk: its folder, its metrics, and checkpoints that survive a kill anywhere."""
