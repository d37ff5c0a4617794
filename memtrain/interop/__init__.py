"""Models of other libraries, in both directions."""
