"""What runs inside vLLM's own environment. Nothing of ours is imported there, and nothing here is imported by us."""
