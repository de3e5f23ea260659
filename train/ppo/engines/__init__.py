"""Rollout engines: what turns prompts and a policy into sampled responses.

`base` has the interface, `build` picks the engine that `rollout.engine` names, `config` is its YAML block:
- `hf` (default): the policy's own forward pass in a loop; same random numbers, same responses;
- `continuous`: transformers' paged continuous batching; long, uneven responses on a GPU;
- `vllm`: a vLLM engine beside the trainer (colocate) or a vLLM server, weights pushed after every update.

This file imports nothing, so that `config` can be read without torch.
"""
