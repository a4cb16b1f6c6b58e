"""Statistics of comparisons: pure functions of numbers, for the gate, the retrieval gate and the canary alike."""
