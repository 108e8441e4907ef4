"""The way in: from any model to one graph in the normal form. `fxprune.tracing.trace` puts the parts together."""
