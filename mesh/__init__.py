"""kvmesh: a peer-to-peer mesh that shares the KV cache of LLM inference engines between machines."""
