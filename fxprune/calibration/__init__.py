"""The calibration set: its batches, where their values wait, and the stream of both models side by side."""
