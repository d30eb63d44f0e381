"""Engines: what puts a chunk's tensors into an inference engine's cache, and takes them out. One module an engine; none
is imported here.
"""
