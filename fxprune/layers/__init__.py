"""One layer: its least-squares problem, the problem solved under a chain of constraints, the weights installed and kept."""
