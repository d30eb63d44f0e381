"""Generate with Hugging Face transformers, and share the KV cache with every node of the mesh.

    kvmesh agent &                                                       # once on each host
    python examples/transformers_generate.py MODEL_FOLDER "A long prompt …"

A prompt's beginning that any node has computed before is read from there instead of being computed again. With no
agent on this host it runs as it would without kvmesh.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmesh.engines.transformers import MeshModel

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

# The line that makes the difference. It finds the local agent by KVMESH_SOCKET or at the default path.
engine = MeshModel(model)

inputs = tokenizer(prompt, return_tensors="pt")
result = engine.generate(inputs.input_ids, max_new_tokens=32, do_sample=False)  # all arguments of model.generate

print(tokenizer.decode(result.sequences[0, result.prompt_tokens :], skip_special_tokens=True))
print(f"reused {result.tokens_reused} of {result.prompt_tokens} tokens; first token after {result.ttft_s:.3f} s")
if result.mesh_error:
    print(f"without the mesh: {result.mesh_error}")
engine.close()
