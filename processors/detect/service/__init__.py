"""The detector as a service of its own: `rewatch serve detector`, for this product's stage and for other clients."""
