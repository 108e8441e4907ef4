"""Models whose own forward stays Python, such as detectors: their traceable children are compiled in place."""
