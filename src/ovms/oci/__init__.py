"""OCI: references, descriptors, manifests, the local image layout, and the registry client."""
