"""What the commands are made of: tasks, training, checkpoints, scores, and grids of runs."""
