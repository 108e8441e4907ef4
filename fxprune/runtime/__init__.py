"""What a call finds around itself: the device, torch's settings, the terminal, Ctrl-C, and what is not imported yet."""
