"""What the product promises, shown on every architecture of the zoo."""
