"""From a run's settings to its parts: model, optimizer, loader."""
