"""finediff."""
