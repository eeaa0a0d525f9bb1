"""Storage, checkpoints, interrupts, memory, batching, statistics and validation."""
