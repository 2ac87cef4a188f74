"""One run from beginning to end: its loop, its folder, its checkpoints, its environment."""
