"""What the specification fixes: media types, limits, the manifest, the RAM-snapshot codec. Pure: no files, no sockets."""
