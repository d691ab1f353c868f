"""Layers over ops. A layer holds its parameters and nothing else; caches come with the call."""
