"""The stages of the stream: one file each, from records to records; and the sink."""
