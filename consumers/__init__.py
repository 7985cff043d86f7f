"""The stages of the pipeline, and the sink. Every stage has its own file. A stage reads records and returns new records."""
