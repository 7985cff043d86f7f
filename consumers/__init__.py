"""The stages of the pipeline, one in each file, and the sink. A stage reads records and returns new records."""
