"""The stages of the stream, one file each, and the sink. Each stage maps records to records."""
