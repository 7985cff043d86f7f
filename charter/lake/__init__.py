"""The lake: all tables as Parquet files or Iceberg tables in a folder or an object store (`charter export lake`)."""
