"""How many channels the tensors of a network keep: which could go, what that costs, and what a budget picks."""
