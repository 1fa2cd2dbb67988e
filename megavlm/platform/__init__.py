"""CPU adapter and device facts: the only room that knows there may be no CUDA."""
