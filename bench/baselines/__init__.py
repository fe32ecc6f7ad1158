"""What the areas are measured against: other packages, and the reference implementation's own way."""
