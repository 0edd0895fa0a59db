"""An event as evidence: one archive that holds all it was made from, and can be checked without this product."""
