"""From the formats that people have to samples: one format a file, one container (JSON, tar, parquet) a file."""
