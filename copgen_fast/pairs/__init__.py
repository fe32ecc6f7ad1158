"""Generated pairs (G(z), G(z')) as tar shards: format, writer, loader, verify. Imports nothing by itself."""
