"""Training a pruned model further, and taking its weights back to the class that it came from."""
