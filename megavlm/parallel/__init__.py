"""Who computes what: degrees to process groups, pipeline stages, data-parallel wrapping, recompute."""
