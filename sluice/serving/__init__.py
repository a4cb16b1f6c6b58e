"""vLLM adapters, the gateway's routes, canary analysis and rollout."""
