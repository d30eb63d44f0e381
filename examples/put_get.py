"""Store tensors in the mesh and read them back, without any engine.

    kvmesh agent &                    # once on this host
    python examples/put_get.py        # on this host, or on another one that has joined

The second run, here or on another node, finds what the first one stored.
"""

import torch

import kvmesh

# What a chunk is: everything that its content depends on. Here 16 tokens of a model with 2 layers.
space = kvmesh.Namespace(
    model="example", revision="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, chunk_tokens=16
)
tokens = list(range(100, 100 + 50))  # a prompt of 50 tokens: three whole chunks, and two tokens that have no chunk
chain = space.chain(tokens)  # one key for each chunk; a key stands for all tokens up to its chunk's end


def compute(index: int) -> torch.Tensor:
    """In place of a model: [layers, K and V, kv_heads, chunk_tokens, head_dim]."""
    return torch.full(space.tensors["kv"].shape, float(index))


with kvmesh.connect() as mesh:
    with mesh.get(space, chain, deadline_s=0.5) as hit:  # a miss is a shorter hit, never an exception
        print(f"found {hit.count} of {len(chain)} chunks, {hit.fetched} of them on other nodes")
        for index, view in enumerate(hit):  # zero-copy, read-only; copy what you keep
            assert isinstance(view, torch.Tensor)  # it is a dict where a namespace names several tensors
            assert torch.equal(view, compute(index))
        missing = chain[hit.count :]
    result = mesh.put(space, {key: compute(chain.index(key)) for key in missing})
    print(f"stored {result.stored} new chunks, {result.bytes_stored} bytes")
    for holder in mesh.locate(chain)["holders"]:
        print(f"node {holder['node']} has {holder['run_chunks']} chunks from the front")
