"""A plan before launch: memory, time and layout of a run, traced from the run's own model."""
